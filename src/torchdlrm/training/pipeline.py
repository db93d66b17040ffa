"""Takes steps: by TorchRec's pipeline, which exchanges while it computes, or plainly where nothing is exchanged."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import nn
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.optim.keyed import KeyedOptimizer

from torchdlrm.tables.huge_pages import let_the_heap_grow_in_huge_pages
from torchdlrm.tables.lookup import use_own_kernels
from torchdlrm.tables.one_host import look_up_on_one_host
from torchdlrm.tables.one_process import look_up_in_this_process
from torchdlrm.training.gradients_on_one_host import add_up_on_one_host
from torchdlrm.training.processes.process_group import Ranks


class Pipeline(Protocol):
    """What takes steps."""

    def progress(self, batches: Iterator[Any]) -> Any:
        """Take a step on the next batch; what the model's forward gives besides the loss.

        Raises:
            StopIteration: there is no batch left.
        """

    def detach(self) -> nn.Module:
        """The model, with its forward as it was; the next step takes hold of it again."""


def prepare_lookups(model: nn.Module, ranks: Ranks, frozen: Collection[str] = ()) -> bool:
    """Let a sharded model on CPU look up by our own kernels, and send no more than it must; every rank must call this.

    Args:
        model: sharded.
        ranks: the processes that share it.
        frozen: names of tables that no step changes.

    Returns:
        Whether nothing is exchanged any more, since this process alone holds all tables.
    """
    use_own_kernels(model, frozen)
    if ranks.device.type != "cpu":
        return False
    if ranks.world_size == 1:
        return look_up_in_this_process(model)
    look_up_on_one_host(model, ranks.all_gather, ranks.new_group)
    return False


def build_pipeline(
    model: nn.Module,
    optimizer: KeyedOptimizer,
    *,
    dtype: torch.dtype,
    ranks: Ranks,
    frozen: Collection[str] = (),
) -> Pipeline:
    """Take steps on CPU one after the other where this process holds all tables, else through TorchRec's pipeline.

    That exchanges the next batch's ids while this one computes. It does not fetch the next batch's rows of cached
    tables ahead, as `PrefetchTrainPipelineSparseDist` would: FBGEMM gives cache locations out in the order in which
    they were prefetched, so a validation between two steps would look up its rows where those of a training batch are.

    Args:
        model: a `DLRMTrain` inside `DistributedModelParallel`.
        optimizer: steps after every backward.
        dtype: in which the dense parts compute.
        ranks: the processes that share the model; every rank must call this.
        frozen: names of tables that no step changes.
    """

    def forward(batch: Any) -> Any:
        with torch.autocast(ranks.device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            return model(batch)

    if ranks.device.type == "cpu":
        let_the_heap_grow_in_huge_pages()  # once more: large tables have taken what there was
        if ranks.world_size == 2:
            add_up_on_one_host(model, ranks.all_gather, ranks.new_group)
    if prepare_lookups(model, ranks, frozen):
        return _PlainSteps(model, optimizer, forward)
    return TrainPipelineSparseDist(model, optimizer, ranks.device, execute_all_batches=True, custom_model_fwd=forward)


class _PlainSteps:
    """Takes steps on batches that are where the model is."""

    def __init__(self, model: nn.Module, optimizer: KeyedOptimizer, forward: Any) -> None:
        self._model, self._optimizer, self._forward = model, optimizer, forward

    def progress(self, batches: Iterator[Any]) -> Any:
        """Take a step on the next batch."""
        batch = next(batches)
        self._optimizer.zero_grad()
        loss, output = self._forward(batch)
        loss.backward()
        self._optimizer.step()
        return output

    def detach(self) -> nn.Module:
        """The model, which nothing holds."""
        return self._model
