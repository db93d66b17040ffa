"""How `dlrm inspect` shows a run."""

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from torchdlrm.cli.terminal import console, print_json, shown_metric


def show(folder: Path, *, num_values: int, as_json: bool) -> None:  # noqa: ARG001 - a run has no values to show
    """Print what a run was started with, how far it is, and its checkpoints, after checking all of them."""
    content = summary(folder)
    if as_json:
        print_json({"kind": "run"} | content)
        return
    environment = content["environment"]
    console.print(
        f"run {folder}: {environment['world_size']} process(es), torchdlrm {environment['torchdlrm']}, "
        f"torch {environment['torch']}; dataset {environment['dataset']['path']}",
        markup=False,
        soft_wrap=True,
    )
    for split, line in content["last_metrics"].items():
        figures = (f"{name} {line[name]:.4f}" for name in ("loss", "ne", "auc") if line.get(name) is not None)
        console.print(f"{split} at step {line['step']:,}: {', '.join(figures)}", markup=False)
    table = Table("checkpoint", title="checkpoints", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for title in ("epoch", "best val AUC so far", "files"):
        table.add_column(title, justify="right")
    for step, about in content["checkpoints"].items():
        best = about["best_auc"]
        table.add_row(
            f"step {step:,}",
            "-" if about["epoch"] is None else str(about["epoch"]),
            "-" if best is None else f"{best:.4f}",
            "whole" if about["damage"] is None else about["damage"],
        )
    console.print(table)
    for name, result in content["evaluations"].items():
        judged = f"AUC {shown_metric(result['auc'], 4)}, logloss {shown_metric(result['logloss'], 4)}"
        console.print(f"evaluated {name}: {judged}", markup=False)


def summary(folder: Path) -> dict[str, Any]:
    """For JSON: the last line of each split's metrics, every checkpoint with what is wrong with it, evaluations."""
    from torchdlrm.training.checkpoint import checkpoint_path, find_damage, list_checkpoints, read_position
    from torchdlrm.training.log import read_metrics
    from torchdlrm.training.run import METRICS_NAME, Run

    run = Run.open(folder)
    checkpoints = {}
    for step in list_checkpoints(run.checkpoints):
        damage = find_damage(checkpoint_path(run.checkpoints, step))
        position = read_position(run.checkpoints, step) if damage is None else None
        checkpoints[step] = {
            "epoch": position.loader["epoch"] if position is not None else None,
            "best_auc": position.best_auc if position is not None else None,
            "damage": damage,
        }
    return {
        "path": str(folder),
        "environment": run.environment,
        "last_metrics": {line["split"]: line for line in read_metrics(folder / METRICS_NAME)},
        "checkpoints": checkpoints,
        "evaluations": run.evaluations(),
    }
