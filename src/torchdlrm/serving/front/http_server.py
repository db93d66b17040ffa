"""Listens for HTTP, and sees to it that no client takes too much time, or a place that others need.

In: an ASGI app and a listening socket.  Out: connections (`connection.py`), until `stop`.  All of them are looked at a
few times a second, instead of a timer for each: a client that takes too long to send a head, to read an answer, or to
send anything at all is cut off.  Near the limit of file descriptors the client that has let the server wait for longest
makes room for the next.  Why not uvicorn: docs/decisions/http-connections-are-our-own.md.
"""

import asyncio
import contextlib
import ctypes
import logging
import math
import resource
import select
import socket
import struct
from email.utils import formatdate
from typing import Any, Final

from starlette.types import ASGIApp

from torchdlrm.serving.event_log import log_event
from torchdlrm.serving.front.connection import Connection
from torchdlrm.serving.options import ServeOptions

_LOOK_S: Final = 0.2
_SPARE_DESCRIPTORS: Final = 32
_SECONDS_BETWEEN_LINES: Final = 10.0
# A filter of packets (classic BPF): those of TCP with the flag SYN, bit 1 of byte 13, are dropped, all others pass.
_DROP_SYN: Final = struct.pack(4 * "HBBI", 0x30, 0, 0, 13, 0x45, 0, 1, 2, 0x06, 0, 0, 0, 0x06, 0, 0, 0xFFFFFFFF)
_SO_ATTACH_FILTER: Final = 26
_HANDSHAKE_S: Final = 0.01
_LAST_REQUESTS_S: Final = 0.5


class HttpServer:
    """All connections of a process.

    Attributes:
        open: the connections.
        waiting: those that wait for their clients, the longest first.
        tasks: the requests that are being answered.
        date: the header that every answer has.
    """

    def __init__(self, app: ASGIApp, options: ServeOptions) -> None:
        self.app, self.options = app, options
        self.open: set[Connection] = set()
        self.waiting: dict[Connection, None] = {}
        self.tasks: set[asyncio.Task[Any]] = set()
        self.date = _date()
        self._max_descriptor = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS
        self._num_other_descriptors: int | None = None  # when the first connection came
        self._num_given_up, self._next_line_s = 0, -math.inf

    async def start(self, listener: socket.socket) -> None:
        """Accept clients of a socket that listens."""
        loop = asyncio.get_running_loop()
        # Answers are small: a client that does not take them need not fill megabytes of the kernel's memory.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 256 << 10)
        self._listener = listener
        self._accepting = await loop.create_server(lambda: Connection(self), sock=listener, backlog=2048)
        self._watching = loop.create_task(self._watch())

    async def stop(self, timeout_s: float) -> None:
        """Take no more clients, and give those that are connected a moment to ask; answer them for up to that time."""
        loop = asyncio.get_running_loop()
        await self._refuse_clients()
        end_s = loop.time() + _LAST_REQUESTS_S
        while loop.time() < end_s and any(connection.is_between_requests for connection in self.open):
            await asyncio.sleep(0.01)
        for connection in list(self.open):
            connection.shutdown()
        end_s = loop.time() + timeout_s
        while loop.time() < end_s and (self.open or self.tasks):
            await asyncio.sleep(0.01)
        for task in self.tasks:
            task.cancel()
        self._watching.cancel()

    async def _refuse_clients(self) -> None:
        """Accept the clients that have connected, and no more.

        A queue that is closed resets the connections in it.  So no client gets into it while it is emptied: one that
        tries just then tries again after a second, as TCP does, and is refused.
        """
        with contextlib.suppress(OSError):  # where the kernel knows no filters
            program = ctypes.create_string_buffer(_DROP_SYN)
            filter_ = struct.pack("HP", 4, ctypes.addressof(program))
            self._listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter_)
        await asyncio.sleep(_HANDSHAKE_S)
        queue = select.poll()
        queue.register(self._listener, select.POLLIN)
        while queue.poll(0):
            await asyncio.sleep(0)  # the loop accepts a client a turn
        self._accepting.close()

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_S)
            self.date = _date()
            for connection in list(self.open):
                connection.look(loop.time())

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


def _date() -> tuple[bytes, bytes]:
    return b"date", formatdate(usegmt=True).encode()
