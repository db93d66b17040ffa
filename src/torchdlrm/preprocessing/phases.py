"""Keeps the time of each phase of a job, for the summary, and passes everything on to a listener."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from torchdlrm.progress import ProgressListener


@dataclass
class PhaseTime:
    """How long a phase took for how much; work that an earlier run had done already takes no time and counts."""

    name: str
    amount: int
    unit: str
    seconds: float

    @property
    def per_s(self) -> float:
        """Units a second."""
        return self.amount / self.seconds if self.seconds else 0.0


class PhaseTimes:
    """A listener that notes the times of the phases, and tells `on_phase` of each that is over."""

    def __init__(self, listener: ProgressListener, on_phase: Callable[[PhaseTime], None] | None = None) -> None:
        self.phases: list[PhaseTime] = []
        self._listener = listener
        self._on_phase = on_phase
        self._started_at_s = 0.0

    def start_phase(self, name: str, total: int | None, unit: str = "rows", done: int = 0) -> None:
        """A phase begins."""
        self.finish()
        self.phases.append(PhaseTime(name, done, unit, 0.0))
        self._started_at_s = time.perf_counter()
        self._listener.start_phase(name, total, unit, done)

    def advance(self, amount: int, **figures: str) -> None:
        """More is done."""
        self.phases[-1].amount += amount
        self._listener.advance(amount, **figures)

    def note(self, line: str) -> None:
        """Passed on."""
        self._listener.note(line)

    def finish(self) -> None:
        """The last phase is over."""
        if self.phases and not self.phases[-1].seconds:
            self.phases[-1].seconds = time.perf_counter() - self._started_at_s
            if self._on_phase is not None:
                self._on_phase(self.phases[-1])
