"""Looks up without exchanging anything, where one process on CPU holds all tables.

TorchRec sends the ids of each batch to the ranks that hold their tables and gets embeddings back, also where the only
rank would send them to itself. That costs a step of few rows more time than its arithmetic.
Why: docs/decisions/one-process-exchanges-nothing.md.

B rows of the batch.
"""

from typing import Any

from torch import nn
from torchrec.distributed.embeddingbag import ShardedEmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.tables.lookup import TableLookup


def look_up_in_this_process(model: nn.Module) -> bool:
    """Let each collection of tables be asked directly, where one kernel of this process holds all of its tables.

    Args:
        model: sharded, and looked up by our own kernels.

    Returns:
        Whether it holds for all collections of the model, so that nothing is exchanged any more.
    """
    collections = [module for module in model.modules() if isinstance(module, ShardedEmbeddingBagCollection)]
    direct = [_DirectLookup.of(collection) for collection in collections]
    if None in direct:
        return False
    for collection, lookup in zip(collections, direct, strict=True):
        collection.forward = lookup
    return True


class _DirectLookup:
    """Stands in for the forward of a sharded collection of tables."""

    def __init__(self, lookup: TableLookup, tables: list[Any]) -> None:
        self._lookup = lookup
        self._features = [name for table in tables for name in table.feature_names]
        self._names = [name for table in tables for name in table.embedding_names]
        self._dims = [table.embedding_dim for table in tables for _ in table.embedding_names]
        self._room = self._dims[0] if len(set(self._dims)) == 1 else 0

    @classmethod
    def of(cls, collection: ShardedEmbeddingBagCollection) -> "_DirectLookup | None":
        """None where tables are cut, in several kernels, or on other ranks."""
        groups = [group for lookup in collection._lookups for group in getattr(lookup, "_emb_modules", ())]
        if len(groups) != 1 or not isinstance(groups[0].emb_module.forward, TableLookup):
            return None
        tables = groups[0].config.embedding_tables
        are_whole = all(
            (table.local_rows, table.local_cols) == (table.num_embeddings, table.embedding_dim) for table in tables
        )
        has_all = len(tables) == len(collection.module_sharding_plan)
        return cls(groups[0].emb_module.forward, tables) if are_whole and has_all else None

    def __call__(self, features: KeyedJaggedTensor) -> KeyedTensor:
        """Maps a KJT of stride B to the pooled embeddings of each key, [B, sum of D]."""
        keys = features.keys()
        if keys != self._features:
            features = features.permute([keys.index(name) for name in self._features])
        ids = (features.values(), features.offsets(), features.weights_or_none())
        return KeyedTensor(self._names, self._dims, self._lookup(*ids, room=self._room))
