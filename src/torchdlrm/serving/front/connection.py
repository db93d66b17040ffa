"""Handles one HTTP connection, with limits on what its client may send ahead and on the time that it may take.

In: bytes of a client.  Out: calls of an ASGI app, one request after another, and their answers.  h11 parses
(`reader.py`).  uvicorn listens, hands connections over, and waits for them at the end.  Its own protocols are not used:
they wait for clients that do not read, and the one on h11 costs too much.
Why: docs/decisions/http-connections-are-our-own.md.

A request is not looked at before the one ahead of it is answered; while an answer is not taken, nothing more is read.
`Connections.watch` looks at all connections a few times a second, instead of a timer for each: a client that takes too
long to send a head, to read an answer, or to send anything at all is cut off.  Near the limit of file descriptors the
client that has let the server wait for longest makes room for the next.

What of uvicorn is touched beyond its documentation: it calls what it has for its `http` class with `config`,
`server_state`, `app_state` and `_loop`, and `shutdown()` of each connection; `config.loaded_app`; it waits for
`server_state.connections` and `.tasks`, keeps the date in `.default_headers`, and shows `.total_requests`.
"""

import asyncio
import contextlib
import logging
import math
import resource
import socket
import struct
from typing import Any, Final, cast

import h11
from uvicorn import Config
from uvicorn.server import ServerState

from torchdlrm.serving.event_log import log_event
from torchdlrm.serving.front.exchange import Exchange, error_bytes
from torchdlrm.serving.front.reader import RequestReader, Unreadable
from torchdlrm.serving.options import ServeOptions

_LOOK_S: Final = 0.2
_EVENTS_PER_TURN: Final = 256  # then others have theirs
_MAX_AHEAD_BYTES: Final = 64 << 10  # read before they can be used, of a body or of later requests; then nothing more is
# What a client sends after its answer is read for a while: closed at once, it might never see the answer.
_LINGER_S: Final = 5.0
# Who has closed its side may still wait for the answer, or be gone: after this time it is taken to be gone.
_HALF_CLOSED_S: Final = 0.25
_STANDSTILL_S: Final = 2.0  # while the server stops: how long a client may take nothing of its answer
_SPARE_DESCRIPTORS: Final = 32
_SECONDS_BETWEEN_LINES: Final = 10.0


class Connections:
    """All connections of a process, and how long each may take."""

    def __init__(self, options: ServeOptions) -> None:
        self.options = options
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}  # for their clients, the longest first
        self._max_descriptor = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS
        self._num_other_descriptors: int | None = None  # when the first connection came
        self._num_given_up, self._next_line_s = 0, -math.inf

    def __call__(self, *, config: Config, server_state: ServerState, **_: Any) -> "Connection":
        """Make a connection; uvicorn calls this in place of a class."""
        return Connection(self, config, server_state)

    async def watch(self) -> None:
        """Cut off clients that take too long, for as long as this runs."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            for connection in list(self.open):
                connection.look(loop.time())

    async def await_requests(self, most_s: float) -> None:
        """Wait until each open connection has a request that is being answered, or so many seconds are over."""
        loop = asyncio.get_running_loop()
        end_s = loop.time() + most_s
        while loop.time() < end_s and any(connection.is_between_requests for connection in self.open):
            await asyncio.sleep(0.01)

    def make_room(self, descriptor: int, now_s: float) -> None:
        """See that there are file descriptors for the next client."""
        if self._num_other_descriptors is None:
            self._num_other_descriptors = descriptor  # the lowest that is free is taken: those below were in use
        if max(descriptor, self._num_other_descriptors + len(self.open)) <= self._max_descriptor:
            return
        longest = next(iter(self.waiting), None)
        if longest is not None:
            longest.cut()
        self._num_given_up += 1
        if now_s >= self._next_line_s:
            log_event(
                logging.WARNING,
                "file descriptors are running out",
                connections=len(self.open),
                cut_off=self._num_given_up,
                message="connections that waited longest for their clients are cut off; raise the limit (ulimit -n)",
            )
            self._num_given_up, self._next_line_s = 0, now_s + _SECONDS_BETWEEN_LINES


class Connection(asyncio.Protocol):
    """A connection from its first byte to its last; `Connections` makes them."""

    def __init__(self, connections: Connections, config: Config, state: ServerState) -> None:
        self._connections, self._app, self._state = connections, config.loaded_app, state
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
        self._connections.open.add(self)
        self._state.connections.add(self)  # type: ignore[arg-type]  # its own classes are named
        self._await_head()
        self._connections.waiting[self] = None
        self._connections.make_room(transport.get_extra_info("socket").fileno(), self._loop.time())

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - as asyncio calls it
        """Forget the connection; asyncio calls this when it is closed."""
        self._connections.open.discard(self)
        self._connections.waiting.pop(self, None)
        self._state.connections.discard(self)
        # Neither keeps the other, nor bytes that nobody will read, until the collector comes.
        exchange, self._exchange, self._reader = self._exchange, None, RequestReader()
        if exchange is not None:
            exchange.lose()

    def data_received(self, data: bytes) -> None:
        """Take bytes that have come."""
        if self._is_lingering:
            self._num_discarded += len(data)
            if self._num_discarded > self._connections.options.max_body_bytes:
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
        if stands_still or now_s - self._due_since_s > self._connections.options.body_timeout_s:
            self.cut()

    def cut(self) -> None:
        """Close the connection immediately, and have the kernel forget what it still has to send."""
        self._deadline_s = math.inf
        self._connections.waiting.pop(self, None)
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
        self._state.total_requests += 1
        if self._is_lingering or self._transport.is_closing():
            return  # another answer was given while this one was made, or nobody is there any more
        self._connections.waiting[self] = None
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
        except Unreadable as error:
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
        if isinstance(event, h11.Request):
            self._deadline_s, self._is_head_due = math.inf, False
            self._exchange = Exchange(event, self, self._state.default_headers)
            task = self._loop.create_task(self._exchange.run(self._app))
            self._state.tasks.add(task)
            task.add_done_callback(self._state.tasks.discard)
            return True
        assert exchange is not None, "bodies come behind heads"
        if isinstance(event, bytes):
            exchange.body_came(event)
            return True
        self._connections.waiting.pop(self, None)
        exchange.end_came()
        return False

    def _await_head(self) -> None:
        self._deadline_s, self._is_head_due = self._loop.time() + self._connections.options.header_timeout_s, True

    def _await_next(self) -> None:
        self._is_head_due = False
        if self._cannot_write:
            self._deadline_s = math.inf  # first it must take what it was sent
        elif self._reader.num_waiting:
            self._await_head()
        else:
            self._deadline_s = self._loop.time() + self._connections.options.keep_alive_s

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
            self._refuse(408, f"the headers did not come within {self._connections.options.header_timeout_s:g} s")
        self._transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """Answer something that is no request; the caller closes the connection next."""
        client = self.client[0] if self.client else None
        log_event(logging.INFO, "refused", status=int(status), message=message, client=client)
        self.write(error_bytes(status, message))
