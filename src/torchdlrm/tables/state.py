"""FBGEMM's module of a rank's tables, which owns their weights and state: on CPU with every optimizer, on GPUs frozen.

On CPU it has the state of optimizers that FBGEMM has for GPUs alone, and gives our kernels the rule of a step. FBGEMM
refuses to build those for a CPU. The module is built with one that is accepted, and then given the state that it has on
a GPU, under the same names: TorchRec makes the optimizer's state dict of these, so a run moves between GPU and CPU.

F features, T tables.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
    construct_split_state,
)
from torch import Tensor, nn

from torchdlrm.tables.huge_pages import use_huge_pages
from torchdlrm.tables.optimizers import record_of
from torchdlrm.tables.updates import KINDS, Rule, State

# By whether the first state is a value a row, where there is one.
_ACCEPTED = {
    (): EmbOptimType.EXACT_SGD,
    (False,): EmbOptimType.EXACT_ADAGRAD,
    (True,): EmbOptimType.EXACT_ROWWISE_ADAGRAD,
}


class FrozenTables(SplitTableBatchedEmbeddingBagsCodegen):  # type: ignore[misc]  # FBGEMM is untyped
    """FBGEMM's module of which no step changes a table: its kernels on GPUs update all tables of a rank or none."""

    def forward(self, indices: Tensor, offsets: Tensor, *more: Any, **named: Any) -> Tensor:
        """FBGEMM's lookup, without an update in its backward, in which other ranks may wait for this one's part."""
        with torch.no_grad():
            found = super().forward(indices, offsets, *more, **named)
        return learnt(found, lambda *_: None, Ids.of(indices, offsets, None))


class TablesWithState(SplitTableBatchedEmbeddingBagsCodegen):  # type: ignore[misc]  # FBGEMM is untyped
    """FBGEMM's module on CPU, with the optimizers that FBGEMM has for GPUs alone.

    Attributes:
        is_frozen_T: which tables stay as they are.
        is_lazy: whether a row catches up on the weight decay of steps that did not look it up. Then `prev_iter_host`
            holds the last step of each row, int32, 0 for none.
    """

    def __init__(
        self,
        embedding_specs: Sequence[tuple[int, int, Any, Any]],
        *,
        optimizer: EmbOptimType = EmbOptimType.EXACT_SGD,
        is_lazy: bool = False,
        frozen: Collection[str] = (),
        **settings: Any,
    ) -> None:
        """Make tables and state of zeros.

        Args:
            embedding_specs: rows, dimension, location and device of each table.
            optimizer: any that has a record.
            is_lazy: of the weight decay.
            frozen: names of tables that no step changes.
            settings: as FBGEMM's module takes them.
        """
        states = record_of(optimizer).states_are_per_row
        # The one with the same first state: as many values, in the same place.
        super().__init__(embedding_specs, optimizer=_ACCEPTED[states[:1]], **settings)
        # What our kernels rely on.
        assert self.weights_host.dtype == torch.float32
        assert self.pooling_mode == PoolingMode.SUM
        assert list(self.feature_table_map) == sorted(self.feature_table_map)
        assert max(rows for rows, *_ in embedding_specs) < 2**31
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
        self.is_frozen_T = np.asarray([name in frozen for name in self.table_names or embedding_specs])
        use_huge_pages(self)

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
            return super().get_optimizer_state()
        names = [*("momentum1", "exp_avg_sq")[: self._num_states], "prev_iter"]
        return [dict(zip(names, of_table, strict=True)) for of_table in self.split_optimizer_states()]

    def next_rule(self) -> Rule:
        """The rule of the next step, which is counted with this."""
        step = self.iter_cpu.add_(1).item()
        args, record = self.optimizer_args, record_of(self.optimizer)
        rate, decay = self.learning_rate_tensor.item(), args.weight_decay
        adds_to_gradient = args.weight_decay_mode == WeightDecayMode.L2
        is_in_ratio = record.momentum == "lamb"
        return Rule(
            kind=KINDS[record.name],
            rate=np.float32(rate),
            eps=np.float32(args.eps),
            beta1=np.float32(args.beta1),
            beta2=np.float32(args.beta2),
            rest1=np.float32(1 - args.beta1),
            rest2=np.float32(1 - args.beta2),
            unbias1=np.float32(1 / (1 - args.beta1**step)),
            unbias2=np.float32(1 / (1 - args.beta2**step)),
            l2=np.float32(decay if adds_to_gradient else 0),
            in_ratio=np.float32(decay if is_in_ratio and not adds_to_gradient else 0),
            keeps=1.0 if adds_to_gradient or is_in_ratio else 1 - rate * decay,
            step=step if self.is_lazy else 0,
        )

    def state_of(self, name: str) -> State:
        """Where a kind of state is, such as momentum1; there are no values of it where the optimizer has none."""
        rows_T, dim_T = (np.asarray([spec[i] for spec in self.embedding_specs]) for i in range(2))
        values = getattr(self, f"{name}_host").detach().numpy()
        dtype = np.int32 if name == "prev_iter" else np.float32
        if values.dtype != dtype:  # FBGEMM's placeholder
            return State(np.empty(0, dtype), np.zeros_like(dim_T), np.zeros_like(dim_T))
        first_feature_T = np.searchsorted(self.feature_table_map, np.arange(len(dim_T)))
        begins = getattr(self, f"{name}_offsets").numpy()[first_feature_T]
        return State(values, begins, dim_T if len(values) == rows_T @ dim_T else np.ones_like(dim_T))


class Ids(NamedTuple):
    """The ids of some features, cell by cell.

    Attributes:
        indices: the ids, int64 [N].
        offsets: where in them each cell begins, and N: int64 [F * B + 1].
        scales: by which their embeddings are multiplied, float32 [N]; or none [0].
    """

    indices: Tensor
    offsets: Tensor
    scales: Tensor

    @classmethod
    def of(cls, indices: Tensor, offsets: Tensor, weights: Tensor | None) -> "Ids":
        """Those that TorchRec gives, in these types."""
        scales = torch.empty(0) if weights is None else weights.detach().float().contiguous()
        return cls(indices.long(), offsets.long(), scales)


def learnt(pooled: Tensor, learn: Callable[[Tensor, Ids], object], ids: Ids) -> Tensor:
    """The embeddings, of whose gradient `learn(gradient, ids)` makes an update of the tables in the backward."""
    return _Learnt.apply(_ASKS_FOR_GRADIENTS, pooled, learn, *ids)  # type: ignore[no-untyped-call]


class _Learnt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, pooled: Tensor, learn: Callable[[Tensor, Ids], object], *ids: Tensor) -> Tensor:
        ctx.learn = learn
        ctx.save_for_backward(*ids)
        return pooled.data  # no view to autograd: a model may change it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        ctx.learn(grad, Ids(*ctx.saved_tensors))
        return (None,) * len(ctx.needs_input_grad)


# Tells autograd that a gradient is wanted; the tables take theirs during the backward.
_ASKS_FOR_GRADIENTS = torch.zeros(0, requires_grad=True)
