"""`dlrm train`, and what it says, does and how it ended; `dlrm import-weights`: weights of others -> run."""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.options import Flag, Json, Machines, NotNegative, Overrides, OwnModel, split_config
from torchdlrm.cli.terminal import (
    announce,
    drawn,
    look_at,
    metric_cells,
    print_json,
    print_table,
    say,
    say_facts,
    say_next,
    say_undefined,
    warn,
    warn_of_crowding,
)
from torchdlrm.config import about_config, load_config, shipped_config_names
from torchdlrm.errors import ConfigError
from torchdlrm.folders import expect, kind_of
from torchdlrm.storage.places import shown
from torchdlrm.versions import find_installed_misfit

if TYPE_CHECKING:
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.training.job import TrainingPreview
    from torchdlrm.training.log import TrainingHistory, TrainingSummary

_MAX_TABLES = 6
# With fewer, a large GPU is done before the host has asked for the next step: some milliseconds whatever the rows.
_ENOUGH_ROWS_A_GPU = 8_192


def train(
    *config: Overrides,
    dataset: Path,
    run: Path,
    from_run: Annotated[Path | None, Parameter(name=["--from", "--from-run"])] = None,
    freeze: str | None = None,
    init_table: tuple[str, ...] = (),
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    restart: bool = False,
    machines: Machines = Machines(),  # noqa: B008 - likewise
    max_restarts: NotNegative = 0,
    plan: Path | None = None,
    profile: Flag = False,
    dry_run: Flag = False,
    as_json: Json = False,
) -> None:
    """Train a DLRM, or resume a run where it stopped.

    Any key of the config can be overridden by its dotted name, for example `--train.batch-size-global 8192`;
    `dlrm config` lists them all. SIGTERM and Ctrl-C save and exit; the same command resumes.

    Args:
        config: TOML file, or the name of one that comes with torchdlrm, such as criteo-small; then keys to override.
        dataset: Folder written by `dlrm preprocess`.
        run: Folder to write. A run that is in it is resumed from its newest checkpoint.
        from_run: A run to start a new one from, with its weights and optimizer state, on a dataset whose vocabularies
            extend those of its own (`dlrm preprocess --extend-vocabulary`); `--warm-start.checkpoint` chooses which.
        freeze: Parts that stay as they are: tables, dense, or names of features and modules such as over_arch.
        init_table: Feature and file, as in item=vectors.parquet (value, vector): its table begins with these vectors.
        restart: Remove the run that is in the folder and begin again.
        max_restarts: How often all processes are started again after one has died, from the last checkpoint.
        plan: A plan.json that `dlrm plan --out` wrote, to follow; without it training makes a plan.
        profile: Write a Chrome trace of 20 steps to the run's profile/ and say where their time went and which part of
            the communication was hidden (`--logging.profile-steps N` for another number).
        dry_run: Show the plan, the rows and the steps, refuse what would be refused, and write nothing.
    """
    path, overrides = split_config(config)
    if path is None:
        names = ", ".join(shipped_config_names())
        msg = f"CONFIG is missing: name a TOML file, or one of {names} (dlrm config NAME shows it)"
        raise ConfigError(msg)
    _set_key(overrides, "sharding.plan", None if plan is None else shown(plan.resolve()), "--plan")
    _set_key(overrides, "train.freeze", freeze, "--freeze")
    for feature, equals, file in (given.partition("=") for given in init_table):
        if not equals:
            msg = f"--init-table: must be FEATURE=FILE, as in item=vectors.parquet, got {feature}"
            raise ConfigError(msg)
        _set_key(overrides, f"train.init_tables.{feature}", file, "--init-table")
    if profile and "logging.profile_steps" not in {name.replace("-", "_") for name in overrides}:
        overrides["logging.profile_steps"] = "20"
    settings = load_config(path, overrides)
    if machines.nnodes == 1:  # else the other machines are to hear of it, see `refusing_everywhere`
        expect("dataset", dataset)
        expect("run", from_run, run if kind_of(run) is not None else None)
    announce(f"train {path} on {dataset}, run {run}")

    from torchdlrm.data.dataset import Dataset
    from torchdlrm.training.job import preview_training
    from torchdlrm.training.job import train as train_here
    from torchdlrm.training.processes.launch import launch, refusing_everywhere
    from torchdlrm.training.run import Run, fetch_run

    processes = machines.processes(max_restarts)
    how: dict[str, Any] = {"from_run": from_run, "restart": restart, **vars(own_model)}
    with nullcontext() if dry_run else refusing_everywhere(processes):
        encoded = Dataset.open(dataset).with_labels(settings.train.label_names)
        if from_run is None and (restart or not Run(fetch_run(run), settings).exists):
            _refuse_warm_start(overrides)
        how_many = {"world_size": processes.world_size, "local_world_size": machines.nproc_per_node}
        preview = preview_training(settings, encoded, run, train_follows=not dry_run, **how_many | how)
    say(about_config(path, overrides))
    show_preview(preview, run, dry_run=dry_run)
    misfit = find_installed_misfit()
    if misfit is not None:
        warn(f"{misfit.why}. What to do: {misfit.remedy}")
    warn_of_crowding(processes)  # last, where it is read
    if dry_run:
        if as_json:
            print_json({"run": str(run), "dry_run": True, **preview.as_dict()})
        return
    job = partial(train_here, settings, dataset, run, **how)
    history: TrainingHistory | None = launch(drawn, job, processes=processes)
    if history is None:  # another machine has rank 0
        return
    summary = history.summary
    show_summary(run, summary, encoded)
    if settings.logging.profile_steps:
        show_profile(Run(run, settings).profile)
    if as_json:
        print_json({"run": str(run), **summary.as_dict()})


