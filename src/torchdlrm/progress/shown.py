"""Shows the progress of a job: a bar on a terminal and in a notebook, plain lines where standard error is a file.

In: the events of a `ProgressListener`.  Out, on a terminal: one bar, with the current values below it, and above it a
line for each phase that is over and for each note; in a notebook the same below the cell.  Out, elsewhere: a line when
a phase begins, every ten seconds, at each note and when it ends; no escapes and no carriage returns, so that a log of
nohup, CI or a cluster can be read.
"""

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from html import escape
from importlib import import_module
from typing import Any, Self

from rich.console import Console, Group
from rich.live import Live

from torchdlrm.progress import ProgressListener, in_notebook
from torchdlrm.progress.meter import Meter

LINE_EVERY_S = 10.0


@contextmanager
def shown_on(
    console: Console | None, on_phase: Callable[[Meter, float], None] | None = None
) -> Iterator[ProgressListener]:
    """Make a listener that shows on standard error how far a job is: a bar on a terminal, lines elsewhere.

    Args:
        console: of standard error; one of our own where a caller has none.
        on_phase: is given each phase that is over, and the seconds that it has taken in this process.
    """
    console = console or Console(stderr=True, highlight=False)
    # Not by the console's own word alone: FORCE_COLOR makes it take every file for a terminal.
    draws = sys.stderr is not None and sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
    with NotebookProgress() if in_notebook() else ProgressBars(console) if draws else ProgressLines() as shown:
        shown.on_phase = on_phase
        yield shown
        shown.finish()


class _Shown(ABC):
    """Follows the phases; how they are shown is its subclasses' matter. Safe for several threads."""

    def __init__(self) -> None:
        self.on_phase: Callable[[Meter, float], None] | None = None
        self._meter: Meter | None = None
        self._lock = threading.RLock()

    def start_phase(self, name: str, total: int | None, unit: str = "rows", done: int = 0) -> None:
        with self._lock:
            self.finish()
            self._meter = Meter(name, total, unit, done, time.monotonic())
            self._begun(self._meter)

    def advance(self, amount: int, **values: str) -> None:
        with self._lock:
            assert self._meter is not None, "advance() comes after start_phase()"
            self._meter.advance(amount, time.monotonic())
            if values:
                self._meter.values = self._meter.values | values  # a new one: the bar is drawn from another thread

    def note(self, line: str) -> None:
        with self._lock:
            self._write(line)

    def finish(self) -> None:
        """The last phase is over, and went well."""
        with self._lock:
            if self._meter is not None:
                meter, now_s, self._meter = self._meter, time.monotonic(), None
                self._write(meter.ends(now_s))
                if self.on_phase is not None:
                    self.on_phase(meter, meter.elapsed_s(now_s))

    @abstractmethod
    def _begun(self, meter: Meter) -> None:
        """Show that a phase has begun."""

    @abstractmethod
    def _write(self, line: str) -> None:
        """Show a line that stays."""


class ProgressBars(_Shown):
    """Draws a bar, and keeps what is over above it. A context manager: the bar goes with it."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._live = Live(console=console, get_renderable=self._bar, refresh_per_second=5, transient=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def _bar(self) -> Group:
        # Without our lock: the thread that has it may be waiting for the console, which is ours now.
        meter = self._meter
        return Group() if meter is None else meter.bar(self._console.width, time.monotonic())

    def _begun(self, meter: Meter) -> None:
        """Do nothing: the bar shows it."""

    def _write(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


class _Ticking(_Shown):
    """Shows the state again and again, from a thread: a phase whose single task takes an hour must not look dead."""

    def __init__(self, every_s: float) -> None:
        super().__init__()
        self._every_s = every_s
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._tell, name="torchdlrm-progress", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _tell(self) -> None:
        while not self._is_over.wait(self._every_s):
            with self._lock:
                if self._meter is not None:
                    self._tick(self._meter)

    @abstractmethod
    def _tick(self, meter: Meter) -> None:
        """Show how far the phase is."""


class ProgressLines(_Ticking):
    """Writes plain lines, with the time of day. A context manager: the lines end with it."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        super().__init__(every_s)

    def _begun(self, meter: Meter) -> None:
        self._write(meter.begins())

    def _tick(self, meter: Meter) -> None:
        self._write(meter.status(time.monotonic()))

    def _write(self, line: str) -> None:
        if sys.stderr is None:  # the command was started with it closed
            return
        # A full disk, or a reader that has gone, must not end the job that is shown.
        with suppress(OSError):
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")
            sys.stderr.flush()


class NotebookProgress(_Ticking):
    """Draws a bar below a notebook's cell, and keeps what is over above it. A context manager: the bar goes with it."""

    def __init__(self) -> None:
        super().__init__(every_s=0.5)
        self._lines: list[str] = []
        self._ipython: Any = import_module("IPython.display")  # a notebook's kernel has it, and nothing else needs it
        self._cell = self._ipython.display(self._ipython.HTML(""), display_id=True)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._draw("")

    def _begun(self, meter: Meter) -> None:
        self._tick(meter)

    def _tick(self, meter: Meter) -> None:
        value = "" if meter.total is None else f' value="{meter.done}" max="{meter.total}"'
        self._draw(f"<progress{value}></progress> <code>{escape(meter.status(time.monotonic()))}</code>")

    def _write(self, line: str) -> None:
        self._lines.append(line)
        self._draw("")

    def _draw(self, bar: str) -> None:
        lines = escape("\n".join(self._lines))
        self._cell.update(self._ipython.HTML(f"<pre>{lines}</pre>{bar}"))
