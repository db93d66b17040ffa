"""Handles one HTTP connection, with limits on what its client may send ahead and on the time that it may take.

In: bytes of a client.  Out: calls of an ASGI app, one request after another, and their answers.  A request is not
looked at before the one ahead of it is answered; while an answer is not taken, nothing more is read.
"""

import asyncio
import contextlib
import logging
import math
import socket
import struct
from typing import TYPE_CHECKING, Final, cast

import h11

from torchdlrm.serving.event_log import log_event
from torchdlrm.serving.front.exchange import Exchange, error_bytes
from torchdlrm.serving.front.reader import RequestReader
from torchdlrm.serving.service.refusals import RefusedRequest

if TYPE_CHECKING:
    from torchdlrm.serving.front.http_server import HttpServer

_EVENTS_PER_TURN: Final = 256  # then others have theirs
_MAX_AHEAD_BYTES: Final = 64 << 10  # read before they can be used, of a body or of later requests; then nothing more is
# What a client sends after its answer is read for a while: closed at once, it might never see the answer.
_LINGER_S: Final = 5.0
# Who has closed its side may still wait for the answer, or be gone: after this time it is taken to be gone.
_HALF_CLOSED_S: Final = 0.25
_STANDSTILL_S: Final = 2.0  # while the server stops: how long a client may take nothing of its answer


