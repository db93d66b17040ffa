"""Bodies that are still coming: a slow client must not take the place of others, nor fill the memory.

A request whose body comes in pieces does not count as under way before the last one.  Instead all such bodies together
have limits of their own; beyond, the one that has been coming for longest is given up, so that whoever sends a body in
two pieces a moment apart, as many clients do, is not refused because of those who take their time.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(eq=False, slots=True)
class _Coming:
    timeout: asyncio.Timeout
    num_bytes: int = 0
    is_given_up: bool = False


class Uploads:
    """The bodies of a process that have come in part.

    Args:
        max_bodies: so many at most.
        max_bytes: so much of all of them at most.
    """

    def __init__(self, *, max_bodies: int, max_bytes: int) -> None:
        self._max_bodies, self._max_bytes = max_bodies, max_bytes
        self._num_bytes = 0
        self._coming: dict[_Coming, None] = {}  # the oldest first

    @property
    def num_bodies(self) -> int:
        """How many there are."""
        return len(self._coming)

    @contextmanager
    def one(self, timeout: asyncio.Timeout) -> Iterator[Callable[[int], None]]:
        """Another body, until all of it has come.

        Args:
            timeout: ends the waiting for it; is made to end it at once where the body is given up.

        Returns:
            What is told of each piece's bytes.
        """
        body = _Coming(timeout)

        def came(num_bytes: int) -> None:
            body.num_bytes += num_bytes
            self._num_bytes += num_bytes
            if self._num_bytes > self._max_bytes:
                self._give_up_oldest()

        if len(self._coming) >= self._max_bodies:
            self._give_up_oldest()
        self._coming[body] = None
        try:
            yield came
        finally:
            del self._coming[body]
            self._num_bytes -= body.num_bytes

    def _give_up_oldest(self) -> None:
        waiting = (body for body in self._coming if not (body.is_given_up or body.timeout.expired()))
        oldest = next(waiting, None)
        if oldest is not None:
            oldest.is_given_up = True
            oldest.timeout.reschedule(asyncio.get_running_loop().time())
