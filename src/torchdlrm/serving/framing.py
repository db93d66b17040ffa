"""Cuts what a client sends over one connection into requests.

In: bytes as they arrive.  Out: heads, pieces of bodies and ends of requests, one at a time and as they are asked for.
What comes behind stays bytes until then: nothing is done ahead for a client that sends many requests at once.

llhttp (of httptools) checks heads, and sees nothing else.  Where a body ends is decided here, by `Content-Length` or
`Transfer-Encoding: chunked` alone: a header that would make a parser skip the body, such as `Upgrade`, is one like any
other.  What two programs on the way could read differently is refused (RFC 9112); trailers are dropped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final, Literal

import httptools

MAX_HEADER_BYTES: Final = 32 << 10
_MAX_CHUNK_LINE_BYTES: Final = 1 << 10
_REQUEST_LINE = re.compile(rb"([A-Z]{1,20}) ([!-~]+) HTTP/(\d\.\d)\r\n")
_HOST = re.compile(rb"[\w.~!$&'()*+,;=%:\[\]-]*", re.ASCII)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,12})((?:;[^\x00-\x08\x0a-\x1f\x7f]*)?)")
_TRAILERS = re.compile(rb"(?:[!#$%&'*+.^_`|~\w-]+:[^\x00\r\n]*\r\n)+", re.ASCII)

Headers = list[tuple[bytes, bytes]]


class Unreadable(Exception):  # noqa: N818 - it is an answer
    """What came cannot be taken for a request, and nothing behind it can be read; `message` tells the client why."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a request.

    Attributes:
        target: as it came, a path with a query or an address.
        version: "1.0" or "1.1".
        headers: names in lower case.
        keeps_alive: whether the client keeps the connection open.
        expects_continue: whether it waits to be told to send the body.
    """

    method: str
    target: bytes
    version: str
    headers: Headers
    keeps_alive: bool
    expects_continue: bool


END: Final = "end"
Event = Head | bytes | Literal["end"]


class RequestReader:
    """Reads one connection; what follows an `Unreadable` cannot be read."""

    def __init__(self) -> None:
        self._data, self._at = b"", 0
        # Not bound: an object that refers to itself waits for the collector.
        self._next: Callable[[RequestReader], Event | None] = RequestReader._head
        self._left = 0  # bytes of the body, or of its chunk
        self._header_bytes = 0  # of this request: its head, what its chunks carry besides the body, its trailers

    @property
    def num_waiting(self) -> int:
        """The number of bytes that have come and were not asked for."""
        return len(self._data) - self._at

    def feed(self, data: bytes) -> None:
        """Take bytes that have come."""
        self._data = self._data[self._at :] + data if self._at < len(self._data) else data
        self._at = 0

    def next_event(self) -> Event | None:
        """Return a head, then pieces of its body, then `END`; None where more has to come first.

        Raises:
            Unreadable: this is no HTTP, or more of it than is taken.
        """
        return self._next(self)

    def _head(self) -> Event | None:
        data, at = self._data, self._at
        if data.startswith(b"\r\n", at):  # of a client that ends its bodies with a line; one, or they had no end
            at += 2
        end = data.find(b"\r\n\r\n", at)
        if (len(data) if end < 0 else end + 4) - at > MAX_HEADER_BYTES:
            raise _too_long()
        if end < 0:
            _check_beginning(data, at)
            return None
        self._at, self._header_bytes = end + 4, end + 4 - at
        return self._parsed(data[at : end + 4])

    def _parsed(self, text: bytes) -> Head:
        line = _REQUEST_LINE.match(text)
        if line is None:
            raise _bad("the first line is no request of HTTP/1.1")
        method, target, version = line.group(1).decode(), line.group(2), line.group(3).decode()
        if method == "CONNECT":
            raise Unreadable(HTTPStatus.METHOD_NOT_ALLOWED, "CONNECT: this server is no proxy")
        if version not in {"1.0", "1.1"}:
            msg = f"HTTP/{version}: this server speaks HTTP/1.1"
            raise Unreadable(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, msg)
        found = _Found()
        try:
            httptools.HttpRequestParser(found).feed_data(text)
        except httptools.HttpParserUpgrade:
            pass  # an offer, which is declined by continuing in HTTP/1.1 (RFC 9110, 7.8)
        except httptools.HttpParserError as error:
            msg = f"the headers are not those of HTTP/1.1: {error}"
            raise _bad(msg) from error
        if not found.is_complete or found.is_longer:
            raise _bad("the headers are not those of HTTP/1.1")
        headers = found.headers
        fields = dict(headers)
        if len(fields) != len(headers):
            _check_repeated(headers, fields)
        host = fields.get(b"host")
        if (host is None and version == "1.1") or (host is not None and not _HOST.fullmatch(host)):
            raise _bad("Host: there must be one")
        self._begin_body(fields, version)
        connection = fields.get(b"connection")
        closes = connection is not None and b"close" in [word.strip() for word in connection.lower().split(b",")]
        return Head(
            method,
            target,
            version,
            headers,
            keeps_alive=version == "1.1" and not closes,
            expects_continue=version == "1.1" and fields.get(b"expect", b"").lower() == b"100-continue",
        )

    def _begin_body(self, fields: dict[bytes, bytes], version: str) -> None:
        length, coding = fields.get(b"content-length"), fields.get(b"transfer-encoding")
        self._next = RequestReader._end
        if coding is not None:
            if coding.lower() != b"chunked" or version == "1.0" or length is not None:
                raise _bad("Transfer-Encoding: only 'chunked' is taken, in HTTP/1.1, and without Content-Length")
            self._next = RequestReader._chunk_size
        elif length is not None:
            if not length.isdigit() or len(length) > 18:
                raise _bad("Content-Length: this is no length")
            self._left = int(length)
            if self._left:
                self._next = RequestReader._body

    def _end(self) -> Event:
        self._next = RequestReader._head
        if self._at == len(self._data):
            self._data, self._at = b"", 0  # a silent connection keeps nothing
        return END

    def _body(self) -> Event | None:
        return self._piece(RequestReader._end)

    def _piece(self, behind: "Callable[[RequestReader], Event | None]") -> bytes | None:
        piece = self._data[self._at : self._at + self._left]
        self._at += len(piece)
        self._left -= len(piece)
        if not self._left:
            self._next = behind
        return piece or None

    def _chunk_size(self) -> Event | None:
        data, at = self._data, self._at
        end = data.find(b"\r\n", at, at + _MAX_CHUNK_LINE_BYTES)
        if end < 0:
            if len(data) - at >= _MAX_CHUNK_LINE_BYTES:
                raise _bad("the body is not chunked as it should be")
            return None
        size = _CHUNK_SIZE.fullmatch(data, at, end)
        if size is None:
            raise _bad("the body is not chunked as it should be")
        self._count_header_bytes(len(size.group(2)))
        self._at = end + 2
        self._left = int(size.group(1), 16)
        self._next = RequestReader._chunk if self._left else RequestReader._trailers
        return self._next(self)

    def _chunk(self) -> Event | None:
        return self._piece(RequestReader._chunk_end)

    def _chunk_end(self) -> Event | None:
        end = self._data[self._at : self._at + 2]
        if end != b"\r\n":
            if end in {b"", b"\r"}:
                return None
            raise _bad("the body is not chunked as it should be")
        self._at += 2
        self._next = RequestReader._chunk_size
        return self._chunk_size()

    def _trailers(self) -> Event | None:
        data, at = self._data, self._at
        if data.startswith(b"\r\n", at):
            self._at += 2
            return self._end()
        end = data.find(b"\r\n\r\n", at)
        if end < 0:
            if self._header_bytes + len(data) - at > MAX_HEADER_BYTES:
                raise _too_long()
            return None
        self._count_header_bytes(end - at)
        if not _TRAILERS.fullmatch(data, at, end + 2):
            raise _bad("the trailers are not those of HTTP/1.1")
        self._at = end + 4
        return self._end()

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._header_bytes += num_bytes
        if self._header_bytes > MAX_HEADER_BYTES:
            raise _too_long()


class _Found:
    """Collects what llhttp finds in a head."""

    def __init__(self) -> None:
        self.headers: Headers = []
        self.is_complete = self.is_longer = False

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value.strip(b" \t")))

    def on_headers_complete(self) -> None:
        self.is_complete = True

    def on_message_begin(self) -> None:
        self.is_longer = self.is_complete  # another message in what is one head to us

    def on_body(self, _: bytes) -> None:
        self.is_longer = True


def _check_beginning(data: bytes, at: int) -> None:
    """Refuse what cannot be the beginning of a head, so that a client of another protocol learns it immediately."""
    line_end = data.find(b"\n", at)
    if at < len(data) and data[at : at + 1] != b"\r" and not data[at : at + 1].isalpha():
        raise _bad("this is no HTTP/1.1")
    if line_end >= 0 and not _REQUEST_LINE.match(data, at):
        raise _bad("the first line is no request of HTTP/1.1")


def _check_repeated(headers: Headers, fields: dict[bytes, bytes]) -> None:
    """Refuse repeated headers that say where a request goes and ends; others are lists."""
    seen: set[bytes] = set()
    for name, value in headers:
        if name in seen and name in {b"host", b"content-length", b"transfer-encoding"}:
            msg = f"{name.decode().title()}: there must not be two"
            raise _bad(msg)
        if name in seen and name == b"connection":
            fields[name] += b"," + value
        elif name == b"connection":
            fields[name] = value
        seen.add(name)


def _bad(message: str) -> Unreadable:
    return Unreadable(HTTPStatus.BAD_REQUEST, message)


def _too_long() -> Unreadable:
    msg = f"the headers have more than {MAX_HEADER_BYTES:,} bytes"
    return Unreadable(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, msg)
