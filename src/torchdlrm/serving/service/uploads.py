"""Limits what may come slowly: bodies of which a part has arrived.

A slow client must not take the place of others, nor fill the memory: a request whose body comes in pieces is not
counted as being answered before its last piece.  Instead all such bodies together have limits of their own; beyond, the
one that has been coming for longest is given up, so that a client that sends a body in two pieces a moment apart, as
many do, is not refused because of others that take their time.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _PartialBody:
    timeout: asyncio.Timeout
    num_bytes: int = 0
    is_given_up: bool = False


class Uploads:
    """The bodies of a process that have come in part: no more than `max_bodies`, and `max_bytes` in all of them."""

    def __init__(self, *, max_bodies: int, max_bytes: int) -> None:
        self._max_bodies, self._max_bytes = max_bodies, max_bytes
        self._num_bytes = 0
        self._bodies: dict[_PartialBody, None] = {}  # the oldest first

    @property
    def num_bodies(self) -> int:
        """The number of bodies that have come in part."""
        return len(self._bodies)

    @contextmanager
    def track(self, timeout: asyncio.Timeout) -> Iterator[Callable[[int], None]]:
        """Register another body until all of it has come.

        Args:
            timeout: ends the waiting for it; is made to end it immediately where the body is given up.

        Returns:
            A function to call with the number of bytes of each piece.
        """
        body = _PartialBody(timeout)

        def count(num_bytes: int) -> None:
            body.num_bytes += num_bytes
            self._num_bytes += num_bytes
            if self._num_bytes > self._max_bytes:
                self._give_up_oldest()

        if len(self._bodies) >= self._max_bodies:
            self._give_up_oldest()
        self._bodies[body] = None
        try:
            yield count
        finally:
            del self._bodies[body]
            self._num_bytes -= body.num_bytes

    def _give_up_oldest(self) -> None:
        waiting = (body for body in self._bodies if not (body.is_given_up or body.timeout.expired()))
        oldest = next(waiting, None)
        if oldest is not None:
            oldest.is_given_up = True
            oldest.timeout.reschedule(asyncio.get_running_loop().time())
