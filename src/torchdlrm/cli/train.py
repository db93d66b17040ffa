"""`dlrm train`: dataset and config -> run."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number
from rich.table import Table

from torchdlrm.cli.overrides import Overrides, parse_overrides
from torchdlrm.cli.terminal import console, print_json, progress_bars
from torchdlrm.config import Config, load_config
from torchdlrm.progress import SilentProgress

if TYPE_CHECKING:
    from torchdlrm.train.trainer import TrainingSummary


def train(
    config: Path | None = None,
    *overrides: Overrides,
    dataset: Path,
    run: Path,
    nproc_per_node: Annotated[int, Parameter(validator=Number(gte=1))] = 1,
    plan: Path | None = None,
    json: bool = False,
) -> None:
    """Train a DLRM.

    Any key of the config can be overridden by its dotted name, for example `--train.batch-size-global 8192`;
    docs/configuration.md lists them all.

    Parameters
    ----------
    config
        TOML file; configs/ holds ready-made ones. Without it every key has its default: the paper's model.
    dataset
        Folder written by `dlrm preprocess`.
    run
        Folder to write; must be new or empty.
    nproc_per_node
        Processes on this machine: one for each GPU, or one for a few CPU cores.
    plan
        A plan.json that `dlrm plan --out` wrote, to obey; without it training plans by itself.
    json
        Print one JSON object on standard output.
    """
    chosen = {} if plan is None else {"sharding.plan": str(plan.resolve())}
    settings = load_config(config, {**parse_overrides(overrides), **chosen})

    from torchdlrm.data.dataset import Dataset
    from torchdlrm.sharding.obey import check_given_plan
    from torchdlrm.train.launch import launch
    from torchdlrm.train.run import Run

    check_given_plan(settings, Dataset.open(dataset).num_embeddings, world_size=nproc_per_node)
    Run.create(run, settings, Dataset.open(dataset), world_size=nproc_per_node)
    summary: TrainingSummary = launch(work, settings, dataset, run, nproc_per_node=nproc_per_node)
    show_summary(run, summary)
    if json:
        print_json({"run": str(run), **summary.as_dict()})


def work(settings: Config, dataset: Path, run: Path) -> "TrainingSummary | None":
    """What every process of a training does; only the first one draws."""
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.train.run import Run
    from torchdlrm.train.trainer import train as train_run

    draws = os.environ.get("RANK", "0") == "0"
    with progress_bars("") if draws else nullcontext(SilentProgress()) as progress:
        return train_run(settings, Dataset.open(dataset), Run(run, settings), progress=progress)


def show_summary(run: Path, summary: "TrainingSummary") -> None:
    """What was trained, for people."""
    table = Table(title=f"trained {run}", title_justify="left", show_header=False)
    table.add_row("steps", f"{summary.steps:,}")
    table.add_row("rows", f"{summary.rows:,}")
    table.add_row("speed", f"{summary.rows_per_s:,.0f} rows/s")
    if summary.validation is not None:
        for name in ("auc", "logloss", "ne", "calibration"):
            table.add_row(f"val {name}", f"{summary.validation[name]:.4f}")
    console.print(table)
    console.print(f"next: dlrm evaluate {run} --split test", markup=False)
