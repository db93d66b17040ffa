"""What all verbs share: people read standard error, programs read one JSON object on standard output."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from torchdlrm.progress import ProgressListener

console = Console(stderr=True, highlight=False)


def print_json(result: Mapping[str, object]) -> None:
    """Write the one JSON object that `--json` promises."""
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()


class _SpeedColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed_per_s = task.finished_speed or task.speed
        unit = task.fields["unit"]
        return Text("" if speed_per_s is None else f"{speed_per_s:,.0f} {unit}/s", style="progress.data.speed")


class _ProgressBars:
    """Draws a bar for each phase of a job."""

    def __init__(self, bars: Progress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def start_phase(self, name: str, total: int | None, unit: str = "rows") -> None:
        self._close_phase()
        self._task = self._bars.add_task(name, total=total, unit=unit, figures="")

    def advance(self, amount: int, **figures: str) -> None:
        assert self._task is not None, "advance() comes after start_phase()"
        self._bars.advance(self._task, amount)
        if figures:
            self._bars.update(self._task, figures="  ".join(f"{name} {value}" for name, value in figures.items()))

    def _close_phase(self) -> None:
        if self._task is not None:
            task = self._bars.tasks[self._task]
            self._bars.update(self._task, total=task.completed, completed=task.completed)


@contextmanager
def progress_bars(description: str) -> Iterator[ProgressListener]:
    """A listener that draws bars with speed and time left on standard error; `description` names the whole job."""
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        _SpeedColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if description:
        console.print(description)
    # No bars into a file or a pipe: there they would be noise; the summary at the end says it all.
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        listener = _ProgressBars(bars)
        yield listener
        listener._close_phase()
