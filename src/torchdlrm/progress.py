"""Lets a long job report its progress; the command line draws it, and a script may ignore it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class ProgressListener(Protocol):
    """Receives the progress of a job that has phases, one after the other."""

    def start_phase(self, name: str, total: int | None, unit: str = "rows", done: int = 0) -> None:
        """A phase begins (and the one before it, if any, is over).

        Args:
            name: of the phase.
            total: units of work, None when unknown.
            unit: what is counted; `bytes` are shown as sizes.
            done: how much of it an earlier process has done, and no time of this one.
        """

    def advance(self, amount: int, **values: str) -> None:
        """`amount` more units are done; `values` are shown below the bar, for example `loss="0.4512"`."""

    def note(self, line: str) -> None:
        """Something happened that is worth a line that stays, for example a validation."""


class SilentProgress:
    """Listens to nothing: the default in the library."""

    def start_phase(self, name: str, total: int | None, unit: str = "rows", done: int = 0) -> None:
        """Ignored."""

    def advance(self, amount: int, **values: str) -> None:
        """Ignored."""

    def note(self, line: str) -> None:
        """Ignored."""


SILENT = SilentProgress()


@contextmanager
def noting_if_slow(progress: ProgressListener, line: str, *, after_s: float) -> Iterator[None]:
    """Note a line, from a thread, where what happens inside takes longer than so many seconds."""
    timer = threading.Timer(after_s, progress.note, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
