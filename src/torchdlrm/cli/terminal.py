"""Writes the output that all commands share: standard error is for people, JSON on standard output for programs."""

import json
import math
import os
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torchdlrm.errors import Interrupted
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.progress.shown import shown_on
from torchdlrm.storage.places import with_urls
from torchdlrm.units import show_number

if TYPE_CHECKING:
    from torchdlrm.progress.meter import Meter
    from torchdlrm.training.processes.launch import Processes

T = TypeVar("T")
_MOST_SLICES = 20  # that are shown


class _Console(Console):
    """Writes to people: where a path stands for a URL, the URL."""

    def print(self, *objects: Any, **settings: Any) -> None:
        super().print(*(with_urls(found) if isinstance(found, str) else found for found in objects), **settings)


console = _Console(stderr=True, highlight=False)


def say(line: str) -> None:
    """Write a line to people, as it is: nothing in it is markup, and it is not wrapped."""
    console.print(line, markup=False, soft_wrap=True)


def say_next(command: str, *paths: Path | str | None) -> None:
    """Say which command comes next; `{}` in it are the paths, quoted as a shell wants them."""
    say(f"next: {command.format(*(shlex.quote(str(path)) for path in paths))}")


def print_table(
    title: str,
    rows: Sequence[Mapping[str, str]],
    columns: Sequence[str] = (),
    *,
    left_aligned: Collection[str] = (),
    droppable: Collection[str] = (),
    cut: Collection[str] = (),
) -> None:
    """Write rows as a table, numbers to the right; nothing where there are none.

    Args:
        title: above it.
        rows: text by column; what a row lacks stays empty.
        columns: which to show; those of the first row when not given.
        left_aligned: columns of text, which break where they are too long; the first is text also without.
        droppable: columns that are left out where the terminal is too narrow for all.
        cut: columns of text that have what width the others leave, and a line a row; the others stand close together.
    """
    if not rows:
        return

    def table_of(columns: Sequence[str]) -> Table:
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        table.expand, table.padding = bool(cut), 0 if cut else (0, 1, 0, 0)
        for index, name in enumerate(columns):
            is_text = name in left_aligned or name in cut
            table.add_column(
                name,
                justify="left" if index == 0 or is_text else "right",
                no_wrap=name not in left_aligned,
                ratio=1 if name in cut else None,
            )
        for row in rows:
            table.add_row(*(escape(with_urls(row.get(name, ""))) for name in columns))
        return table

    columns = columns or list(rows[0])
    table = table_of(columns)
    if console.measure(table, options=console.options.update(max_width=1000)).maximum > console.width:
        table = table_of([name for name in columns if name not in droppable])
    console.print(table)


def print_slices(slices: Sequence[Mapping[str, Any]], of: str = "") -> None:
    """Write slices of rows as `Slice.as_json` has them, and how many of them are worse by more than chance."""
    from torchdlrm.judging.slices import slice_table
    from torchdlrm.metrics import metrics_in

    worse = sum(part["is_worse"] for part in slices)
    title = f"{of}{len(slices)} slices, worst first; {worse} worse by more than chance explains"
    droppable = ["click rate", *(metric.label for metric in metrics_in("table") if not metric.is_relative)]
    print_table(title, slice_table(slices[:_MOST_SLICES]), left_aligned=("slice", "worse by"), droppable=droppable)
    if len(slices) > _MOST_SLICES:
        say(f"and {len(slices) - _MOST_SLICES} more, which --json has, too")


def say_facts(title: str, facts: Mapping[str, str]) -> None:
    """Say a title, and below it each fact behind its name; nothing where there are none."""
    if facts and title:
        say(title)
    width = max(map(len, facts), default=0) + 2
    for name, value in facts.items():
        first, *others = value.splitlines() or [""]
        for label, line in ((name, first), *(("", other) for other in others)):
            say(f"  {label:<{width}}{line}")


def print_json(result: Mapping[str, object]) -> None:
    """Write the one JSON object that `--json` promises."""
    sys.stdout.write(with_urls(json.dumps(_without_nan(result), allow_nan=False)) + "\n")
    sys.stdout.flush()


def announce(job: str) -> None:
    """Say at once on a terminal what is being done: torch takes seconds to load."""
    if console.is_terminal:
        say(f"{job} ...")


def warn(message: str) -> None:
    """Write a line that people should read before they continue."""
    console.print(f"[yellow]warning[/]: {escape(message)}", soft_wrap=True)


def look_at(judgements: Iterable[str]) -> None:
    """Write what a person should look at, a line each."""
    for line in judgements:
        console.print(f"[yellow]look[/]: {escape(line)}", soft_wrap=True)


def warn_of_crowding(processes: "Processes") -> None:
    """Warn where this machine has fewer cores than `--nproc-per-node` asks for."""
    if processes.crowding:
        warn(f"--nproc-per-node {processes.nproc_per_node}: {processes.crowding}")


def metric_cells(metrics: Mapping[str, float | None], digits: int = 5) -> dict[str, str]:
    """Format the metrics of the place `table` by name; a dash where one is not defined or not known."""
    from torchdlrm.metrics import metrics_in

    return {metric.name: show_number(metrics.get(metric.name), digits) for metric in metrics_in("table")}


def say_undefined(metrics: Mapping[str, Any], of: str = "") -> None:
    """Say why AUC and NE are not there, if they are not; `of` names the rows."""
    from torchdlrm.metrics import why_undefined

    if why := why_undefined(metrics):
        say(f"AUC and NE are undefined{of}: {why}")


@contextmanager
def progress_bars(
    description: str, on_phase: Callable[["Meter", float], None] | None = None
) -> Iterator[ProgressListener]:
    """Make a listener that shows on standard error how far a job is; `description` names the whole job."""
    if description:
        say(description)
    with shown_on(console, on_phase) as shown:
        yield shown


@contextmanager
def saying_at_ctrl_c(message: str) -> Iterator[None]:
    """Inside, an interruption ends the command with this message."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise Interrupted(message) from interrupt


def drawn(job: Callable[..., T]) -> T:
    """Call what takes `progress`; of the processes in which `launch` does this, only the first one draws."""
    with progress_bars("") if os.environ.get("RANK", "0") == "0" else nullcontext(SILENT) as progress:
        return job(progress=progress)


def _without_nan(value: object) -> object:
    """What is not defined is null: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