def import_weights(
    state_dict: Path,
    *,
    dataset: Path,
    run: Path,
    config: str | None = None,
    overwrite: Flag = False,
    as_json: Json = False,
) -> None:
    """Make a run of the weights of facebookresearch/dlrm or of TorchRec's DLRM, DLRM_DCN or DLRM_Projection.

    Args:
        state_dict: File of torch.save with the model's state dict; nothing in it is executed. Its tables are those of
            the dataset's sparse columns, in their order.
        dataset: Folder written by `dlrm import`: what the run is evaluated on and exported with.
        run: Folder to write.
        config: Name or TOML file of the settings for a training that goes on; the model is that of the weights.
        overwrite: Remove a run that is in the folder.
    """
    expect("dataset", dataset)
    announce(f"import weights of {state_dict} into {run}")
    from torchdlrm.exporting.weights import import_weights as import_state_dict

    model = import_state_dict(state_dict, dataset, run, config=config, overwrite=overwrite).config.model
    say(f"{run}: {model.interaction_text}, dimension {model.embedding_dim}")
    say_next("dlrm evaluate {0}, or dlrm export {0} --out BUNDLE", run)
    if as_json:
        print_json({"run": str(run), "model": model.model_dump(mode="json")})


def _set_key(overrides: dict[str, str], key: str, value: str | None, option: str) -> None:
    if value is not None and key in overrides:
        msg = f"{option}: is --{key} by a shorter name; give one of them"
        raise ConfigError(msg)
    if value is not None:
        overrides[key] = value


def _refuse_warm_start(overrides: dict[str, str]) -> None:
    """Only of the command line: the same config may be for the first run, which starts from none, and those after."""
    for name in overrides:
        if name.replace("-", "_").startswith("warm_start."):
            msg = f"--{name}: says what a run takes over from another one, and there is none; give one by --from"
            raise ConfigError(msg)


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
        say(f"and {left_out} more, in plan.json")
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
    yield f"label{'s' if len(preview.labels) > 1 else ''}: {', '.join(preview.labels)}"
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
    num_reset, chosen = preview.source.num_reset, preview.config.model.features
    shared = [name for name in num_reset if name in chosen and chosen[name].quotient_remainder is not None]
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

    is_resumed = 0 < summary.resumed_from_step < summary.step
    resumed = f" (resumed after {summary.resumed_from_step:,})" if is_resumed else ""
    facts = {"steps": f"{summary.step:,}{resumed}", "rows": f"{summary.rows:,}"}
    if summary.rows_per_s:
        facts["speed"] = f"{summary.rows_per_s:,.0f} rows/s"
    if summary.stopped_because != "finished":
        facts["stopped by"] = f"stop.{summary.stopped_because}"
    first = dataset.schema.first_of_several
    if summary.best_auc is not None:
        facts[f"best val auc{first and f', {first}'}"] = f"{summary.best_auc:.4f}, step {summary.best_step:,}"
    if summary.validation is not None:
        for label, of in {first: summary.validation, **summary.validation.get("labels", {})}.items():
            facts |= {f"last val {name}{label and f', {label}'}": x for name, x in metric_cells(of, digits=4).items()}
    say_facts(f"trained {run}", facts)
    if summary.validation is not None:
        for label, of in {first: summary.validation, **summary.validation.get("labels", {})}.items():
            say_undefined({**summary.validation, **of}, f" on the val split{label and f', label {label}'}")
        look_at(judge_validation(dataset, summary.validation))
    taken = "" if summary.best_step is None else f" (takes step {summary.best_step:,}, the best of the val split)"
    split = next(name for name in ("test", "val", "train") if dataset.splits[name].rows)
    say_next(f"dlrm evaluate {{}} --split {split}{taken}", run)


def show_profile(folder: Path) -> None:
    """Where the profiled steps' time went, on each rank."""
    from torchdlrm.training.step_profile import read_profiles

    profiles = read_profiles(folder)
    if not profiles:
        say("profile: too few steps were left to profile any")
        return
    rows = [
        {"": part, **{f"rank {of.rank}": f"{of.ms_per_step_by_part.get(part, 0.0):.2f}" for of in profiles}}
        for part in profiles[0].ms_per_step_by_part
    ]
    rows.append({"": "the step", **{f"rank {of.rank}": f"{of.ms_per_step:.2f}" for of in profiles}})
    rows.append({"": "communication", **{f"rank {of.rank}": f"{of.communication_ms_per_step:.2f}" for of in profiles}})
    hidden = {of.rank: "-" if of.hidden_share is None else f"{of.hidden_share:.0%}" for of in profiles}
    rows.append({"": "of which hidden", **{f"rank {rank}": fraction for rank, fraction in hidden.items()}})
    print_table(f"ms a step, over {profiles[0].num_steps} profiled steps", rows)
    say(f"traces for chrome://tracing or Perfetto: {folder}")
