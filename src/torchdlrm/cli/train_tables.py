"""What `dlrm train` shows people before and after."""

from pathlib import Path

from rich.table import Table

from torchdlrm.cli.terminal import console, print_table, say, say_undefined, shown_metric
from torchdlrm.data.dataset import Dataset
from torchdlrm.planning import report
from torchdlrm.training.job import TrainingPreview
from torchdlrm.training.log import TrainingSummary
from torchdlrm.training.step_profile import read_profiles

MAX_TABLES = 6


def show_prospect(prospect: TrainingPreview, run: Path, *, dry_run: bool) -> None:
    """Where the tables go, what each rank holds, how many steps; of a run that is complete, that it is."""
    if prospect.is_complete and not dry_run:
        say(f"{run} is complete: {prospect.completion}")
        return
    say(report.headline(prospect.solution))
    # As many columns as a narrow terminal has room for; dlrm plan shows them all.
    ranks = [*report.rank_rows(prospect.solution, limit=16), report.total_row(prospect.solution)]
    print_table("ranks", ranks, report.MEMORY_COLUMNS, left_aligned=report.LEFT_ALIGNED, droppable=report.PICTURES)
    rows = report.table_rows(prospect.solution, limit=None)
    left_out = len(rows) - MAX_TABLES
    print_table("largest tables", rows[:MAX_TABLES], left_aligned=report.LEFT_ALIGNED)
    if left_out > 0:
        console.print(f"and {left_out} more, in plan.json")
    for line in prospect.lines():
        say(line)


def show_summary(run: Path, summary: TrainingSummary, dataset: Dataset) -> None:
    """What was trained."""
    table = Table(title=f"trained {run}", title_justify="left", show_header=False)
    is_resumed = 0 < summary.resumed_from_step < summary.step
    resumed = f" (resumed after {summary.resumed_from_step:,})" if is_resumed else ""
    table.add_row("steps", f"{summary.step:,}{resumed}")
    table.add_row("rows", f"{summary.rows:,}")
    if summary.rows_per_s:
        table.add_row("speed", f"{summary.rows_per_s:,.0f} rows/s")
    if summary.stopped_because != "finished":
        table.add_row("stopped by", f"stop.{summary.stopped_because}")
    if summary.best_auc is not None:
        table.add_row("best val auc", f"{summary.best_auc:.4f}, step {summary.best_step:,}")
    if summary.validation is not None:
        for name in ("auc", "logloss", "ne", "calibration"):
            table.add_row(f"last val {name}", shown_metric(summary.validation[name], digits=4))
    console.print(table)
    if summary.validation is not None:
        say_undefined(summary.validation, " on the val split")
    taken = "" if summary.best_step is None else f" (takes step {summary.best_step:,}, the best of the val split)"
    split = next(name for name in ("test", "val", "train") if dataset.splits[name].rows)
    say(f"next: dlrm evaluate {run} --split {split}{taken}")


def show_profile(folder: Path) -> None:
    """Where the profiled steps' time went, on each rank."""
    profiles = read_profiles(folder)
    if not profiles:
        console.print("profile: too few steps were left to profile any", markup=False)
        return
    table = Table(title=f"ms a step, over {profiles[0].num_steps} profiled steps", title_justify="left")
    table.add_column("")
    for profile in profiles:
        table.add_column(f"rank {profile.rank}", justify="right")
    for part in profiles[0].ms_per_step_by_part:
        table.add_row(part, *(f"{profile.ms_per_step_by_part.get(part, 0.0):.2f}" for profile in profiles))
    table.add_section()
    table.add_row("the step", *(f"{profile.ms_per_step:.2f}" for profile in profiles))
    table.add_row("communication", *(f"{profile.communication_ms_per_step:.2f}" for profile in profiles))
    shares = ("-" if profile.hidden_share is None else f"{profile.hidden_share:.0%}" for profile in profiles)
    table.add_row("of which hidden", *shares)
    console.print(table)
    console.print(f"traces for chrome://tracing or Perfetto: {folder}", markup=False)
