"""What `dlrm train` shows people before and after."""

from pathlib import Path

from rich.table import Table

from torchdlrm.cli.plan_tables import print_table
from torchdlrm.cli.terminal import console
from torchdlrm.sharding import report
from torchdlrm.train.prospect import Prospect
from torchdlrm.train.summary import TrainingSummary

MAX_TABLES = 6


def show_prospect(prospect: Prospect) -> None:
    """Where the tables go, what each rank holds, how many steps."""
    console.print(report.headline(prospect.solution), markup=False, soft_wrap=True)
    # As many columns as a narrow terminal has room for; dlrm plan shows them all.
    print_table("ranks", *report.pick(report.MEMORY_COLUMNS, *report.rank_rows(prospect.solution, limit=16)))
    head, rows = report.table_rows(prospect.solution, limit=None)
    left_out = len(rows) - MAX_TABLES
    print_table("largest tables", head, rows[:MAX_TABLES])
    if left_out > 0:
        console.print(f"and {left_out} more, in plan.json")
    for line in prospect.lines():
        console.print(line, markup=False, soft_wrap=True)


def show_summary(run: Path, summary: TrainingSummary) -> None:
    """What was trained."""
    table = Table(title=f"trained {run}", title_justify="left", show_header=False)
    resumed = f" (taken up after {summary.resumed_from_step:,})" if summary.resumed_from_step else ""
    table.add_row("steps", f"{summary.step:,}{resumed}")
    table.add_row("rows", f"{summary.rows:,}")
    if summary.rows_per_s:
        table.add_row("speed", f"{summary.rows_per_s:,.0f} rows/s")
    if summary.stopped_because != "finished":
        table.add_row("stopped by", f"stop.{summary.stopped_because}")
    if summary.validation is not None:
        for name in ("auc", "logloss", "ne", "calibration"):
            table.add_row(f"val {name}", f"{summary.validation[name]:.4f}")
    console.print(table)
    console.print(f"next: dlrm evaluate {run} --split test", markup=False)