class Connection(asyncio.Protocol):
    """A connection from its first byte to its last."""

    def __init__(self, server: "HttpServer") -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._reader = RequestReader()
        self._exchange: Exchange | None = None
        self._is_paused = self._cannot_write = self._is_lingering = self._is_stopping = False
        self._ended_s = math.inf  # when the client closed its side
        self._deadline_s, self._is_head_due = math.inf, False
        # What was written and is due: all that was so at that time.  What was taken by then, and when some last was.
        self._num_written, self._num_due, self._due_since_s, self._num_taken, self._taken_s = 0, 0, 0.0, 0, 0.0
        self._num_discarded = 0
        self.client: tuple[str, int] | None = None
        self.server: tuple[str, int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a head; asyncio calls this when a client has connected."""
        self._transport = cast("asyncio.Transport", transport)
        # A client that has gone already has no address.
        self.client, self.server = (
            None if name is None else name[:2] for name in map(transport.get_extra_info, ("peername", "sockname"))
        )
        self._server.open.add(self)
        self._await_head()
        self._server.waiting[self] = None
        self._server.make_room(transport.get_extra_info("socket").fileno(), self._loop.time())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        """Forget the connection; asyncio calls this when it is closed."""
        self._server.open.discard(self)
        self._server.waiting.pop(self, None)
        # Neither keeps the other, nor bytes that will not be read, until the collector comes.
        exchange, self._exchange, self._reader = self._exchange, None, RequestReader()
        if exchange is not None:
            exchange.lose()

    def data_received(self, data: bytes) -> None:
        """Take bytes that have come."""
        if self._is_lingering:
            self._num_discarded += len(data)
            if self._num_discarded > self._server.options.max_body_bytes:
                self._transport.abort()
            return
        self._reader.feed(data)
        if self._exchange is None and not (self._is_head_due or self._cannot_write):
            self._await_head()  # of another request
        self._handle_events()

    def eof_received(self) -> bool:
        """Take note that the client has closed its side; requests that have come are still answered."""
        self._ended_s = self._loop.time()
        if self._is_lingering or (self._exchange is None and not self._cannot_write):
            return False
        if self._exchange is not None and not self._exchange.is_complete:
            self._exchange.lose()
        return True

    def pause_writing(self) -> None:
        """Stop reading: the client does not read what it is sent."""
        self._cannot_write = True
        if self._exchange is None:
            self._await_next()

    def resume_writing(self) -> None:
        """Continue reading: the client reads again."""
        self._cannot_write = False
        if self._exchange is None:
            self._await_next()
            self._handle_events()

    def shutdown(self) -> None:
        """Close the connection after the request that is being answered; the server stops."""
        self._is_stopping, self._taken_s = True, self._loop.time()
        if self._exchange is None or self._is_lingering:
            self._transport.close()
        else:
            self._exchange.keeps_alive = False

    @property
    def is_between_requests(self) -> bool:
        """Whether no request has come that is not answered yet."""
        return self._exchange is None

    def look(self, now_s: float) -> None:
        """Cut the connection off if the client takes too long."""
        num_taken = self._num_written - self._transport.get_write_buffer_size()
        if num_taken == self._num_written and now_s >= self._deadline_s:
            self._deadline_s = math.inf
            self._time_is_up()
            return
        if num_taken > self._num_taken:
            self._num_taken, self._taken_s = num_taken, now_s
        if num_taken >= self._num_due:
            self._num_due, self._due_since_s, self._taken_s = self._num_written, now_s, now_s
            return
        stands_still = self._is_stopping and now_s - self._taken_s > _STANDSTILL_S
        if stands_still or now_s - self._due_since_s > self._server.options.body_timeout_s:
            self.cut()

    def cut(self) -> None:
        """Close the connection immediately, and have the kernel forget what it still has to send."""
        self._deadline_s = math.inf
        self._server.waiting.pop(self, None)
        if not self._transport.is_closing() or self._transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # it is closed already
                linger_not = struct.pack("ii", 1, 0)
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger_not)
        self._transport.abort()

    def is_gone(self) -> bool:
        """Tell whether the client no longer waits for an answer."""
        return self._transport.is_closing() or self._loop.time() - self._ended_s > _HALF_CLOSED_S

    def write(self, data: bytes) -> None:
        """Send bytes, without waiting."""
        if not (self._is_lingering or self._transport.is_closing()):
            self._num_written += len(data)
            self._transport.write(data)

    def regulate(self) -> None:
        """Pause reading while enough has been read ahead, and resume it afterwards."""
        num_unread = 0 if self._exchange is None else self._exchange.num_unread
        is_enough = max(num_unread, self._reader.num_waiting) > _MAX_AHEAD_BYTES and not self._is_lingering
        if is_enough == self._is_paused or self._ended_s < math.inf or self._transport.is_closing():
            return
        self._is_paused = is_enough
        if is_enough:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def answered(self, exchange: Exchange) -> None:
        """Turn to the next request; the exchange calls this when its answer is written."""
        if self._is_lingering or self._transport.is_closing():
            return  # another answer was given while this one was made, or the client has gone
        self._server.waiting[self] = None
        if not exchange.is_complete or (self._reader.num_waiting and not exchange.keeps_alive):
            self._linger()
        elif not exchange.keeps_alive:
            self._transport.close()
        else:
            self._exchange = None
            self._await_next()
            self._handle_events()

    def _handle_events(self) -> None:
        """Handle what has come, as far as it can be answered now."""
        try:
            for _ in range(_EVENTS_PER_TURN):
                if not self._take_event():
                    break
            else:
                self._loop.call_soon(self._handle_events)
        except RefusedRequest as error:
            self._refuse(error.status, error.message)
            if self._exchange is not None:
                self._exchange.lose()
            self._linger()
        self.regulate()

    def _take_event(self) -> bool:
        """Handle the next event; whether there may be more."""
        exchange = self._exchange
        is_busy = self._cannot_write or (exchange is not None and exchange.is_complete)
        if is_busy or self._is_lingering or self._transport.is_closing():
            return False
        event = self._reader.next_event()
        if event is None:
            if exchange is None and self._ended_s < math.inf:
                self._transport.close()
            return False
        if type(event) is h11.Request:
            self._deadline_s, self._is_head_due = math.inf, False
            self._exchange = Exchange(event, self, self._server.date)
            task = self._loop.create_task(self._exchange.run(self._server.app))
            self._server.tasks.add(task)
            task.add_done_callback(self._server.tasks.discard)
            return True
        assert exchange is not None, "bodies come behind heads"
        if isinstance(event, bytes):
            exchange.body_came(event)
            return True
        self._server.waiting.pop(self, None)
        exchange.end_came()
        return False

    def _await_head(self) -> None:
        self._deadline_s, self._is_head_due = self._loop.time() + self._server.options.header_timeout_s, True

    def _await_next(self) -> None:
        self._is_head_due = False
        if self._cannot_write:
            self._deadline_s = math.inf  # first it must take what it was sent
        elif self._reader.num_waiting:
            self._await_head()
        else:
            self._deadline_s = self._loop.time() + self._server.options.keep_alive_s

    def _linger(self) -> None:
        """Close the connection, but first let a client that is still sending see the answer."""
        if self._ended_s < math.inf or self._is_stopping:
            self._transport.close()
            return
        self._is_lingering, self._reader = True, RequestReader()
        self._deadline_s = self._loop.time() + _LINGER_S
        self._transport.write_eof()
        self.regulate()

    def _time_is_up(self) -> None:
        if self._is_lingering:
            self._transport.abort()
            return
        if self._is_head_due:
            self._refuse(408, f"the headers did not come within {self._server.options.header_timeout_s:g} s")
        self._transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer something that is no request; the caller closes the connection next."""
        client = self.client[0] if self.client else None
        log_event(logging.INFO, "refused", status=int(status), message=message, client=client)
        self.write(error_bytes(status, message))
