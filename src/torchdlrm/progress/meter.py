"""Shows how far a phase of a job is, how fast and for how long, as a bar and as lines of text."""

from collections import deque

from rich.console import Group
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchdlrm.units import show_bytes, show_count

# The rate is that of the last minute: it follows a change, and a slow task does not make it jump.
_WINDOW_S = 60.0
# Over less than this no rate is shown: it would be that of a clock.
_LEAST_S = 0.5
_BAR_CHARACTERS = 12  # at least


class Meter:
    """How far a phase is, how fast, and how long it will take.

    Args:
        name: of the phase.
        total: units of work, None when unknown.
        unit: what is counted.
        done: what an earlier process has done; takes part in the fraction and not in the rate.
        now_s: the time, by any clock that only moves forward.
    """

    def __init__(self, name: str, total: int | None, unit: str, done: int, now_s: float) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.values: dict[str, str] = {}
        self._before, self._started_s = done, now_s
        self._samples = deque([(now_s, done)])

    def advance(self, amount: int, now_s: float) -> None:
        """Count what has been done."""
        self.done += amount
        # At most one sample a second, besides the newest.
        if len(self._samples) > 2 and now_s - self._samples[-2][0] < 1:
            self._samples.pop()
        self._samples.append((now_s, self.done))
        while len(self._samples) > 2 and self._samples[1][0] <= now_s - _WINDOW_S:
            self._samples.popleft()

    @property
    def fraction(self) -> float | None:
        """What is done of the total, at most 1."""
        return min(self.done / self.total, 1.0) if self.total else None

    @property
    def per_s(self) -> float | None:
        """Units a second of late, None while it is too early to tell."""
        (start_s, before), (end_s, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end_s - start_s) if end_s - start_s >= _LEAST_S else None

    @property
    def left_s(self) -> float | None:
        """How long the rest will take at this rate."""
        rate = self.per_s
        return max(self.total - self.done, 0) / rate if self.total is not None and rate else None

    def elapsed_s(self, now_s: float) -> float:
        """Return the time since the phase began in this process."""
        return now_s - self._started_s

    def begins(self) -> str:
        """Return the line that is written when the phase begins."""
        if self.total is None:
            return f"{self.name}: begins"
        if self._before >= self.total > 0:
            return f"{self.name}: nothing is left of {_counted(self.total, self.unit)}"
        done = f"resumes after {_counted(self._before, self.unit)} of" if self._before else "begins,"
        return f"{self.name}: {done} {_counted(self.total, self.unit)}"

    def status(self, now_s: float) -> str:
        """Return the line that is written while the phase runs."""
        percent = "" if self.fraction is None else f" ({_percent(self.fraction)})"
        rate = self.per_s
        parts = [f"{self.name}: {self._done_of_total()}{percent}"]
        parts += [] if rate is None else [_speed(rate, self.unit)]
        parts += [f"{_clock(self.elapsed_s(now_s))} gone"]
        parts += [] if self.left_s is None else [f"{_clock(self.left_s)} left"]
        return ", ".join([*parts, *(f"{name} {value}" for name, value in self.values.items())])

    def _done_of_total(self) -> str:
        if self.total is None:
            return _counted(self.done, self.unit)
        done = show_bytes(self.done) if self.unit == "bytes" else f"{self.done:,}"
        return f"{done} of {_counted(self.total, self.unit)}"

    def ends(self, now_s: float) -> str:
        """Return the line that is written when the phase is over: what this process has done."""
        amount, seconds = self.done - self._before, self.elapsed_s(now_s)
        rate = f", {_speed(amount / seconds, self.unit)}" if seconds >= _LEAST_S else ""
        lasted = f"{seconds:.1f} s" if seconds < 60 else _clock(seconds)
        return f"{self.name}: done, {_counted(amount, self.unit)} in {lasted}{rate}"

    def bar(self, width: int, now_s: float) -> Group:
        """Return the bar and its values in this many characters; without room for all, the least needed go first."""
        percent = "" if self.fraction is None else _percent(self.fraction)
        count = _short(self.done, self.total, self.unit)
        rate = "" if self.per_s is None else _speed(self.per_s, self.unit, brief=True)
        gone = f"{_clock(self.elapsed_s(now_s))} gone"
        left = "" if self.left_s is None else f"{_clock(self.left_s)} left"
        shown = [percent, count, rate, gone, left]
        for droppable in ("", gone, count, rate):
            shown = [part for part in shown if part and part != droppable]
            room = width - len(self.name) - 2 - sum(len(part) + 2 for part in shown)
            if room >= _BAR_CHARACTERS:
                break
        drawn = ProgressBar(
            total=self.total or 1, completed=self.done, width=max(min(room, 40), 4), pulse=self.total is None
        )
        line = Table.grid(padding=(0, 2, 0, 0), pad_edge=False)
        line.add_row(Text(self.name, no_wrap=True), drawn, *(Text(part, no_wrap=True) for part in shown))
        values = "  ".join(f"{name} {value}" for name, value in self.values.items())
        return Group(line, Text(values, no_wrap=True, overflow="ellipsis")) if values else Group(line)


def _counted(amount: float, unit: str) -> str:
    return show_bytes(amount) if unit == "bytes" else f"{amount:,.0f} {unit}"


def _brief(amount: float, unit: str) -> str:
    """Return an amount as short as a bar has room for."""
    return show_bytes(amount) if unit == "bytes" else f"{show_count(amount)} {unit}"


def _speed(per_s: float, unit: str, *, brief: bool = False) -> str:
    """Units a second; a minute where a second has none."""
    if unit != "bytes" and 0 < per_s < 1:
        return f"{60 * per_s:.2g} {unit}/min"
    return f"{(_brief if brief else _counted)(per_s, unit)}/s"


def _short(done: int, total: int | None, unit: str) -> str:
    """`12/39.3M rows`; of sizes the unit once where both have the same."""
    if total is None:
        return _brief(done, unit)
    if unit != "bytes":
        return f"{show_count(done)}/{show_count(total)} {unit}"
    left, right = show_bytes(done).split(), show_bytes(total).split()
    return f"{left[0] if left[1] == right[1] else ' '.join(left)}/{' '.join(right)}"


def _percent(fraction: float) -> str:
    return f"{int(100 * fraction)} %"  # rounded down: 100 % is the end


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}"
