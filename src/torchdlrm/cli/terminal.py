"""What all commands share: people read standard error, programs read one JSON object on standard output."""

import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.console import Console
from rich.markup import escape

from torchdlrm.cli.progress import ProgressBars, ProgressLines
from torchdlrm.progress import ProgressListener

console = Console(stderr=True, highlight=False)

# `as_json: Json = False`, last of a command's options: print one JSON object on standard output.
Json = Annotated[bool, Parameter(name="--json", negative="")]
Positive = Annotated[int, Parameter(validator=Number(gte=1))]


def print_json(result: Mapping[str, object]) -> None:
    """Write the one JSON object that `--json` promises."""
    sys.stdout.write(json.dumps(_without_nan(result), allow_nan=False) + "\n")
    sys.stdout.flush()


def announce(job: str) -> None:
    """Say at once on a terminal what is being done: torch takes seconds to load."""
    if console.is_terminal:
        console.print(f"{job} ...", markup=False, soft_wrap=True)


def warn(message: str) -> None:
    """Write a line that people should read before they go on."""
    console.print(f"[yellow]warning[/]: {escape(message)}", soft_wrap=True)


def shown_metric(value: float | None, digits: int = 5) -> str:
    """A metric as it stands in a table; a dash where it is not defined."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def say_undefined(metrics: Mapping[str, Any], of: str = "") -> None:
    """Say why AUC and NE are not there, if they are not; `of` names the rows."""
    from torchdlrm.metrics import why_undefined

    if why := why_undefined(metrics):
        console.print(f"AUC and NE are undefined{of}: {why}", markup=False, soft_wrap=True)


@contextmanager
def progress_bars(description: str) -> Iterator[ProgressListener]:
    """A listener that tells people on standard error how far a job is; `description` names the whole job."""
    if description:
        console.print(description, markup=False, soft_wrap=True)
    # Not by the console's own word alone: FORCE_COLOR makes it take every file for a terminal.
    draws = sys.stderr is not None and sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
    with ProgressBars(console) if draws else ProgressLines() as shown:
        yield shown
        shown.finish()


def _without_nan(value: object) -> object:
    """What is not defined is null: JSON has no NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
