"""A trained run and a split -> exact metrics over every row of it, each once."""

from collections.abc import Sequence
from typing import Any

from torchdlrm.data.dataset import Dataset
from torchdlrm.loader.loader import Loader
from torchdlrm.model.model_class import ModelClass
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.training.checkpoint import find_checkpoint
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.predictions import measure
from torchdlrm.training.process_group import Ranks
from torchdlrm.training.run import Run
from torchdlrm.training.sharded import build_sharded_model


def evaluate(
    run: Run,
    dataset: Dataset,
    splits: Sequence[str],
    ranks: Ranks,
    *,
    model_class: ModelClass | None = None,
    checkpoint: str = "best",
    batch_size_global: int = 8192,
    progress: ProgressListener = SILENT,
) -> dict[str, Any] | None:
    """Metrics of a run's weights over the rows of one split, or of several together.

    Args:
        run: trained before, on any number of ranks.
        dataset: what it was trained on.
        splits: names of splits; their rows are judged together.
        ranks: the processes that share the work.
        model_class: that the run was trained with, where it was a class of somebody's own.
        checkpoint: `best` of the val split (the last where nothing was validated), `last`, or a step.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        progress: is told of the rows done.

    Returns:
        On rank 0 `split`, `step`, `checkpoint` (`best`, `last` or `step`: what it was chosen for), `rows`, `auc`,
        `logloss`, `ne`, `calibration`, `accuracy` (None where not defined, as the AUC of rows of one label); elsewhere
        None.

    Raises:
        RunError: the run has no such checkpoint, it is damaged, or the run is of another model class.
        DatasetError: a split is not there or is empty.
    """
    model = build_sharded_model(
        run.config,
        run.shape(dataset, model_class),
        num_embeddings=dataset.num_embeddings,
        dense_sample=None,
        ranks=ranks,
    ).module
    chosen = find_checkpoint(run.checkpoints, checkpoint)
    Checkpointer(run.checkpoints, model, None, ranks).load(chosen.step)
    loaders = [
        Loader(
            dataset,
            split,
            batch_size_global=batch_size_global,
            rank=ranks.rank,
            world_size=ranks.world_size,
            pin_memory=ranks.device.type == "cuda",
        )
        for split in splits
    ]
    progress.start_phase("evaluate", sum(loader.rows for loader in loaders))
    metrics = measure(model, loaders, ranks, progress)
    about = {"split": "+".join(splits), "step": chosen.step, "checkpoint": chosen.kind}
    return None if metrics is None else about | metrics.as_json()
