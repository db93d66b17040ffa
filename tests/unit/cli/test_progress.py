"""What people see of a job: the figures, the bar at 80 columns, the lines into a file."""

import io
import re
import sys
import threading

import pytest
from rich.console import Console

from torchdlrm.progress import noting_if_slow
from torchdlrm.progress.meter import Meter
from torchdlrm.progress.shown import ProgressBars, ProgressLines


def drawn(meter, now_s, width=80):
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(meter.bar(width, now_s))
    return console.file.getvalue().rstrip("\n").split("\n")


def test_a_rate_is_that_of_the_last_minute_and_what_an_earlier_process_did_is_not_in_it():
    meter = Meter("train", 40_000, "rows", 20_000, now_s=0.0)
    assert meter.begins() == "train: resumes after 20,000 rows of 40,000 rows"
    for second in range(1, 101):
        meter.advance(10, float(second))
    for second in range(101, 201):
        meter.advance(100, float(second))
    assert meter.per_s == pytest.approx(100.0)
    assert meter.left_s == pytest.approx(9_000 / 100)
    assert meter.status(200.0) == "train: 31,000 of 40,000 rows (77 %), 100 rows/s, 0:03:20 gone, 0:01:30 left"
    assert meter.ends(200.0) == "train: done, 11,000 rows in 0:03:20, 55 rows/s"


def test_work_that_comes_at_once_has_no_rate_rather_than_an_impossible_one():
    meter = Meter("write", 4_000_000, "rows", 0, now_s=0.0)
    for i in range(1000):
        meter.advance(4_000, i * 1e-9)
    assert meter.per_s is None
    assert "rows/s" not in meter.status(1e-6) + meter.ends(1e-6) + drawn(meter, 1e-6)[0]


def test_one_task_that_takes_long_is_no_rate_of_zero():
    meter = Meter("count", 1_000, "values", 0, now_s=0.0)
    meter.advance(300, 300.0)
    meter.advance(300, 600.0)
    assert meter.status(890.0) == "count: 600 of 1,000 values (60 %), 1 values/s, 0:14:50 gone, 0:06:40 left"


def test_what_takes_more_than_a_second_is_told_by_the_minute():
    meter = Meter("learn", 21, "models", 0, now_s=0.0)
    meter.advance(2, 40.0)
    assert "(9 %), 3 models/min, " in meter.status(40.0)
    assert meter.ends(40.0) == "learn: done, 2 models in 40.0 s, 3 models/min"


def test_sizes_are_told_in_human_units():
    meter = Meter("read", 274_262_334_812, "bytes", 0, now_s=0.0)
    meter.advance(101_000_000_000, 100.0)
    assert meter.status(100.0) == "read: 101 GB of 274.3 GB (36 %), 1.01 GB/s, 0:01:40 gone, 0:02:51 left"


@pytest.mark.parametrize("width", [80, 100, 200])
@pytest.mark.parametrize(
    ("name", "total", "unit"),
    [
        ("train", 39_291_958, "rows"),
        ("train", 4_000_000_000_000, "rows"),
        ("read", 274_262_334_812, "bytes"),
        ("try the choice (1)", 100_000, "rows"),
        ("look for remedies", 24, "ideas"),
        ("download 24 files", None, "bytes"),
    ],
)
def test_a_bar_fits_the_terminal_with_whole_counts_and_labelled_clocks(name, total, unit, width):
    meter = Meter(name, total, unit, 0, now_s=0.0)
    meter.advance(total or 1_000_000_000_000, 10_000.0)
    line = drawn(meter, 10_000.0, width)[0]
    assert len(line) <= width
    assert "…" not in line
    assert line.count("━") + line.count("╸") + line.count("╺") >= 12, line
    clocks = re.findall(r"\d+:\d\d:\d\d (\w+)", line)
    assert clocks in ([["left"], ["gone", "left"]] if total and width == 80 else [["gone", *["left"] * bool(total)]])
    assert re.search(rf" ({unit}|[kMGT]B)/{'min' if unit == 'ideas' else 's'}", line), line


class StandardError(io.StringIO):
    """Stands in for standard error, not a terminal."""

    def __init__(self):
        super().__init__()
        self.written = threading.Condition()

    def flush(self):
        with self.written:
            self.written.notify_all()

    def has_line(self, text):
        """Wait for a line."""
        with self.written:
            return self.written.wait_for(lambda: text in self.getvalue(), timeout=30)


def test_a_file_gets_lines_at_the_begin_at_intervals_at_notes_and_at_the_end(monkeypatch):
    file = StandardError()
    monkeypatch.setattr(sys, "stderr", file)
    with ProgressLines(every_s=0.01) as progress:
        progress.start_phase("read", 200, "rows")
        progress.advance(100, loss="0.5")
        assert file.has_line("read: 100 of 200 rows (50 %), 0:00:00 gone, loss 0.5\n"), "also while nothing is done"
        progress.note("step 7")
        progress.start_phase("write", None, "rows")
        progress.finish()
    lines = [line.partition(" ") for line in file.getvalue().splitlines()]
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", clock) for clock, _, _ in lines)
    told = [text for _, _, text in lines if " gone" not in text]
    assert told == [
        "read: begins, 200 rows",
        "step 7",
        "read: done, 100 rows in 0.0 s",
        "write: begins",
        "write: done, 0 rows in 0.0 s",
    ]
    assert not [thread for thread in threading.enumerate() if thread.name == "torchdlrm-progress"]


@pytest.mark.parametrize("gone", ["closed", "full"])
def test_what_cannot_be_told_ends_nothing(gone, monkeypatch):
    class Full(io.StringIO):
        def write(self, _):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", None if gone == "closed" else Full())
    with ProgressLines() as progress:
        progress.start_phase("read", 200, "rows")
        progress.note("step 7")
    assert not [thread for thread in threading.enumerate() if thread.name == "torchdlrm-progress"]


def test_notes_and_the_drawing_thread_do_not_wait_for_each_other():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with ProgressBars(console) as bars:
        bars._live.refresh_per_second = 1_000
        bars._live._refresh_thread.refresh_per_second = 1_000
        bars.start_phase("train", 1_000)
        for i in range(1_000):
            bars.advance(1, loss=str(i))
            bars.note(f"step {i}")
    assert console.file.getvalue().count("step ") == 1_000


def test_what_takes_long_is_explained_and_what_does_not_is_not(capsys):
    with ProgressLines() as progress:
        told = threading.Event()
        progress.note = lambda line: (ProgressLines.note(progress, line), told.set())
        with noting_if_slow(progress, "it takes long, because", after_s=0.01):
            assert told.wait(10)
        told.clear()
        with noting_if_slow(progress, "not said", after_s=30):
            pass
    assert capsys.readouterr().err.endswith(" it takes long, because\n")
