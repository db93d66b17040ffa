"""Lets the ranks of one host look up into, and update from, memory that they share; for tables on CPU.

TorchRec sends pooled embeddings and their gradients through sockets: they are copied into the order of the ranks,
through the kernel, and into the order of the features again. Here each rank writes the embeddings of its tables, for
all rows of the global batch, where the rank that has the row reads them, and that rank leaves the gradients where the
tables read them. Ids, which are few bytes, travel as TorchRec sends them.

In the memory are two matrices, rows in the order of the global batch, each at its place whatever B is:

    embeddings [B, D + F * D]   before those of a row there is room for the dense vector, see `model/room.py`
    gradients  [B, F * D]

Two barriers a step keep the ranks apart:

1. In the forward, after the rank has written its columns of the embeddings: then all columns are there.
2. In the backward, after it has written its rows of the gradients: then all rows are there.

More are not needed. Embeddings are written again in the next forward, after barrier 2 of this step, which a rank
reaches when the backward of all that has read them is done; where a forward had no backward, as in a validation, the
next one begins with a barrier. Gradients are written again after barrier 1 of the next step, which a rank reaches when
its tables are updated.

The barriers are collectives of gloo: a process that has died, or is late, is noticed as anywhere else.
Why: docs/decisions/ranks-of-a-host-exchange-through-memory.md.

B rows of the global batch, F features of the collection, D dimension of all embeddings.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionContext, ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.model.room import with_room
from torchdlrm.shared_memory import AllGather, SharedMemory, this_host
from torchdlrm.tables.lookup import TableLookup, pooled_dtype, scales_of

_PAGE_BYTES = 4096


def look_up_on_one_host(model: nn.Module, all_gather: AllGather, new_group: Callable[[], dist.ProcessGroup]) -> None:
    """Let the ranks exchange embeddings through memory, where all are on one host and hold whole tables.

    Everything else is left as it is: tables that are cut or differ in dimension, embeddings that travel rounded.

    Args:
        model: sharded, and looked up by our own kernels.
        all_gather: exchanges a value with all other ranks.
        new_group: makes a group of all ranks.
    """
    collections = [module for module in model.modules() if isinstance(module, ShardedEmbeddingBagCollection)]
    try:
        mine = this_host(), [_is_suitable(collection) for collection in collections]
    except OSError:
        mine = None
    everyone = all_gather(mine)
    if not collections or None in everyone or len({host for host, _ in everyone}) > 1:
        return
    group = None
    for collection, *is_suitable in zip(collections, *(suitable for _, suitable in everyone), strict=True):
        if all(is_suitable):
            group = group or new_group()
            collection.compute_and_output_dist = _SharedLookup(collection, all_gather, group)


def _kernels(collection: ShardedEmbeddingBagCollection) -> list[Any]:
    return [kernel for lookup in collection._lookups for kernel in getattr(lookup, "_emb_modules", ())]


def _is_suitable(collection: ShardedEmbeddingBagCollection) -> bool:
    """Whether this rank's part is whole tables, of one dimension, in one kernel or none, and nothing is rounded."""
    kernels = _kernels(collection)
    return (
        collection._sharding_types == [ShardingType.TABLE_WISE.value]
        and not collection.qcomm_codecs_registry
        and len({table.embedding_dim for table in collection._embedding_bag_configs}) == 1
        and len(kernels) <= 1
        and all(isinstance(kernel.emb_module.forward, TableLookup) for kernel in kernels)
    )


