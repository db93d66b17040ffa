"""Puts our kernels in the place of FBGEMM's, for tables on CPU.

FBGEMM's CPU kernels run on one core and pass over each row several times. Here one pass looks up, and one updates: it
reads the gradient in the precision in which it arrives. Under autocast the pooled embeddings are written in its
precision at once, which are half the bytes to send, too. The work is dealt out to threads by cells and by ids, not by
tables, and no two threads share a row, so their number does not change a bit of the result.

FBGEMM's module still owns weights and state, so plans, checkpoints and names are those of a GPU.
Why: docs/decisions/tables-on-cpu-have-kernels-of-our-own.md.

Ids may have weights (`KeyedJaggedTensor.weights`), by which their embeddings are multiplied before they are summed. The
weights themselves are data and get no gradient. Here they are called scales: weights are those of the tables.

B rows of the batch, T tables of this kernel, F features, D_t dimension of a table, N ids.
"""

from bisect import bisect_left
from collections.abc import Collection
from copy import copy
from typing import Any

import numpy as np
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import SplitTableBatchedEmbeddingBagsCodegen
from numpy.typing import NDArray
from torch import Tensor, nn

from torchdlrm.kernels.threads import array_of, in_parts
from torchdlrm.model.room import with_room
from torchdlrm.tables.frozen import frozen_forward
from torchdlrm.tables.kernels import Array, look_up, sort_ids
from torchdlrm.tables.optimizers import check_fbgemm_has_it, table_kernels
from torchdlrm.tables.rules import next_rule, state_of
from torchdlrm.tables.updates import update


def use_own_kernels(model: nn.Module, frozen: Collection[str] = ()) -> None:
    """Let our kernels look up and update the tables of a sharded model on CPU; on a GPU FBGEMM's do.

    Args:
        model: sharded.
        frozen: names of tables that stay as they are.

    Raises:
        ConfigError: tables that our kernels are not for, with an optimizer or a weight decay that FBGEMM's have not;
            or one of FBGEMM's kernels holds frozen tables and others.
    """
    for kernel in table_kernels(model):
        if kernel.use_cpu and _is_plain(kernel):
            kernel.forward = TableLookup(kernel, frozen)
            continue
        if kernel.use_cpu:
            check_fbgemm_has_it(kernel)
        if frozen:
            kernel.forward = frozen_forward(kernel, kernel.forward, frozen)


def _is_plain(kernel: SplitTableBatchedEmbeddingBagsCodegen) -> bool:
    """Whether it is what our kernels are for: float32 tables whose embeddings are summed."""
    return (
        kernel.weights_host.dtype == torch.float32
        and kernel.pooling_mode == PoolingMode.SUM
        and list(kernel.feature_table_map) == sorted(kernel.feature_table_map)
        and max(rows for rows, *_ in kernel.embedding_specs) < 2**31
    )


