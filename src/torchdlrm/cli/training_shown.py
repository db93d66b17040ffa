"""Shows a training to people: what it is going to do, how it ended, and where the time of its steps went."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from torchdlrm.cli.terminal import console, look_at, metric_cells, print_table, say, say_next, say_undefined
from torchdlrm.features.tables import divisors

if TYPE_CHECKING:
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.training.job import TrainingPreview
    from torchdlrm.training.log import TrainingSummary

_MAX_TABLES = 6
# With fewer, a large GPU is done before the host has asked for the next step: some milliseconds whatever the rows.
_ENOUGH_ROWS_A_GPU = 8_192


def show_preview(preview: "TrainingPreview", run: Path, *, dry_run: bool) -> None:
    """Where the tables go, what each rank holds, how many steps; of a run that is there, what has changed."""
    for change in preview.changes:
        say(f"changed since the run was started: {change}")
    if preview.is_complete and not dry_run:
        train, num_steps = preview.config.train, preview.agenda.num_steps
        is_short = num_steps < preview.agenda.steps_per_epoch * train.epochs
        key, value = ("max_steps", train.max_steps) if is_short else ("epochs", train.epochs)
        where = f"step {preview.from_step:,} of {num_steps:,}"
        say(f"{run} is complete: {where}; raise train.{key}, which is {value}, to continue")
        return
    from torchdlrm.planning import report

    say(report.headline(preview.solution))
    # As many columns as a narrow terminal has room for; dlrm plan shows them all.
    ranks = [*report.rank_rows(preview.solution, limit=16), report.total_row(preview.solution)]
    print_table("ranks", ranks, report.MEMORY_COLUMNS, left_aligned=report.LEFT_ALIGNED, droppable=report.PICTURES)
    rows = report.table_rows(preview.solution, limit=None)
    left_out = len(rows) - _MAX_TABLES
    print_table("largest tables", rows[:_MAX_TABLES], left_aligned=report.LEFT_ALIGNED)
    if left_out > 0:
        console.print(f"and {left_out} more, in plan.json")
    for line in preview_lines(preview):
        say(line)


def preview_lines(preview: "TrainingPreview") -> Iterator[str]:
    """Rows, steps and rates of a training to come, in words."""
    config, agenda = preview.config, preview.agenda
    last = agenda.rows_per_epoch - (agenda.steps_per_epoch - 1) * agenda.batch_size_global
    smaller = f", the last one {last:,}" if last != agenda.batch_size_global else ""
    start = f", resuming after step {preview.from_step:,}" if preview.from_step else ""
    yield (
        f"an epoch: {agenda.rows_per_epoch:,} rows, {agenda.steps_per_epoch:,} steps of "
        f"{agenda.batch_size_global:,} rows{smaller}"
    )
    yield f"the run: {agenda.num_steps:,} steps, {agenda.rows_after(agenda.num_steps):,} rows{start}"
    yield f"label: {preview.label}"
    yield f"precision of the dense parts: {preview.precision}"
    times = [f"every {config.validation.every_steps:,} steps"] if config.validation.every_steps else []
    times += [f"every {config.validation.every_rows:,} training rows"] if config.validation.every_rows else []
    validated = f"{preview.validation_rows:,} rows, {', '.join([*times, 'at the end'])}"
    yield f"validation: {validated if preview.validation_rows else 'none, the val split has no rows'}"
    tables, rest, schedule = config.table_optimizer, config.dense_optimizer, config.schedule
    warm_up = f", {schedule.warmup_steps:,} steps of warm-up" if schedule.warmup_steps else ""
    yield (
        f"optimizers: {tables.name} {tables.learning_rate:g} for the tables, {rest.name} {rest.learning_rate:g} for "
        f"the rest; rate {schedule.kind}{warm_up}"
    )
    if preview.source is not None:
        yield f"warm start: from {preview.source}{_resets(preview)}"
    if config.train.freeze:
        yield f"frozen: {', '.join(config.train.freeze)}"
    if config.checkpoint.asynchronous and not preview.solution.copy_fits:
        yield "checkpoints: the steps wait while one is written, since there is no memory for a copy of the tables"
    if hint := _hint(preview):
        yield f"hint: {hint}"


def _resets(preview: "TrainingPreview") -> str:
    """How many ids stand for other values now; in two tables of a feature, several ids share a row."""
    assert preview.source is not None
    num_reset = preview.source.num_reset
    divided = zip(num_reset, divisors(preview.config.model, [*num_reset]), strict=True)
    shared = [name for name, divisor in divided if divisor is not None]
    num_ids = sum(found for name, found in num_reset.items() if name not in shared)
    fresh = f"; {num_ids:,} ids of other values start with fresh rows" if num_ids else ""
    return fresh + (f"; not those of {', '.join(shared)}, which share rows with other ids" if shared else "")


def _hint(preview: "TrainingPreview") -> str:
    from torchdlrm.training.compute import MIN_BFLOAT16_FLOPS

    machine, rows = preview.solution.problem.machine, preview.config.train.batch_size_global
    rows_a_gpu = rows // machine.num_devices
    is_short = preview.solution.problem.shape.step_flops(rows) < MIN_BFLOAT16_FLOPS
    if machine.kind == "cpu" and machine.num_devices > 1 and is_short:
        return (
            f"a step of {rows:,} rows is so short that {machine.num_devices} processes exchange for longer than they "
            "compute; one process (`nproc_per_node`) is faster"
        )
    if machine.kind == "cuda" and rows_a_gpu < _ENOUGH_ROWS_A_GPU:
        return (
            f"a GPU gets {rows_a_gpu:,} rows a step and may wait for its host most of the time; with "
            f"train.batch_size_global = {_ENOUGH_ROWS_A_GPU * machine.num_devices:,} or more, which is now {rows:,}, "
            "steps use it better. A run cannot change it later, and learning rates go with it"
        )
    return ""


def show_summary(run: Path, summary: "TrainingSummary", dataset: "Dataset") -> None:
    """What was trained, and what to look at."""
    from torchdlrm.data.judgements import judge_validation

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
        for name, shown in metric_cells(summary.validation, digits=4).items():
            table.add_row(f"last val {name}", shown)
    console.print(table)
    if summary.validation is not None:
        say_undefined(summary.validation, " on the val split")
        look_at(judge_validation(dataset, summary.validation))
    taken = "" if summary.best_step is None else f" (takes step {summary.best_step:,}, the best of the val split)"
    split = next(name for name in ("test", "val", "train") if dataset.splits[name].rows)
    say_next(f"dlrm evaluate {{}} --split {split}{taken}", run)


def show_profile(folder: Path) -> None:
    """Where the profiled steps' time went, on each rank."""
    from torchdlrm.training.step_profile import read_profiles

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
