"""Represents one request and its answer, as an ASGI app sees them.

In: a head, then the body in pieces.  Out: the bytes of the answer, all together: answers are complete before they are
sent, so that the app has done with a request whether or not its client reads.
"""

import asyncio
import logging
import time
import urllib.parse
from collections.abc import Iterable
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import h11
import orjson
from starlette.types import ASGIApp, Message

if TYPE_CHECKING:
    from torchdlrm.serving.front.connection import Connection

ARRIVED: Final = "torchdlrm.arrived_s"  # in a request's scope: when its head had come, by `time.perf_counter`
IS_COMPLETE: Final = "torchdlrm.is_complete"  # in a request's scope: whether all of its body has come
IS_GONE: Final = "torchdlrm.is_gone"  # in a request's scope: says whether the client no longer waits for the answer

Headers = Iterable[tuple[bytes, bytes]]
_STATUS_LINES = {status.value: b"HTTP/1.1 %d %s\r\n" % (status, status.phrase.encode()) for status in HTTPStatus}
_BODILESS = {HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED}
_JSON = (b"content-type", b"application/json")
_CLOSE = (b"connection", b"close")
_log = logging.getLogger(__name__)


class Exchange:
    """A request that is being answered.

    Attributes:
        is_complete: all of the body has come.
        keeps_alive: the connection can take another request after it.
        num_unread: bytes of the body that have come and that the app has not taken.
    """

    def __init__(self, head: h11.Request, connection: "Connection", date: tuple[bytes, bytes]) -> None:
        self._method, self._connection, self._date = head.method, connection, date
        version, headers = head.http_version.decode(), list(head.headers)
        path, query, host = _path_query_and_host(head.target)
        if host is not None:  # that of a whole address counts, and not the header (RFC 9112, 3.2.2)
            headers = [*(header for header in headers if header[0] != b"host"), (b"host", host)]
        options = b",".join([value for name, value in headers if name == b"connection"])
        self.keeps_alive = version == "1.1" and b"close" not in options.lower()
        expects = [value for name, value in headers if name == b"expect"]
        self._must_say_continue = version == "1.1" and b"100-continue" in b",".join(expects).lower()
        self.is_complete = self._is_answered = self._is_lost = self._is_read = False
        self._pieces: list[bytes] = []
        self.num_unread = 0
        self._waiting: asyncio.Future[None] | None = None
        self._start: Message | None = None
        self._content: list[bytes] = []
        self.scope: dict[str, Any] = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": head.method.decode(),
            "scheme": "http",
            "server": connection.server,
            "client": connection.client,
            "root_path": "",
            "path": urllib.parse.unquote(path) if "%" in path else path,
            "raw_path": path.encode(),
            "query_string": query,
            "headers": headers,
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
        """Take note that the rest of the body will not come, or that the client is not there any more to read."""
        self._is_lost = True
        self._wake()

    async def run(self, app: ASGIApp) -> None:
        """Have the app answer."""
        try:
            await app(self.scope, self._receive, self._send)
        except Exception:  # noqa: BLE001 - whatever it raises is answered with 500, and logged
            _log.exception("the app failed")
        finally:
            if not self._is_answered:
                content = orjson.dumps({"error": "the server failed; its log says why"})
                self._answer(500, [_JSON], content)

    async def _receive(self) -> Message:
        if self._must_say_continue and not self.is_complete:
            self._connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._must_say_continue = False
        while not (self._pieces or self._is_lost or self._is_answered or (self.is_complete and not self._is_read)):
            self._waiting = asyncio.get_running_loop().create_future()
            try:
                await self._waiting
            finally:
                self._waiting = None
        if self._is_answered or (self._is_lost and not self.is_complete) or self._is_read:
            return {"type": "http.disconnect"}
        body = b"".join(self._pieces)
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
        assert not self._is_answered, "a request has one answer"
        headers = [self._date, *headers]
        # What is still to come of the body is not waited for.
        self.keeps_alive = self.keeps_alive and self.is_complete and _CLOSE not in headers
        if status not in _BODILESS and b"content-length" not in dict(headers):
            headers.append((b"content-length", b"%d" % len(content)))
        if not self.keeps_alive and _CLOSE not in headers:
            headers.append(_CLOSE)
        answer = _head(status, headers)
        if self._method != b"HEAD" and status not in _BODILESS:
            answer += content
        self._is_answered = True
        self._wake()
        self._connection.write(answer)
        self._connection.answered(self)

    def _wake(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


def error_bytes(status: int, message: str) -> bytes:
    """Make the answer to what is no request, after which nothing more is read."""
    content = orjson.dumps({"error": message})
    return _head(status, [_JSON, (b"content-length", b"%d" % len(content)), _CLOSE]) + content


def _head(status: int, headers: Headers) -> bytes:
    lines = [_STATUS_LINES[status], *[b"%b: %b\r\n" % header for header in headers], b"\r\n"]
    head = b"".join(lines)
    if not head.count(b"\n") == head.count(b"\r") == len(lines):  # not asserted: it must hold under -O too
        raise ValueError("a header of the answer has more than one line")
    return head


def _path_query_and_host(target: bytes) -> tuple[str, bytes, bytes | None]:
    path, _, query = target.partition(b"?")
    scheme, has_host, rest = path.partition(b"://")
    if not has_host or b"/" in scheme:
        return path.decode(), query, None
    authority, slash, path = rest.partition(b"/")  # of a whole address, as sent to proxies
    return (slash + path or b"/").decode(), query, authority.rpartition(b"@")[2]
