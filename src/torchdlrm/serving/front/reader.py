"""Reads the requests of one connection, one at a time and as they are asked for.

In: bytes as they arrive.  Out: heads, pieces of bodies and ends of requests.  What comes behind a request stays bytes
until the request's end was asked for: nothing is done ahead for a client that sends many requests at once.

h11 parses heads, chunks and trailers; a body whose length is given is counted here, which saves a quarter of what h11
takes.  A body ends where `Content-Length` or `Transfer-Encoding: chunked` says, whichever other protocol is offered;
headers and trailers have a limit, and trailers are dropped.  `_check` refuses what h11 takes beyond that.
"""

import re
from collections.abc import Iterable
from http import HTTPStatus
from typing import Final, Literal

import h11

from torchdlrm.serving.service.refusals import RefusedRequest

MAX_HEADER_BYTES: Final = 32 << 10
END: Final = "end"
Event = h11.Request | bytes | Literal["end"]

_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)
_TOO_LONG = f"the headers have more than {MAX_HEADER_BYTES:,} bytes"


class RequestReader:
    """Reads one connection; nothing behind what is refused can be read."""

    def __init__(self) -> None:
        self._ahead = b""  # has come and was neither parsed nor counted
        # Of one request, or of one that has not begun: one for all of them would also have to be given the answers.
        self._parser: h11.Connection | None = None
        self._num_given = 0  # bytes that the parser was given
        self._needs_more = True  # the parser has used all of them
        self._num_left: int | None = None  # bytes of a body whose length is known

    @property
    def num_waiting(self) -> int:
        """The number of bytes that have come and were not used."""
        return len(self._ahead)

    def feed(self, data: bytes) -> None:
        """Take bytes that have come."""
        self._ahead = self._ahead + data if self._ahead else data

    def next_event(self) -> Event | None:
        """Return a head, then pieces of its body, then `END`; None where more has to come first.

        Raises:
            RefusedRequest: this is no HTTP, or more of it than is taken.
        """
        if self._num_left is not None:
            return self._count()
        if self._parser is None:
            # Of a client that ends its bodies with a line.
            self._ahead = self._ahead.removeprefix(b"\r\n")
            if self._ahead in {b"", b"\r"}:
                return None
            self._parser = h11.Connection(h11.SERVER, MAX_HEADER_BYTES)
            self._num_given, self._needs_more = 0, True
        event = self._parse(self._parser)
        self._needs_more = event is None or event is h11.NEED_DATA
        if type(event) is h11.Request:  # isinstance() of h11's abstract classes takes as long as much of the parsing
            self._check_size(event.headers, len(event.target))
            fields = dict(event.headers)
            _check(event, fields)
            if b"transfer-encoding" not in fields:
                self._num_left = int(fields.get(b"content-length", 0))
                self._take_back(self._parser)
            return event
        if type(event) is h11.Data:
            return bytes(event.data)
        if type(event) is h11.EndOfMessage:
            self._check_size(event.headers)
            self._take_back(self._parser)
            return END
        return None

    def _parse(self, parser: h11.Connection) -> object:
        try:
            event = None if self._needs_more else parser.next_event()
            # Before more is given to it, it makes events of what it has: what waits is counted, and reading pauses.
            if self._ahead and (event is None or event is h11.NEED_DATA):
                parser.receive_data(self._ahead)
                self._num_given += len(self._ahead)
                self._ahead = b""
                event = parser.next_event()
        except h11.RemoteProtocolError as error:
            error.__traceback__ = None  # one of its frames knows it: both would stay until the collector comes
            status = error.error_status_hint
            is_too_long = status == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            message = _TOO_LONG if is_too_long else f"this is no HTTP/1.1: {error}"
            raise RefusedRequest(HTTPStatus(status), message) from error
        return event

    def _take_back(self, parser: h11.Connection) -> None:
        self._ahead = parser.trailing_data[0] + self._ahead
        self._parser = None

    def _count(self) -> Event | None:
        if not self._num_left:
            self._num_left = None
            return END
        piece, self._ahead = self._ahead[: self._num_left], self._ahead[self._num_left :]
        self._num_left -= len(piece)
        return piece or None

    def _check_size(self, headers: Iterable[tuple[bytes, bytes]], num_others: int = 0) -> None:
        """Refuse headers that are too long; h11 does so only where they come in several pieces."""
        may_be = self._num_given > MAX_HEADER_BYTES
        if may_be and num_others + sum(len(name) + len(value) + 4 for name, value in headers) > MAX_HEADER_BYTES:
            raise RefusedRequest(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _TOO_LONG)


def _check(request: h11.Request, fields: dict[bytes, bytes]) -> None:
    """Refuse heads that are no business of this server, or that two programs on the way could read differently."""
    if request.method == b"CONNECT":
        raise RefusedRequest(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT: this server is no proxy")
    if request.http_version not in {b"1.0", b"1.1"}:
        msg = f"HTTP/{request.http_version.decode()}: this server speaks HTTP/1.1"
        raise RefusedRequest(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, msg)
    if not _HOST.fullmatch(fields.get(b"host", b"")):
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, "Host: this is no name of a server")
    if b"transfer-encoding" in fields and (b"content-length" in fields or request.http_version == b"1.0"):
        msg = "Transfer-Encoding: is taken in HTTP/1.1, and without Content-Length"
        raise RefusedRequest(HTTPStatus.BAD_REQUEST, msg)
