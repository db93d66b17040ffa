"""Lets a long job report its progress: drawn by the command line and where a person looks, ignored elsewhere."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


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
    """Listens to nothing."""

    def start_phase(self, *_: Any, **__: Any) -> None:
        """Ignored."""

    advance = note = start_phase


SILENT = SilentProgress()


@contextmanager
def noting_if_slow(progress: ProgressListener, line: str, *, after_s: float) -> Iterator[None]:
    """Note a line, from a thread, where what happens inside takes longer than `after_s` seconds."""
    timer = threading.Timer(after_s, progress.note, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@contextmanager
def watched(progress: ProgressListener | bool | None) -> Iterator[ProgressListener]:  # noqa: FBT001 - as functions have it
    """Make the listener of a function's `progress`: True or None draws on standard error where a person looks.

    False draws nothing. A person looks at a terminal and at a notebook, and of several processes at the first one.
    """
    if not isinstance(progress, bool | None):
        yield progress
    elif progress is not False and os.environ.get("RANK", "0") == "0" and (_is_terminal() or in_notebook()):
        from torchdlrm.progress.shown import shown_on  # noqa: PLC0415 - rich is for those who see it

        with shown_on(None) as shown:
            yield shown
    else:
        yield SILENT


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def in_notebook() -> bool:
    """Whether the kernel of a notebook runs this process; an IPython without one has a terminal, or no reader."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return kernel is not None and bool(kernel.IPKernelApp.initialized())
