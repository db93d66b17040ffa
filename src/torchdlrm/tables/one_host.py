"""Lets the ranks of one host look up into, and update from, memory that they share; for tables on CPU.

Each rank writes the embeddings of its tables, for all rows of the global batch, where the rank that has the row reads
them, and that rank leaves the gradients where the tables read them. Ids, which are few bytes, travel as TorchRec sends
them.

In the memory are two matrices, rows in the order of the global batch, each at its place whatever B is:

    embeddings [B, F * D]
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

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.distributed.types import ShardingType
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from torchdlrm.shared_memory import SharedMemory, this_host
from torchdlrm.tables.state import Ids

if TYPE_CHECKING:
    from torchdlrm.tables.collection import TablesOfRank

_PAGE_BYTES = 4096


class Peers(Protocol):
    """All processes of a training, this one among them."""

    def all_gather(self, value: Any) -> Sequence[Any]:
        """The values of all ranks, by rank; every rank must call this."""

    def new_group(self) -> dist.ProcessGroup:
        """All processes once more; every rank must call this."""


class MemoryExchange:
    """Looks up all tables for this rank's rows of the batch, through memory.

    Attributes:
        names: of the embeddings, in the order of their columns.
        dim: D.
    """

    def __init__(
        self, tables: "TablesOfRank | None", mine: Sequence[str], names: Sequence[str], dim: int, peers: Peers
    ) -> None:
        self._tables, self._peers, self._group = tables, peers, peers.new_group()
        self._rank, self._num_ranks = dist.get_rank(self._group), dist.get_world_size(self._group)
        self.names, self.dim = list(names), dim
        self._column_F = np.asarray([self.names.index(name) * dim for name in mine])
        self._memory: SharedMemory | None = None
        self._num_bytes, self._gradients_at, self._is_refused = 0, 0, False
        # Whether others may still read embeddings; and the number of the last forward.
        self._is_read, self._turn = False, 0

    @classmethod
    def of(
        cls,
        collection: ShardedEmbeddingBagCollection,
        tables: Sequence["TablesOfRank"],
        mine: Sequence[str],
        peers: Peers,
    ) -> "MemoryExchange | None":
        """The exchange of ranks that are all on one host, and hold whole tables; every rank must call this.

        `tables` are those of this rank in a collection that was just built, `mine` the names of their embeddings.

        Returns:
            None, on every rank, where tables are cut or differ in dimension, or embeddings travel rounded.
        """
        configs = collection._embedding_bag_configs
        is_suitable = (
            len(tables) <= 1
            and collection._sharding_types == [ShardingType.TABLE_WISE.value]
            and not collection.qcomm_codecs_registry
            and len({config.embedding_dim for config in configs}) == 1
        )
        try:
            host = this_host() if is_suitable else None
        except OSError:
            host = None
        hosts = peers.all_gather(host)
        if None in hosts or len(set(hosts)) > 1:
            return None
        names = [name for names in get_embedding_names_by_table(configs) for name in names]
        return cls(tables[0] if tables else None, mine, names, configs[0].embedding_dim, peers)

    def look_up(
        self, num_mine: int, dtype: torch.dtype, ids: Ids
    ) -> tuple[Tensor, Callable[[Tensor, Ids], None]] | None:
        """Write the embeddings of this rank's tables, and wait for those of the others.

        Args:
            num_mine: rows of the batch on each rank.
            dtype: of the embeddings.
            ids: of this rank's tables, from all ranks.

        Returns:
            The embeddings of this rank's rows, and what all tables learn by their gradient; None, on every rank, where
            they cannot share memory.
        """
        num_rows = num_mine * self._num_ranks
        has_rows_of_all = self._tables is None or len(ids.offsets) == num_rows * len(self._column_F) + 1
        assert has_rows_of_all, "the ranks have different numbers of rows"
        if not self._have_memory(num_rows, dtype):
            return None
        embeddings, gradients = self._matrices(num_rows, dtype)
        if self._is_read:
            self._wait_for_all()
        if self._tables is not None:
            self._tables.look_up(ids, embeddings, self._column_F)
        self._wait_for_all()
        self._is_read = True
        self._turn += 1
        rows = slice(num_mine * self._rank, num_mine * (self._rank + 1))
        return embeddings[rows], partial(self._update, self._turn, gradients, rows)

    def _update(self, turn: int, gradients: Tensor, rows: slice, grad: Tensor, ids: Ids) -> None:
        """Leave the gradient of this rank's rows for the others, and update this rank's tables with all."""
        assert turn == self._turn, "the embeddings have been overwritten before they were learnt from"
        # The loss is the mean of the ranks' losses; TorchRec divides in the same precision.
        torch.div(grad, self._num_ranks, out=gradients[rows])
        self._wait_for_all()
        self._is_read = False
        if self._tables is not None:
            self._tables.update(gradients, ids, self._column_F)

    def _have_memory(self, num_rows: int, dtype: torch.dtype) -> bool:
        """Make room for `num_rows`, at the same step on all ranks; False where they cannot share memory."""
        num_bytes = num_rows * self.dim * len(self.names) * dtype.itemsize  # of one of both matrices
        if num_bytes > self._num_bytes and not self._is_refused:
            num_pages = 1 + 2 * -(-num_bytes // _PAGE_BYTES)
            self._memory = SharedMemory.make_for_all(
                "torchdlrm-tables", num_pages * _PAGE_BYTES, self._peers.all_gather
            )
            self._num_bytes, self._is_refused, self._is_read = num_bytes, self._memory is None, False
            self._gradients_at = (1 + num_pages) // 2 * _PAGE_BYTES
        return not self._is_refused

    def _matrices(self, num_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Embeddings and gradients, [B, F * D] each.

        Fewer rows than there is memory for leave the gradients where they are: the embeddings of the next batch may be
        written while another rank still reads the gradients of a shorter one.
        """
        assert self._memory is not None
        embeddings, gradients = (
            # Not parts of one tensor: autograd would take a write to the one for a write to the other.
            torch.frombuffer(self._memory.map, dtype=dtype, count=num_rows * self.dim * len(self.names), offset=start)
            for start in (_PAGE_BYTES, self._gradients_at)
        )
        return embeddings.view(num_rows, -1), gradients.view(num_rows, -1)

    def _wait_for_all(self) -> None:
        dist.barrier(group=self._group)