class _SharedLookup:
    """Stands in for `compute_and_output_dist` of a sharded collection of tables."""

    def __init__(
        self, collection: ShardedEmbeddingBagCollection, all_gather: AllGather, group: dist.ProcessGroup
    ) -> None:
        self._by_torchrec = collection.compute_and_output_dist
        self._all_gather, self._group = all_gather, group
        self._rank, self._num_ranks = dist.get_rank(group), dist.get_world_size(group)
        tables = collection._embedding_bag_configs
        names_by_table = get_embedding_names_by_table(tables)
        self._names = [name for names in names_by_table for name in names]
        self._dim = tables[0].embedding_dim
        self._tables: TableLookup | None = None
        for kernel in _kernels(collection):
            names = dict(zip((table.name for table in tables), names_by_table, strict=True))
            mine = [name for table in kernel.config.embedding_tables for name in names[table.name]]
            columns = np.asarray([self._names.index(name) * self._dim for name in mine])
            self._tables = kernel.emb_module.forward.in_columns(columns)
        # Tells autograd that somebody wants the gradient, also on a rank without tables.
        self._placeholder = torch.zeros(0, requires_grad=True)
        self._memory: SharedMemory | None = None
        self._num_bytes, self._gradients_at, self._is_refused = 0, 0, False
        # Whether others may still read embeddings; and the number of the last forward.
        self._is_read, self._turn = False, 0

    def __call__(self, context: EmbeddingBagCollectionContext, features_by_sharding: list[KeyedJaggedTensor]) -> Any:
        """Maps the ids of this rank's tables, from all ranks, to the pooled embeddings of this rank's rows."""
        (features,), (sharding,) = features_by_sharding, context.sharding_contexts
        num_mine = sharding.batch_size_per_feature_pre_a2a[0]  # of every rank: the loader pads
        num_rows, dtype = num_mine * self._num_ranks, pooled_dtype()
        assert not features.keys() or features.stride() == num_rows, "the ranks have different numbers of rows"
        if context.variable_batch_per_feature or not self._have_memory(num_rows, dtype):
            return self._by_torchrec(context, features_by_sharding)
        pooled = _ExchangedLookup.apply(  # type: ignore[no-untyped-call]
            self._placeholder,
            self,
            features.values().long(),
            features.offsets().long(),
            scales_of(features.weights_or_none()),
            *self._matrices(num_rows, dtype),
            slice(num_mine * self._rank, num_mine * (self._rank + 1)),
        )
        return KeyedTensor(self._names, [self._dim] * len(self._names), pooled)

    def _have_memory(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Make room for so many rows, at the same step on all ranks; False where they cannot share memory."""
        num_bytes = num_rows * self._dim * (2 * len(self._names) + 1) * dtype.itemsize
        if num_bytes > self._num_bytes and not self._is_refused:
            self._memory = SharedMemory.make_for_all("torchdlrm-tables", 2 * _PAGE_BYTES + num_bytes, self._all_gather)
            self._num_bytes, self._is_refused, self._is_read = num_bytes, self._memory is None, False
            embeddings_bytes = num_rows * self._dim * (len(self._names) + 1) * dtype.itemsize
            self._gradients_at = (1 + -(-embeddings_bytes // _PAGE_BYTES)) * _PAGE_BYTES
        return not self._is_refused

    def _matrices(self, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings with room before each row, [B, D + F * D], and gradients, [B, F * D].

        Fewer rows than there is memory for leave the gradients where they are: the embeddings of the next batch may be
        written while another rank still reads the gradients of a shorter one.
        """
        assert self._memory is not None
        num_columns = self._dim * len(self._names)
        embeddings, gradients = (
            # Not parts of one tensor: autograd would take a write to the one for a write to the other.
            torch.frombuffer(self._memory.map, dtype=dtype, count=num_rows * width, offset=start)
            for start, width in ((_PAGE_BYTES, self._dim + num_columns), (self._gradients_at, num_columns))
        )
        return embeddings.view(num_rows, -1), gradients.view(num_rows, -1)

    def look_up(self, embeddings: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> int:
        """Write the embeddings of this rank's tables, and wait for those of the others; the number of this forward."""
        if self._is_read:
            self._wait_for_all()
        if self._tables is not None:
            self._tables.look_up(*ids, embeddings[:, self._dim :])
        self._wait_for_all()
        self._is_read = True
        self._turn += 1
        return self._turn

    def update(self, turn: int, grad: Tensor, gradients: Tensor, rows: slice, *ids: Tensor) -> None:
        """Leave the gradient of this rank's rows for the others, and update this rank's tables with all."""
        assert turn == self._turn, "the embeddings have been overwritten before they were learnt from"
        # The loss is the mean of the ranks' losses; TorchRec divides in the same precision.
        torch.div(grad, self._num_ranks, out=gradients[rows])
        self._wait_for_all()
        self._is_read = False
        if self._tables is not None:
            self._tables.update(gradients, *ids)

    def _wait_for_all(self) -> None:
        dist.barrier(group=self._group)


class _ExchangedLookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        _: Tensor,
        shared: _SharedLookup,
        indices: Tensor,
        offsets: Tensor,
        scales: Tensor,
        embeddings: Tensor,
        gradients: Tensor,
        rows: slice,
    ) -> Tensor:
        ctx.turn = shared.look_up(embeddings, (indices, offsets, scales))
        ctx.shared, ctx.rows = shared, rows
        ctx.save_for_backward(gradients, indices, offsets, scales)
        return with_room(embeddings[rows, shared._dim :], shared._dim)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[None, ...]:
        gradients, *ids = ctx.saved_tensors
        ctx.shared.update(ctx.turn, grad_out, gradients, ctx.rows, *ids)
        return (None,) * 8
