"""Takes steps, or predicts: by TorchRec's pipeline, which exchanges while it computes, or plainly on one process.

Logits and labels of what is predicted are gathered from all ranks, to compute exact metrics from them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch import distributed as dist
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.progress import ProgressListener
from torchdlrm.tables.collection import ShardedTables
from torchdlrm.tables.huge_pages import let_the_heap_grow_in_huge_pages
from torchdlrm.training.compute import exact_products
from torchdlrm.training.processes.process_group import Ranks


def build_pipeline(
    model: nn.Module, optimizer: KeyedOptimizer | None, *, ranks: Ranks, dtype: torch.dtype = torch.float32
) -> "Pipeline":
    """Take steps on CPU one after the other where this process holds all tables, else through TorchRec's pipeline.

    That exchanges the next batch's ids while this one computes. It does not fetch the next batch's rows of cached
    tables ahead, as `PrefetchTrainPipelineSparseDist` would: FBGEMM gives cache locations out in the order in which
    they were prefetched, so a validation between two steps would look up its rows where those of a training batch are.
    Nor is it TorchRec's pipeline for evaluation, whose thread skips a batch when reading it fails in some ways.

    Its two streams on a GPU are its own, and torch keeps the memory of batches a stream: one is enough for all
    validations of a training.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`, not held by another pipeline.
        optimizer: steps after every backward; None: the pipeline only predicts.
        ranks: the processes that share the model.
        dtype: in which the dense parts compute.
    """
    device = ranks.device
    precision = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    if device.type == "cpu":
        if optimizer is not None:
            let_the_heap_grow_in_huge_pages()  # once more: large tables have taken what there was
        collections = [module for module in model.modules() if isinstance(module, ShardedTables)]
        has_all = optimizer is None or all(tables.exchanges_nothing for tables in collections)
        if ranks.world_size == 1 and has_all:
            return PlainSteps(model, optimizer, precision)

    def forward(batch: Any) -> Any:
        with precision():
            return model(batch)

    return TrainPipelineSparseDist(model, optimizer, device, execute_all_batches=True, custom_model_fwd=forward)


class PlainSteps:
    """Takes steps on batches that are where the model is."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: KeyedOptimizer | None,
        precision: Callable[[], AbstractContextManager[object]],
    ) -> None:
        self._model, self._optimizer, self._precision = model, optimizer, precision

    def progress(self, batches: Iterator[Any]) -> Any:
        """Take a step on the next batch, or predict in eval mode; what the model gives besides the loss.

        Raises:
            StopIteration: there is no batch left.
        """
        batch = next(batches)
        if self._optimizer is not None:
            self._optimizer.zero_grad()
        with self._precision():
            loss, output = self._model(batch)
        if self._optimizer is not None:
            loss.backward()
            self._optimizer.step()
        return output

    def detach(self) -> nn.Module:
        """The model, with its forward as it was; nothing holds it."""
        return self._model


Pipeline: TypeAlias = TrainPipelineSparseDist | PlainSteps


class Predictions(NamedTuple):
    """Labels and logits of some rows, and their weights where they have some: float32 [rows] each, of L [rows, L]."""

    labels: NDArray[np.float32]
    logits: NDArray[np.float32]
    weights: NDArray[np.float32] | None = None

    def by_label(self, names: Sequence[str]) -> "dict[str, Predictions]":
        """Those of each label."""
        columns = zip(names, by_label(self.labels), by_label(self.logits), strict=True)
        return {name: Predictions(labels, logits, self.weights) for name, labels, logits in columns}


def by_label(values: Any) -> Any:
    """What is of each label, of values [B] of one, or [B, L]: tensors, or arrays."""
    return [values] if values.ndim == 1 else [*values.T]


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

    def take_metrics(self, ranks: Ranks, names: Sequence[str]) -> dict[str, BinaryMetrics] | None:
        """Exact metrics of what `take` returns, by label."""
        taken = self.take(ranks)
        return None if taken is None else {name: binary_metrics(*of) for name, of in taken.by_label(names).items()}


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
