"""`dlrm train`: dataset and config -> run."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.options import Overrides, split_config
from torchdlrm.cli.terminal import Json, announce, console, print_json, progress_bars, warn
from torchdlrm.config import Config, load_config, shipped_config_names
from torchdlrm.errors import ConfigError
from torchdlrm.progress import SILENT

if TYPE_CHECKING:
    from torchdlrm.training.log import TrainingSummary

Positive = Annotated[int, Parameter(validator=Number(gte=1))]


def train(
    *config: Overrides,
    dataset: Path,
    run: Path,
    model_class: str | None = None,
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
        model_class: A model of your own in place of the DLRM: FILE.py:NAME or MODULE:NAME of a class or function
            (docs/models.md).
        restart: Remove the run that is in the folder and begin again.
        nproc_per_node: Processes on this machine: one for each GPU, or one for a few CPU cores.
        nnodes: Machines; start the same command on each, with the run on storage that they share.
        rdzv_endpoint: HOST:PORT of one of the machines, where they find each other; needed with --nnodes.
        rdzv_id: Name of the job, the same on all machines.
        max_restarts: How often all processes are started again after one has died, from the last checkpoint.
        plan: A plan.json that `dlrm plan --out` wrote, to follow; without it training makes a plan.
        profile: Write a Chrome trace of 20 steps to the run's profile/ and say where their time went and which share of
            the communication was hidden (`--logging.profile-steps N` for another number).
        dry_run: Show the plan, the rows and the steps, refuse what would be refused, and write nothing.
        as_json: Print one JSON object on standard output.
    """
    path, overrides = split_config(config)
    if path is None:
        names = ", ".join(shipped_config_names())
        msg = f"CONFIG is missing: name a TOML file, or one of {names} (dlrm config NAME shows it)"
        raise ConfigError(msg)
    if plan is not None:
        overrides["sharding.plan"] = str(plan.resolve())
    if profile and "logging.profile-steps" not in overrides:
        overrides["logging.profile_steps"] = "20"
    settings = load_config(path, overrides)
    if nnodes > 1 and not rdzv_endpoint:
        raise ConfigError("--rdzv-endpoint: needed with --nnodes, HOST:PORT of one of the machines, the same on each")

    announce(f"train {path} on {dataset}, run {run}")

    from torchdlrm.cli.train_tables import show_profile, show_prospect, show_summary
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.model.model_class import architecture_of
    from torchdlrm.training.job import preview_training
    from torchdlrm.training.launch import Processes, launch, refusing_everywhere
    from torchdlrm.training.run import Run

    processes = Processes(nproc_per_node, nnodes, rdzv_endpoint, rdzv_id, max_restarts)
    with nullcontext() if dry_run else refusing_everywhere(processes):
        encoded, architecture = Dataset.open(dataset), architecture_of(model_class)
        if not restart:
            for change in Run(run, settings).check(encoded, architecture):
                console.print(f"changed since the run was started: {change}", markup=False)
        prospect = preview_training(
            settings,
            encoded,
            run,
            world_size=processes.world_size,
            local_world_size=nproc_per_node,
            restart=restart,
            architecture=architecture,
        )
    if processes.crowding:
        warn(f"--nproc-per-node {nproc_per_node}: {processes.crowding}")
    show_prospect(prospect, run, dry_run=dry_run)
    if dry_run:
        if as_json:
            print_json({"run": str(run), "dry_run": True, **prospect.as_dict()})
        return
    summary: TrainingSummary | None = launch(work, settings, dataset, run, model_class, restart, processes=processes)
    if summary is None:  # another machine has rank 0
        return
    show_summary(run, summary, encoded)
    if settings.logging.profile_steps:
        show_profile(Run(run, settings).profile)
    if as_json:
        print_json({"run": str(run), **summary.as_dict()})


def work(
    settings: Config,
    dataset: Path,
    run: Path,
    model_class: str | None = None,
    restart: bool = False,  # noqa: FBT001, FBT002 - launch() takes no names
) -> "TrainingSummary | None":
    """What every process of a training does; only the first one draws."""
    from torchdlrm.training.job import train as train_here

    draws = os.environ.get("RANK", "0") == "0"
    restart = restart and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    with progress_bars("") if draws else nullcontext(SILENT) as progress:
        history = train_here(settings, dataset, run, model_class=model_class, restart=restart, progress=progress)
    return history.summary if history is not None else None
