"""The tables of a sharded model: who looks them up and updates them, and how ranks exchange embeddings.

`TrainingSharder` builds them. On GPUs they are TorchRec's and FBGEMM's. On CPU `TablesOfRank` has kernels of our own:
FBGEMM's run on one core and pass over each row several times. Here one pass looks up, and one updates: it reads the
gradient in the precision in which it arrives. Under autocast the pooled embeddings are written in its precision at
once, which are half the bytes to send, too. The work is dealt out to threads by cells and by ids, not by tables, and no
two threads share a row, so their number does not change a bit of the result.

How ranks exchange embeddings and their gradients is known when `ShardedTables` is built:

    nothing       one process holds all tables, whole: `ShardedTables.forward`
    in memory     all ranks are on one host and hold whole tables: `one_host.py`
    by TorchRec   everything else: tables that are cut, embeddings that are rounded to be sent, several hosts

FBGEMM's module still owns weights and state, so plans, checkpoints and names are those of a GPU.
Why: docs/decisions/tables-on-cpu-have-kernels-of-our-own.md, docs/decisions/one-process-exchanges-nothing.md.

Ids may have weights (`KeyedJaggedTensor.weights`), by which their embeddings are multiplied before they are summed. The
weights themselves are data and get no gradient. Here they are called scales: weights are those of the tables.

B rows of the batch, T tables of a rank, F features, D_t dimension of a table, N ids.
"""

from bisect import bisect_left
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.profiler import record_function
from torchrec.distributed import batched_embedding_kernel
from torchrec.distributed.embeddingbag import (
    EmbeddingBagCollectionContext,
    EmbeddingBagCollectionSharder,
    ShardedEmbeddingBagCollection,
)
from torchrec.distributed.types import ParameterSharding, ShardingEnv
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.kernels.threads import array_of, in_parts
from torchdlrm.tables.kernels import Array, look_up, sort_ids
from torchdlrm.tables.one_host import MemoryExchange, Peers
from torchdlrm.tables.state import FrozenTables, Ids, TablesWithState, learnt
from torchdlrm.tables.updates import State, update


