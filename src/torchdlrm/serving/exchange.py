"""Represents one request and its answer, as an ASGI app sees them.

In: a head, then the body in pieces.  Out: the bytes of the answer, all together: answers are complete before they are
sent, so that the app has done with a request whether or not its client reads.
"""

import asyncio
import logging
import time
import urllib.parse
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import httptools
import orjson
from starlette.types import ASGIApp, Message

from torchdlrm.serving.framing import Head, Headers

if TYPE_CHECKING:
    from torchdlrm.serving.connection import Connection

ARRIVED: Final = "torchdlrm.arrived_s"  # in a request's scope: when its head had come, by `time.perf_counter`
IS_COMPLETE: Final = "torchdlrm.is_complete"  # in a request's scope: whether all of its body has come
IS_GONE: Final = "torchdlrm.is_gone"  # in a request's scope: says whether the client no longer waits for the answer

_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_BODILESS = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
_log = logging.getLogger(__name__)


class Exchange:
    """A request that is being answered.

    Attributes:
        is_complete: all of the body has come.
        is_answered: the answer has been written.
        keeps_alive: the connection can take another request after it.
        num_unread: bytes of the body that have come and that the app has not taken.
    """

    def __init__(self, head: Head, connection: "Connection", default_headers: Headers) -> None:
        path, query, host = _path_query_and_host(head.target)
        self._head, self._connection, self._default_headers = head, connection, default_headers
        self.is_complete = self.is_answered = False
        self.keeps_alive = head.keeps_alive
        self._must_say_continue = head.expects_continue
        self._is_lost = self._is_read = False
        self._pieces: list[bytes] = []
        self.num_unread = 0
        self._waiting: asyncio.Future[None] | None = None
        self._start: Message | None = None
        self._content: list[bytes] = []
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": head.version,
            "method": head.method,
            "scheme": "http",
            "server": connection.server,
            "client": connection.client,
            "root_path": "",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": path.encode(),
            "query_string": query,
            # The host of a whole address counts, and not the header (RFC 9112, 3.2.2).
            "headers": head.headers
            if host is None
            else [*(header for header in head.headers if header[0] != b"host"), (b"host", host)],
            ARRIVED: time.perf_counter(),
            IS_GONE: connection.is_gone,
            IS_COMPLETE: False,
        }

    def body_came(self, piece: bytes) -> None:
        """Take a piece of the body."""
        self._pieces.append(piece)
        self.num_unread += len(piece)
        self._wake()

    def end_came(self) -> None:
        """Take note that all of the body has come."""
        self.is_complete = self.scope[IS_COMPLETE] = True
        self._wake()

    def lose(self) -> None:
        """Take note that the rest of the body will not come, or that nobody is there any more to read the answer."""
        self._is_lost = True
        self._wake()

    async def run(self, app: ASGIApp) -> None:
        """Have the app answer."""
        try:
            await app(self.scope, self._receive, self._send)
        except Exception:  # noqa: BLE001 - whatever it raises is answered with 500, and logged
            _log.exception("the app failed")
        finally:
            if not self.is_answered:
                content = orjson.dumps({"error": "the server failed; its log says why"})
                self._answer(500, [(b"content-type", b"application/json")], content)

    async def _receive(self) -> Message:
        if self._must_say_continue and not self.is_complete:
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._must_say_continue = False
        while not (self._pieces or self._is_lost or self.is_answered or (self.is_complete and not self._is_read)):
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self.is_answered or (self._is_lost and not self.is_complete) or self._is_read:
            return {"type": "http.disconnect"}
        body = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        self.num_unread = 0
        self._connection.regulate()
        self._is_read = self.is_complete
        return {"type": "http.request", "body": body, "more_body": not self.is_complete}

    async def _send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        assert self._start is not None, "an answer begins with its start"
        self._content.append(message.get("body", b""))
        if not message.get("more_body", False):
            self._answer(self._start["status"], self._start.get("headers", ()), b"".join(self._content))

    def _answer(self, status: int, headers: Headers, content: bytes) -> None:
        assert not self.is_answered, "a request has one answer"
        lines = [_STATUS_LINES[status]]
        has_length = status in _BODILESS
        for name, value in [*self._default_headers, *headers]:
            if name == b"connection" and value == b"close":
                self.keeps_alive = False
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
            has_length |= name == b"content-length"
        if not has_length:
            lines.append(b"content-length: %d\r\n" % len(content))
        if not self.is_complete:
            self.keeps_alive = False  # what is still to come of the body is not waited for
        if not self.keeps_alive:
            lines.append(b"connection: close\r\n")
        lines.append(b"\r\n")
        answer = b"".join(lines)
        if not answer.count(b"\n") == answer.count(b"\r") == len(lines):  # not asserted: it must hold under -O too
            raise ValueError("a header of the answer has more than one line")
        if self._head.method != "HEAD" and status not in _BODILESS:
            answer += content
        self.is_answered = True
        self._wake()
        self._connection.write(answer)
        self._connection.answered(self)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def error_bytes(status: int, message: str) -> bytes:
    """Make the answer to what is no request, after which nothing more is read."""
    content = orjson.dumps({"error": message})
    headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(content)
    return _STATUS_LINES[status] + headers + content


def _path_query_and_host(target: bytes) -> tuple[str, bytes, bytes | None]:
    if not target.startswith(b"/"):  # a whole address, as sent to proxies
        try:
            url = httptools.parse_url(target)
        except httptools.HttpParserInvalidURLError:
            return target.decode(), b"", None
        authority = target.partition(b"://")[2].partition(b"/")[0].partition(b"?")[0]
        return (url.path or b"/").decode(), url.query or b"", authority.rpartition(b"@")[2] if url.host else None
    path, _, query = target.partition(b"?")
    return path.decode(), query, None