class TableLookup:
    """Stands in for a kernel's `forward`."""

    def __init__(self, kernel: SplitTableBatchedEmbeddingBagsCodegen, frozen: Collection[str] = ()) -> None:
        self._kernel = kernel
        self._is_frozen_T = np.asarray([name in frozen for name in kernel.table_names or kernel.embedding_specs])
        table_F = np.asarray(kernel.feature_table_map)
        self._first_feature_T = np.searchsorted(table_F, np.arange(table_F[-1] + 2))
        first_F = self._first_feature_T[:-1]
        columns = kernel.D_offsets.long().numpy()
        self._column_F, self.num_columns, self._dim_F = columns[:-1], int(columns[-1]), np.diff(columns)
        self._first_weight_F = kernel.weights_offsets.numpy()
        self._num_embeddings_T = np.asarray([rows for rows, *_ in kernel.embedding_specs])
        self._dim_T = self._dim_F[first_F]
        self._states = [
            state_of(kernel, name, first_F, self._dim_T) for name in ("weights", "momentum1", "momentum2", "prev_iter")
        ]
        self._mean_dim, self._max_dim = self.num_columns / len(table_F), self._dim_F.max()
        # Tells autograd that somebody wants the gradient; the tables take theirs during the backward.
        self._placeholder = torch.zeros(0, requires_grad=True)

    def __call__(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, *, room: int = 0
    ) -> Tensor:
        """Maps N ids and the offsets of F x B cells, both int64, to pooled embeddings [B, sum of the features' D].

        `per_sample_weights`, float32 [N], multiply the ids' embeddings. Before each row there is room for as many
        numbers as `room` says.
        """
        return _Lookup.apply(  # type: ignore[no-untyped-call]
            self._placeholder, self, indices.long(), offsets.long(), scales_of(per_sample_weights), room
        )

    def in_columns(self, column_F: NDArray[np.int64]) -> "TableLookup":
        """The same tables, for matrices in which the features' embeddings begin at other columns, int64 [F]."""
        other = copy(self)
        other._column_F = column_F
        return other

    def look_up(self, indices: Tensor, offsets: Tensor, scales: Tensor, out: Tensor) -> None:
        """Write pooled embeddings into `out`, float32 or bfloat16 [B, sum of D]; `scales` are float32 [N] or [0]."""
        stride, flat = _flat(out)
        begins = offsets.numpy()
        arguments = (
            len(out),
            array_of(self._kernel.weights_host),
            self._first_weight_F,
            self._dim_F,
            self._column_F,
            indices.numpy(),
            scales.numpy(),
            begins,
            flat,
            stride,
        )
        cells = range(len(begins) - 1)

        def cell_at(item: int) -> int:
            """A cell with a hundred ids is more work than one with one: items are cells and ids in one line."""
            return bisect_left(cells, item, key=lambda cell: cell + begins[cell])

        in_parts(
            len(cells) + len(indices),
            self._mean_dim / 2,
            lambda first, end: look_up(cell_at(first), cell_at(end), *arguments, self._scratch()),
        )

    def _scratch(self) -> Array:
        """Room for a row of any table."""
        return np.empty(self._max_dim, np.float32)

    def update(self, grad: Tensor, indices: Tensor, offsets: Tensor, scales: Tensor) -> None:
        """Let the optimizer step on the rows that were looked up; `grad` is float32 or bfloat16 [B, sum of D]."""
        stride, flat = _flat(grad)
        cell_ids = (indices.numpy(), scales.numpy(), offsets.numpy())
        rows_N, places_N = np.empty(len(indices), np.int32), np.empty(len(indices), np.int64)
        scales_N = np.empty(len(scales), np.float32)
        num_tables, num_rows = len(self._dim_T), len(grad)
        layout = (num_rows, self._num_embeddings_T, self._first_feature_T, self._column_F, stride)
        in_parts(
            num_tables,
            # Sorting an id takes as long as looking up some ten floats.
            10 * len(indices) / num_tables,
            lambda first, end: sort_ids(first, end, *layout, *cell_ids, rows_N, places_N, scales_N),
        )
        arguments = (
            cell_ids[2][self._first_feature_T[1:] * num_rows],
            self._is_frozen_T,
            rows_N,
            places_N,
            scales_N,
            flat,
            *self._states,
            next_rule(self._kernel),
        )
        in_parts(len(indices), self._mean_dim, lambda first, end: update(first, end, *arguments, self._scratch()))


def scales_of(weights: Tensor | None) -> Tensor:
    """The weights of ids as the kernels take them: float32 [N], or [0] where they have none."""
    return torch.empty(0) if weights is None else weights.detach().float().contiguous()


def pooled_dtype() -> torch.dtype:
    """Pooled embeddings are written in the precision of autocast, where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _flat(matrix: Tensor) -> tuple[int, Array]:
    """The stride from row to row, and the memory from the first number to the last."""
    num_rows, num_columns = matrix.shape
    stride = matrix.stride(0)
    return stride, array_of(matrix.as_strided(((num_rows - 1) * stride + num_columns if num_rows else 0,), (1,)))


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _: Tensor, tables: TableLookup, indices: Tensor, offsets: Tensor, scales: Tensor, room: int
    ) -> Tensor:
        dtype = pooled_dtype()
        num_features = len(tables._dim_F)
        out = torch.empty((len(offsets) - 1) // num_features, room + tables.num_columns, dtype=dtype)[:, room:]
        tables.look_up(indices, offsets, scales, out)
        ctx.tables = tables
        ctx.save_for_backward(indices, offsets, scales)
        return with_room(out, room)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, ...]:
        if grad_out.dtype not in {torch.float32, torch.bfloat16}:
            grad_out = grad_out.float()
        # A gradient that was expanded has one number for all columns.
        grad_out = grad_out if grad_out.stride(1) == 1 else grad_out.contiguous()
        ctx.tables.update(grad_out, *ctx.saved_tensors)
        return (None,) * 6
