"""Holds encoded rows in memory: what a model predicts from.

B rows, F sparse features.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
from numpy.typing import NDArray

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.tables import FeatureTable, from_the_end
from torchdlrm.features.vectors import rows_of

# The ids of all rows one after the other, and where each row's begin: int32 or int64 [values], [B + 1].
Bags = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True)
class EncodedRows:
    """B rows.

    Attributes:
        dense: float32 [B, num_dense], C-contiguous, and behind these the vectors.
        sparse: ids, int32 or int64 [F, B], where every feature of every row has exactly one; else the bags of each
            feature. Of rows that were split, of each table.
        weights: of the ids of each feature's bags, float32 [values], None where they have none; None where no feature
            has some.
        is_filled: which dense values stand for a missing one that no training row lacked, [B, num_dense]; None where
            there is none.  The model does not read it.
    """

    dense: NDArray[np.float32]
    sparse: NDArray[Any] | tuple[Bags, ...]
    weights: tuple[NDArray[np.float32] | None, ...] | None = None
    is_filled: NDArray[np.bool_] | None = None

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.dense)

    def ids_of(self, feature: int) -> NDArray[Any]:
        """The ids of a feature of which every row has one, given its place: [B]."""
        ids = self.sparse[feature]
        return ids[0] if isinstance(ids, tuple) else ids

    @classmethod
    def from_frame(cls, frame: pl.DataFrame, schema: FeatureSchema) -> Self:
        """What `torchdlrm.features.encode.encode` returns."""
        dense = np.empty((frame.height, len(schema.dense)), np.float32)
        for index, column in enumerate(schema.dense):
            dense[:, index] = frame[column.name].to_numpy()
        if schema.content:
            dense = np.hstack([dense, *(rows_of(frame[column.name], column) for column in schema.content)])
        if any(column.is_multi_valued for column in schema.sparse):
            bags = tuple(_bags(frame[column.name]) for column in schema.sparse)
            if not schema.has_value_weights:
                return cls(dense, bags)
            names = [column.weights_name for column in schema.sparse]
            return cls(dense, bags, tuple(None if name is None else _bags(frame[name])[0] for name in names))
        ids_FB = np.empty((len(schema.sparse), frame.height), np.int32)
        for index, feature in enumerate(schema.sparse):
            ids_FB[index] = frame[feature.name].to_numpy()
        return cls(dense, ids_FB)

    def of_keys(self, sources: Sequence[tuple[int, FeatureTable]] | None) -> Self:
        """The same rows with ids for each key; from `features.tables.sources`."""
        if sources is None:
            return self
        if not isinstance(self.sparse, tuple):
            return type(self)(self.dense, np.stack([table.ids(self.sparse[place]) for place, table in sources]))
        bags, weights = [], []
        for place, table in sources:
            ids, offsets = self.sparse[place]
            own = None if self.weights is None else self.weights[place]
            if table.position is not None:
                places, offsets = from_the_end(offsets, table.position)
                ids, own = ids[places], None if own is None else own[places]
            bags.append((table.ids(ids), offsets))
            weights.append(own)
        return type(self)(self.dense, tuple(bags), None if self.weights is None else tuple(weights))

    def part(self, start: int, stop: int) -> Self:
        """Rows `start` to `stop`."""
        dense, filled = self.dense[start:stop], None if self.is_filled is None else self.is_filled[start:stop]
        if not isinstance(self.sparse, tuple):
            return type(self)(dense, self.sparse[:, start:stop], is_filled=filled)
        parts, weights = [], []
        for (values, offsets), own in zip(self.sparse, self.weights or itertools.repeat(None), strict=False):
            part = offsets[start : stop + 1]
            here = slice(part[0], part[-1])
            parts.append((values[here], part - part[0]))
            weights.append(None if own is None else own[here])
        return type(self)(dense, tuple(parts), None if self.weights is None else tuple(weights), filled)

    def flat(self) -> tuple[NDArray[Any], NDArray[np.int32], NDArray[np.float32] | None]:
        """All ids, feature by feature, how many each row has of each feature: [F * B], and `flat_weights`."""
        if not isinstance(self.sparse, tuple):
            return np.ascontiguousarray(self.sparse).reshape(-1), np.ones(self.sparse.size, np.int32), None
        ids = np.concatenate([values.astype(np.int64, copy=False) for values, _ in self.sparse])
        lengths = np.concatenate([np.diff(offsets) for _, offsets in self.sparse]).astype(np.int32)
        return ids, lengths, self.flat_weights()

    def flat_weights(self) -> NDArray[np.float32] | None:
        """The weights of all ids, feature by feature, 1 where they have none; None where no feature has some."""
        if self.weights is None:
            return None
        pairs = zip(self.sparse, self.weights, strict=True)
        return np.concatenate([np.ones(len(ids), np.float32) if own is None else own for (ids, _), own in pairs])


def _bags(column: pl.Series) -> Bags:
    array = column.rechunk().to_arrow()
    if not pa.types.is_large_list(array.type):
        return array.to_numpy(), np.arange(len(array) + 1, dtype=np.int64)
    offsets = array.offsets.to_numpy()
    return array.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0]
