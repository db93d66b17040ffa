"""`dlrm evaluate`: a run and a split -> exact metrics."""

from pathlib import Path
from typing import Any

from rich.table import Table

from torchdlrm.cli.terminal import (
    Json,
    Positive,
    announce,
    console,
    print_json,
    progress_of_first_rank,
    say_undefined,
    shown_metric,
    warn,
    warn_of_crowding,
)
from torchdlrm.config import DeviceChoice


def evaluate(
    run: Path,
    *,
    split: str = "test",
    checkpoint: str = "best",
    dataset: Path | None = None,
    model_class: str | None = None,
    batch_size_global: Positive = 8192,
    device: DeviceChoice = "auto",
    nproc_per_node: Positive = 1,
    as_json: Json = False,
) -> None:
    """Measure a trained run on every row of a split; the result is also written to RUN/evaluation/.

    Args:
        run: Folder written by `dlrm train`.
        split: train, val or test; several joined by + are judged together, as in val+test.
        checkpoint: best (the highest AUC of the val split; the last where nothing was validated), last, or a step.
        dataset: Where the dataset is now, if it has moved since the training.
        model_class: The model class that the run was trained with, FILE.py:NAME or MODULE:NAME; only where it is not
            the DLRM.
        batch_size_global: Rows per forward pass over all processes; the result does not depend on it.
        device: auto, cuda or cpu: where to compute (as train.device), whatever the run was trained on.
        nproc_per_node: Processes on this machine; need not be as many as trained.
        as_json: Print one JSON object on standard output.
    """
    announce(f"evaluate {run} on {split}")

    from torchdlrm.training.checkpoint import ChosenCheckpoint
    from torchdlrm.training.launch import Processes, launch
    from torchdlrm.training.run import Run

    trained = Run.open(run)
    trained.shape(trained.open_dataset(dataset), model_class)
    processes = Processes(nproc_per_node)
    warn_of_crowding(processes)
    result: dict[str, Any] = launch(
        work, run, dataset, split, checkpoint, batch_size_global, model_class, device, processes=processes
    )
    try:
        trained.write_evaluation(result["split"], result)
    except OSError as error:  # a run may lie where it can only be read
        warn(f"not kept in {run / 'evaluation'}: {error.strerror}")
    chosen = ChosenCheckpoint(result["step"], result["checkpoint"])
    table = Table(title=f"{run} at {chosen}: split {result['split']}", title_justify="left")
    values = {name: value for name, value in result.items() if name not in {"split", "step", "checkpoint"}}
    for name in values:
        table.add_column(name, justify="right")
    table.add_row(*(f"{v:,}" if isinstance(v, int) else shown_metric(v) for v in values.values()))
    console.print(table)
    say_undefined(result)
    if as_json:
        print_json(result)


def work(
    run: Path,
    dataset: Path | None,
    split: str,
    checkpoint: str,
    batch_size_global: int,
    model_class: str | None = None,
    device: DeviceChoice = "auto",
) -> dict[str, Any] | None:
    """What every process of an evaluation does; only the first one draws."""
    from torchdlrm.evaluation.evaluate import evaluate as evaluate_run

    with progress_of_first_rank() as progress:
        return evaluate_run(
            run,
            dataset,
            split,
            model_class=model_class,
            checkpoint=checkpoint,
            batch_size_global=batch_size_global,
            device=device,
            progress=progress,
        )
