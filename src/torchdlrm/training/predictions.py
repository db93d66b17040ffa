"""Gathers the logits and labels of many batches from all ranks, to compute exact metrics from them."""

from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist

from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.progress import ProgressListener
from torchdlrm.training.compute import exact_products
from torchdlrm.training.pipeline import Pipeline, build_pipeline
from torchdlrm.training.processes.process_group import Ranks


class Predictions(NamedTuple):
    """Labels and logits of some rows, and their weights where they have some: float32 [rows] each."""

    labels: NDArray[np.float32]
    logits: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None


class PredictionBuffer:
    """Keeps logits, labels and weights of this rank until they are asked for: 8 bytes a row, 12 with weights."""

    def __init__(self) -> None:
        self._batches: list[tuple[Tensor, ...]] = []

    def add(self, logits_B: Tensor, labels_B: Tensor, *row_weights_B: Tensor) -> None:
        """Keep a batch: float32 [B] each."""
        self._batches.append((labels_B, logits_B, *row_weights_B))

    def take(self, ranks: Ranks) -> Predictions | None:
        """The predictions of all ranks on rank 0, rank by rank, and None elsewhere; empties the buffer.

        Every rank must call this.
        """
        mine = [torch.cat(column).float().cpu().numpy() for column in zip(*self._batches, strict=True)]
        self._batches = []
        if ranks.world_size == 1:
            return Predictions(*mine)
        everyone = [mine] * ranks.world_size if ranks.is_first else None
        dist.gather_object(mine, everyone, dst=0, group=ranks.process_group)
        return None if everyone is None else Predictions(*map(np.concatenate, zip(*everyone, strict=True)))

    def take_metrics(self, ranks: Ranks) -> BinaryMetrics | None:
        """Exact metrics of what `take` returns."""
        taken = self.take(ranks)
        return None if taken is None else binary_metrics(*taken)


def predict_loaders(
    model: nn.Module,
    loaders: Sequence[Loader],
    ranks: Ranks,
    progress: ProgressListener,
    pipeline: Pipeline | None = None,
) -> PredictionBuffer:
    """Predict every row that the loaders read, each once; products are float32 on every device.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`, not held by a pipeline.
        loaders: of one epoch each; their rows are judged together. Every rank has its own.
        ranks: the processes that hold the model.
        progress: receives the rows of all ranks.
        pipeline: that only predicts, from an earlier call; a new one where it is None.
    """
    predictions = PredictionBuffer()
    was_training = model.training
    model.eval()
    pipeline = pipeline or build_pipeline(model, None, ranks=ranks)
    with torch.no_grad(), exact_products():
        for loader in loaders:
            rows, num_batches = loader.rows, loader.batches_per_epoch
            with closing(iter(loader)) as batches:
                for i in range(num_batches):
                    _, *judged = pipeline.progress(batches)
                    predictions.add(*judged)
                    progress.advance(rows * (i + 1) // num_batches - rows * i // num_batches)
        pipeline.detach()
    model.train(was_training)
    return predictions
