"""Takes steps, or predicts: by TorchRec's pipeline, which exchanges while it computes, or plainly on one process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from torchdlrm.tables.collection import ShardedTables
from torchdlrm.tables.huge_pages import let_the_heap_grow_in_huge_pages
from torchdlrm.training.processes.process_group import Ranks


class Pipeline(Protocol):
    """What takes steps, or predicts where the model is in eval mode."""

    def progress(self, batches: Iterator[Any]) -> Any:
        """Take a step on the next batch; what the model's forward gives besides the loss.

        Raises:
            StopIteration: there is no batch left.
        """

    def detach(self) -> nn.Module:
        """The model, with its forward as it was; the next step takes hold of it again."""


def build_pipeline(
    model: nn.Module, optimizer: KeyedOptimizer | None, *, ranks: Ranks, dtype: torch.dtype = torch.float32
) -> Pipeline:
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
        """Take a step on the next batch."""
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
        """The model, which nothing holds."""
        return self._model
