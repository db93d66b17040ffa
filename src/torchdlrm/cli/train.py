"""`dlrm train`: dataset and config -> run."""

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.options import Overrides, check_rendezvous, split_config
from torchdlrm.cli.terminal import (
    Flag,
    Json,
    Positive,
    announce,
    drawn,
    print_json,
    say,
    warn_of_crowding,
)
from torchdlrm.cli.training_shown import show_preview, show_profile, show_summary
from torchdlrm.config import about_config, load_config, shipped_config_names
from torchdlrm.errors import ConfigError
from torchdlrm.folders import expect, kind_of

if TYPE_CHECKING:
    from torchdlrm.training.log import TrainingHistory


def train(
    *config: Overrides,
    dataset: Path,
    run: Path,
    from_run: Annotated[Path | None, Parameter(name=["--from", "--from-run"])] = None,
    freeze: str | None = None,
    model_class: str | None = None,
    allow_changed_model_class: Flag = False,
    restart: bool = False,
    nproc_per_node: Positive = 1,
    nnodes: Positive = 1,
    rdzv_endpoint: str = "",
    rdzv_id: str = "torchdlrm",
    max_restarts: Annotated[int, Parameter(validator=Number(gte=0))] = 0,
    plan: Path | None = None,
    profile: Annotated[bool, Parameter(negative="")] = False,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
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
        model_class: A model of your own in place of the DLRM, or its interaction arch: FILE.py:NAME or MODULE:NAME of
            a class or function (docs/models.md).
        allow_changed_model_class: Take the model class though its file has changed since.
        restart: Remove the run that is in the folder and begin again.
        nproc_per_node: Processes on this machine: one for each GPU, or one for a few CPU cores.
        nnodes: Machines; start the same command on each, with the run on storage that they share.
        rdzv_endpoint: HOST:PORT of one of the machines, where they find each other; needed with --nnodes.
        rdzv_id: Name of the job, the same on all machines.
        max_restarts: How often all processes are started again after one has died, from the last checkpoint.
        plan: A plan.json that `dlrm plan --out` wrote, to follow; without it training makes a plan.
        profile: Write a Chrome trace of 20 steps to the run's profile/ and say where their time went and which part of
            the communication was hidden (`--logging.profile-steps N` for another number).
        dry_run: Show the plan, the rows and the steps, refuse what would be refused, and write nothing.
        as_json: Print one JSON object on standard output.
    """
    path, overrides = split_config(config)
    if path is None:
        names = ", ".join(shipped_config_names())
        msg = f"CONFIG is missing: name a TOML file, or one of {names} (dlrm config NAME shows it)"
        raise ConfigError(msg)
    _set_key(overrides, "sharding.plan", None if plan is None else str(plan.resolve()), "--plan")
    _set_key(overrides, "train.freeze", freeze, "--freeze")
    if profile and "logging.profile_steps" not in {name.replace("-", "_") for name in overrides}:
        overrides["logging.profile_steps"] = "20"
    settings = load_config(path, overrides)
    check_rendezvous(nnodes, rdzv_endpoint)

    if nnodes == 1:  # else the other machines are to hear of it, see `refusing_everywhere`
        expect("dataset", dataset)
        expect("run", from_run, run if kind_of(run) is not None else None)
    announce(f"train {path} on {dataset}, run {run}")

    from torchdlrm.data.dataset import Dataset
    from torchdlrm.training.job import preview_training
    from torchdlrm.training.job import train as train_here
    from torchdlrm.training.processes.launch import Processes, launch, refusing_everywhere
    from torchdlrm.training.run import Run

    processes = Processes(nproc_per_node, nnodes, rdzv_endpoint, rdzv_id, max_restarts)
    how: dict[str, Any] = {
        "from_run": from_run,
        "model_class": model_class,
        "allow_changed_model_class": allow_changed_model_class,
        "restart": restart,
    }
    with nullcontext() if dry_run else refusing_everywhere(processes):
        encoded = Dataset.open(dataset).with_label(settings.train.label)
        if from_run is None and (restart or not Run(run, settings).exists):
            _refuse_warm_start(overrides)
        preview = preview_training(
            settings, encoded, run, world_size=processes.world_size, local_world_size=nproc_per_node, **how
        )
    say(about_config(path, overrides))
    show_preview(preview, run, dry_run=dry_run)
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
