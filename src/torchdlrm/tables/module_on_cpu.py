"""FBGEMM's module of tables, on CPU also with the optimizers that FBGEMM has for GPUs alone.

FBGEMM refuses to build it with those. It is built with one that is accepted, and then given the state that it has on a
GPU, under the same names: TorchRec makes the optimizer's state dict of these, so a run moves between GPU and CPU.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    construct_split_state,
)
from torch import Tensor, nn
from torchrec.distributed import batched_embedding_kernel

from torchdlrm.tables.optimizers import record_of

# By whether the first state is a value a row, where there is one.
_ACCEPTED = {
    (): EmbOptimType.EXACT_SGD,
    (False,): EmbOptimType.EXACT_ADAGRAD,
    (True,): EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class TablesOnCpu(SplitTableBatchedEmbeddingBagsCodegen):  # type: ignore[misc]  # FBGEMM is untyped
    """FBGEMM's module, whose lookup and update on CPU are ours: `torchdlrm.tables.lookup`.

    Attributes:
        is_lazy: whether a row catches up on the weight decay of steps that did not look it up. Then `prev_iter_host`
            holds the last step of each row, int32, 0 for none.
    """

    def __init__(
        self,
        embedding_specs: Sequence[tuple[int, int, Any, Any]],
        *,
        optimizer: EmbOptimType = EmbOptimType.EXACT_SGD,
        is_lazy: bool = False,
        **settings: Any,
    ) -> None:
        """Make tables and state of zeros.

        Args:
            embedding_specs: rows, dimension, location and device of each table.
            optimizer: any that has a record.
            is_lazy: of the weight decay.
            settings: as FBGEMM's module takes them.
        """
        states = record_of(optimizer).states_are_per_row
        # The one with the same first state: as many values, in the same place.
        super().__init__(embedding_specs, optimizer=_ACCEPTED[states[:1]], **settings)
        self.optimizer = optimizer
        self.is_lazy = is_lazy
        self._num_states = len(states)
        if len(states) > 1:
            self._add_state("momentum2", rowwise=states[1])
        if is_lazy:
            self._add_state("prev_iter", rowwise=True)
            # FBGEMM's kind of state is float32, which counts to 2^24 alone; a checkpoint's of that type is converted.
            num_rows = sum(rows for rows, *_ in embedding_specs)
            self.prev_iter_host = nn.Parameter(torch.zeros(num_rows, dtype=torch.int32), requires_grad=False)

    def _add_state(self, name: str, *, rowwise: bool) -> None:
        split = construct_split_state(self.embedding_specs, rowwise=rowwise, cacheable=False)
        self._apply_split(split, prefix=name, dtype=torch.float32)

    def split_optimizer_states(self) -> list[list[Tensor]]:
        """Views of the state of each table, in the order in which FBGEMM gives them out."""
        states: list[list[Tensor]] = super().split_optimizer_states()
        if not self.is_lazy:
            return states
        rows = [spec[0] for spec in self.embedding_specs]
        last_steps = self.prev_iter_host.detach().split(rows)
        return [[*own, last] for own, last in zip(states or [[]] * len(rows), last_steps, strict=True)]

    def get_optimizer_state(self) -> list[dict[str, Tensor]]:
        """The same by the names of torch's optimizers; TorchRec calls the first one `momentum1` whatever it is."""
        if not self.is_lazy:
            states: list[dict[str, Tensor]] = super().get_optimizer_state()
            return states
        names = [*("momentum1", "exp_avg_sq")[: self._num_states], "prev_iter"]
        return [dict(zip(names, of_table, strict=True)) for of_table in self.split_optimizer_states()]


@contextmanager
def own_module_on_cpu(device: torch.device) -> Iterator[None]:
    """What TorchRec shards inside, for a CPU, has `TablesOnCpu` in place of FBGEMM's module."""
    if device.type != "cpu":
        yield
        return
    theirs = batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen
    batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = TablesOnCpu
    try:
        yield
    finally:
        batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = theirs
