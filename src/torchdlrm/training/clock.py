"""Wall time: how long something has run, and whether it is time again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Stopwatch:
    """Measures wall time that can be paused."""

    def __init__(self) -> None:
        self._banked_s = 0.0
        self._started_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the watch has been running."""
        return self._banked_s + (time.monotonic() - self._started_s if self._started_s is not None else 0.0)

    @contextmanager
    def running(self) -> Iterator[None]:
        """What happens inside is measured."""
        self._started_s = time.monotonic()
        try:
            yield
        finally:
            self._banked_s, self._started_s = self.elapsed_s, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not measured."""
        was_running = self._started_s is not None
        self._banked_s, self._started_s = self.elapsed_s, None
        try:
            yield
        finally:
            if was_running:
                self._started_s = time.monotonic()


class Timer:
    """Says when an interval has passed since it was last restarted.

    Args:
        interval_s: seconds; 0 for never.
    """

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self.restart()

    def restart(self) -> None:
        """Wait for a whole interval again."""
        self._started_s = time.monotonic()

    def is_due(self) -> bool:
        """Whether the interval has passed."""
        return self._interval_s > 0 and time.monotonic() - self._started_s >= self._interval_s
