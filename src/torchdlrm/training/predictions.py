"""Gathers the logits and labels of many batches from all ranks, to compute exact metrics from them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchdlrm.loader.batch import Batch
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.progress import ProgressListener
from torchdlrm.training.compute import exact_products
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


def prediction_pipeline(model: nn.Module, ranks: Ranks) -> TrainPipelineSparseDist | None:
    """Does the transfers for the next batch, as in training, while one is predicted; None where there are none to hide.

    Its two streams on a GPU are its own, and torch keeps the memory of batches a stream: one is enough for all
    validations of a training.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`, not held by another pipeline.
        ranks: the processes that hold the model.
    """
    if ranks.device.type == "cpu" and ranks.world_size == 1:
        return None
    # Not TorchRec's pipeline for evaluation: its thread skips a batch when reading it fails in some ways. In eval mode
    # this one does nothing else, and it asks for no optimizer.
    return TrainPipelineSparseDist(model, None, ranks.device, execute_all_batches=True)


def predict_loaders(
    model: nn.Module,
    loaders: Sequence[Loader],
    ranks: Ranks,
    progress: ProgressListener,
    pipeline: TrainPipelineSparseDist | None = None,
) -> PredictionBuffer:
    """Predict every row that the loaders read, each once; products are float32 on every device.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`, not held by a pipeline.
        loaders: of one epoch each; their rows are judged together. Every rank has its own.
        ranks: the processes that hold the model.
        progress: receives the rows of all ranks.
        pipeline: of the model, from an earlier call; a new one where it is None.
    """
    predictions = PredictionBuffer()
    was_training = model.training
    model.eval()
    pipeline = pipeline or prediction_pipeline(model, ranks)
    with torch.no_grad(), exact_products(), _predicting(model, pipeline) as predict:
        for loader in loaders:
            rows, num_batches = loader.rows, loader.batches_per_epoch
            with closing(iter(loader)) as batches:
                for i in range(num_batches):
                    _, *judged = predict(batches)
                    predictions.add(*judged)
                    progress.advance(rows * (i + 1) // num_batches - rows * i // num_batches)
    model.train(was_training)
    return predictions


@contextmanager
def _predicting(
    model: nn.Module, pipeline: TrainPipelineSparseDist | None
) -> Iterator[Callable[[Iterator[Batch]], tuple[Tensor, ...]]]:
    """What predicts the next batch of an iterator: loss, logits [B], labels [B], row weights [B] if there are some.

    `model` is in eval mode.
    """
    if pipeline is None:
        yield lambda batches: model(next(batches))[1]
        return
    yield pipeline.progress
    pipeline.detach()
