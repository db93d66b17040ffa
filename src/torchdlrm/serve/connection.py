"""One HTTP connection: uvicorn's, with limits on the size of headers and on the time that a client may take.

uvicorn's fast parser takes headers of any size at any pace.  Here they have a size and a time, a bad request is told in
JSON as everything else, and the app is told when a request began and whether its client is still there.
"""

import asyncio
import time
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

ARRIVED = "torchdlrm.arrived_s"  # in a request's scope: when it began, by `time.perf_counter`
IS_WHOLE = "torchdlrm.is_whole"  # in a request's scope: whether all of its body has come
IS_GONE = "torchdlrm.is_gone"  # in a request's scope: says whether the client has closed the connection
MAX_HEADER_BYTES = 32 << 10


class LimitedConnection(HttpToolsProtocol):
    """A connection whose client must send its headers in time; `with_timeout` makes the class for a server."""

    header_timeout_s = 10.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._is_between_headers = True
        self._header_bytes = 0
        self._header_timer: asyncio.TimerHandle | None = None

    @classmethod
    def with_timeout(cls, header_timeout_s: float) -> type["LimitedConnection"]:
        """A class of connections with that limit."""
        return type("Connection", (cls,), {"header_timeout_s": header_timeout_s})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        """Somebody has connected: headers must come."""
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        if self._is_between_headers:
            if self._header_timer is None:
                self._start_timer()  # the first bytes of another request on this connection
            self._header_bytes += len(data)
        super().data_received(data)
        if self._is_between_headers and self._header_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
            self._refuse(431, f"the headers have more than {MAX_HEADER_BYTES:,} bytes")

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # a server may add keys of its own
        scope[ARRIVED] = time.perf_counter()
        scope[IS_GONE] = self.transport.is_closing
        scope[IS_WHOLE] = False

    def on_headers_complete(self) -> None:
        """The headers are there."""
        self._stop_timer()
        self._is_between_headers = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The body is there; the next request may follow."""
        self._is_between_headers = True
        self._header_bytes = 0
        scope: dict[str, Any] = self.scope  # type: ignore[assignment]  # as above
        scope[IS_WHOLE] = True
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(400, msg)

    def _start_timer(self) -> None:
        self._header_timer = self.loop.call_later(self.header_timeout_s, self._time_is_up)

    def _stop_timer(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _time_is_up(self) -> None:
        self._header_timer = None
        if not self.transport.is_closing():
            self._refuse(408, f"the headers did not come within {self.header_timeout_s:g} s")

    def _refuse(self, status: int, message: str) -> None:
        body = orjson.dumps({"error": message})
        headers = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[status] + headers + body)
        self.transport.close()