class TablesOfRank(TablesWithState):
    """A rank's tables on CPU, which our kernels look up and update.

    Attributes:
        num_columns: of the embeddings of all features.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        table_F = np.asarray(self.feature_table_map)
        self._first_feature_T = np.searchsorted(table_F, np.arange(table_F[-1] + 2))
        columns = self.D_offsets.long().cpu().numpy()
        self._column_F, self.num_columns, self._dim_F = columns[:-1], int(columns[-1]), np.diff(columns)
        self._first_weight_F = self.weights_offsets.cpu().numpy()
        self._num_embeddings_T = np.asarray([rows for rows, *_ in self.embedding_specs])
        self._mean_dim, self._max_dim = self.num_columns / len(table_F), self._dim_F.max()

    @cached_property
    def _states(self) -> list[State]:
        return [self.state_of(name) for name in ("weights", "momentum1", "momentum2", "prev_iter")]

    def forward(
        self, indices: Tensor, offsets: Tensor, per_sample_weights: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Maps N ids and the offsets of F x B cells to pooled embeddings [B, sum of the features' D].

        `per_sample_weights`, float32 [N], multiply the ids' embeddings.
        """
        assert not others, f"only FBGEMM's kernels know {', '.join(others)}"
        ids = Ids.of(indices, offsets, per_sample_weights)
        pooled = torch.empty((len(offsets) - 1) // len(self._dim_F), self.num_columns, dtype=_pooled_dtype())
        self.look_up(ids, pooled)
        return learnt(pooled, self.update, ids)

    def look_up(self, ids: Ids, out: Tensor, column_F: NDArray[np.int64] | None = None) -> None:
        """Write pooled embeddings.

        Args:
            ids: of B rows.
            out: float32 or bfloat16 [B, columns].
            column_F: of the first number of each feature's embedding in `out`; None: one is behind the other.
        """
        stride, flat = _flat(out)
        begins = ids.offsets.numpy()
        arguments = (
            len(out),
            array_of(self.weights_host),
            self._first_weight_F,
            self._dim_F,
            self._column_F if column_F is None else column_F,
            ids.indices.numpy(),
            ids.scales.numpy(),
            begins,
            flat,
            stride,
        )
        cells = range(len(begins) - 1)

        def cell_at(item: int) -> int:
            """A cell with a hundred ids is more work than one with one: items are cells and ids in one line."""
            return bisect_left(cells, item, key=lambda cell: cell + begins[cell])

        with record_function("tables: look up"):  # by which name profiles know it
            in_parts(
                len(cells) + len(ids.indices),
                self._mean_dim / 2,
                lambda first, end: look_up(cell_at(first), cell_at(end), *arguments, self._scratch()),
            )

    def update(self, grad: Tensor, ids: Ids, column_F: NDArray[np.int64] | None = None) -> None:
        """Let the optimizer step on the rows that were looked up; `grad` is that of what `look_up` has written."""
        if grad.dtype not in {torch.float32, torch.bfloat16}:
            grad = grad.float()
        # A gradient that was expanded has one number for all columns.
        stride, flat = _flat(grad if grad.stride(1) == 1 else grad.contiguous())
        num_ids, cell_ids = len(ids.indices), (ids.indices.numpy(), ids.scales.numpy(), ids.offsets.numpy())
        rows_N, places_N = np.empty(num_ids, np.int32), np.empty(num_ids, np.int64)
        scales_N = np.empty(len(ids.scales), np.float32)
        num_tables, num_rows = len(self._num_embeddings_T), len(grad)
        column_F = self._column_F if column_F is None else column_F
        layout = (num_rows, self._num_embeddings_T, self._first_feature_T, column_F, stride)
        in_parts(
            num_tables,
            # Sorting an id takes as long as looking up some ten floats.
            10 * num_ids / num_tables,
            lambda first, end: sort_ids(first, end, *layout, *cell_ids, rows_N, places_N, scales_N),
        )
        arguments = (
            cell_ids[2][self._first_feature_T[1:] * num_rows],
            self.is_frozen_T,
            rows_N,
            places_N,
            scales_N,
            flat,
            *self._states,
            self.next_rule(),
        )
        in_parts(num_ids, self._mean_dim, lambda first, end: update(first, end, *arguments, self._scratch()))

    def _scratch(self) -> Array:
        """Room for a row of any table."""
        return np.empty(self._max_dim, np.float32)


def _pooled_dtype() -> torch.dtype:
    """Pooled embeddings are written in the precision of autocast, where it is on."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32


def _flat(matrix: Tensor) -> tuple[int, Array]:
    """The stride from row to row, and the memory from the first number to the last."""
    num_rows, num_columns = matrix.shape
    stride = matrix.stride(0)
    return stride, array_of(matrix.as_strided(((num_rows - 1) * stride + num_columns if num_rows else 0,), (1,)))


class ShardedTables(ShardedEmbeddingBagCollection):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's sharded collection of tables, on CPU: ranks exchange no more than they must.

    Attributes:
        exchanges_nothing: whether this process alone holds all tables.
    """

    def __init__(self, *arguments: Any, peers: Peers, **named: Any) -> None:
        """Build this rank's part, as TorchRec does, and choose how ranks exchange; every rank must call this."""
        super().__init__(*arguments, **named)
        groups = [group for lookup in self._lookups for group in getattr(lookup, "_emb_modules", ())]
        # In a list, like TorchRec's lookups: as an attribute it would be a child, whose weights had two names.
        self._tables: list[TablesOfRank] = [group.emb_module for group in groups]
        self.exchanges_nothing, self._memory = False, None
        configs = [config for group in groups for config in group.config.embedding_tables]
        if self._env.world_size > 1:
            mine = [name for config in configs for name in config.embedding_names]
            self._memory = MemoryExchange.of(self, self._tables, mine, peers)
        elif len(groups) == 1 and len(configs) == len(self.module_sharding_plan):
            self.exchanges_nothing = all(
                (config.local_rows, config.local_cols) == (config.num_embeddings, config.embedding_dim)
                for config in configs
            )
            self._features = [name for config in configs for name in config.feature_names]
            self._names = [name for config in configs for name in config.embedding_names]
            self._dims = [config.embedding_dim for config in configs for _ in config.embedding_names]

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Maps a KJT of stride B to the pooled embeddings of each key, [B, sum of D].

        TorchRec would send the ids to the ranks that hold their tables and get embeddings back, also where the only
        rank sends them to itself. That costs a step of few rows more time than its arithmetic.
        """
        if not self.exchanges_nothing:
            return super().forward(features)
        keys, (tables,) = features.keys(), self._tables
        if keys != self._features:
            features = features.permute([keys.index(name) for name in self._features])
        ids = Ids.of(features.values(), features.offsets(), features.weights_or_none())
        pooled = torch.empty(features.stride(), tables.num_columns, dtype=_pooled_dtype())
        tables.look_up(ids, pooled)
        return KeyedTensor(self._names, self._dims, learnt(pooled, tables.update, ids))

    def compute_and_output_dist(self, ctx: EmbeddingBagCollectionContext, input: Any) -> Any:  # noqa: A002 - TorchRec's
        """Maps the ids of this rank's tables, from all ranks, to the pooled embeddings of this rank's rows."""
        if self._memory is not None and not ctx.variable_batch_per_feature:
            (features,), (sharding,) = input, ctx.sharding_contexts
            ids = Ids.of(features.values(), features.offsets(), features.weights_or_none())
            num_rows = sharding.batch_size_per_feature_pre_a2a[0]  # of every rank: the loader pads
            found = self._memory.look_up(num_rows, _pooled_dtype(), ids)
            if found is not None:
                names = self._memory.names
                return KeyedTensor(names, [self._memory.dim] * len(names), learnt(*found, ids))
        return super().compute_and_output_dist(ctx, input)


class TrainingSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec is untyped
    """Builds the tables of a sharded model.

    Args:
        fused_params: `torchdlrm.tables.optimizers.fused_params`.
        codecs: TorchRec's registry of what embeddings are encoded with between ranks.
        peers: the processes that share the tables.
        frozen: names of tables that no step changes.
    """

    def __init__(
        self, fused_params: dict[str, Any], codecs: dict[str, Any] | None, peers: Peers, frozen: Collection[str] = ()
    ) -> None:
        super().__init__(fused_params=fused_params, qcomm_codecs_registry=codecs)
        self._peers, self._frozen = peers, frozenset(frozen)

    def shard(
        self,
        module: EmbeddingBagCollection,
        params: dict[str, ParameterSharding],
        env: ShardingEnv,
        device: torch.device | None = None,
        module_fqn: str | None = None,
    ) -> ShardedEmbeddingBagCollection:
        """Build a rank's part of a collection."""
        named = {"device": device, "qcomm_codecs_registry": self.qcomm_codecs_registry, "module_fqn": module_fqn}
        fused_params = dict(self.fused_params or {})
        if device is None or device.type == "cpu":
            fused_params["frozen"] = self._frozen
            with _in_place_of_fbgemms(TablesOfRank):
                return ShardedTables(module, params, env, fused_params=fused_params, peers=self._peers, **named)
        with _in_place_of_fbgemms(FrozenTables) if self._frozen else nullcontext():
            return ShardedEmbeddingBagCollection(module, params, env, fused_params=fused_params, **named)


@contextmanager
def _in_place_of_fbgemms(kind: type[nn.Module]) -> Iterator[None]:
    """What TorchRec builds inside has modules of this kind in place of FBGEMM's."""
    theirs = batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen
    batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = kind
    try:
        yield
    finally:
        batched_embedding_kernel.SplitTableBatchedEmbeddingBagsCodegen = theirs
