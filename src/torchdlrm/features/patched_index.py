"""Looks up values in an index and a few that came, moved or went since: a vocabulary that changes while it is in use.

In: a `ValueIndex`, mapped, and the rows of the vocabulary that changed.  Out: an index with the same surface, which
needs memory for these alone.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.features.kinds import KINDS, SparseKindName
from torchdlrm.features.value_index import ValueIndex
from torchdlrm.features.vocabulary import MAX_ID, UNKNOWN_ID


class PatchedIndex:
    """Ids of the values of a sparse feature; safe to use from many threads.  `PatchedIndex.of` makes one.

    A value that is among the changed ones has its id from there; any other has the base's, unless that id is gone.

    Args:
        base: of the vocabulary before.
        values: that have an id which the base does not give them, none null.
        ids: of each, int32.
        gone: ids that stand no longer for what they do in the base, int32, ascending.
        kind: of the values.
        missing_id: of a missing value; 0 where it has none.
    """

    def __init__(
        self,
        base: ValueIndex,
        values: pl.Series,
        ids: npt.NDArray[np.int32],
        gone: npt.NDArray[np.int32],
        kind: SparseKindName,
        missing_id: int,
    ) -> None:
        self._base, self._values, self._ids = base, values, ids
        self._changed = ValueIndex.of(values, ids, kind, missing_id)
        self.missing_id = missing_id
        self._gone = np.append(gone, np.int32(MAX_ID))  # above all ids, so that a search ends within
        self._gone_at: Sequence[int] = memoryview(self._gone.data)

    @classmethod
    def of(
        cls,
        index: "ValueIndex | Self",
        rows: Iterable[tuple[pl.Series, npt.NDArray[np.int32]]],
        removed_ids: npt.NDArray[np.int32],
        kind: SparseKindName,
    ) -> "ValueIndex | Self":
        """An index of the vocabulary after some rows of it were removed, added or replaced.

        Args:
            index: of the vocabulary before.
            rows: that were added or replaced, if only in their counts, in pieces: values, at most one of them all null,
                and their ids.
            removed_ids: of the rows that were removed.
            kind: of the values.

        Returns:
            The index itself where no value has another id.
        """
        found, all_ids = [pl.Series(dtype=KINDS[kind].dtype)], [np.empty(0, np.int32)]
        for values, ids in rows:
            is_other = index.lookup(values).to_numpy() != ids
            found.append(values.filter(pl.Series(is_other)))
            all_ids.append(ids[is_other])
        values, ids = pl.concat(found), np.concatenate(all_ids)
        gone = np.union1d(removed_ids, ids).astype(np.int32)
        if not len(gone):
            return index
        is_missing = values.is_null()
        if is_missing.any():
            missing_id = int(ids[is_missing.to_numpy()][0])
        else:
            missing_id = UNKNOWN_ID if index.missing_id in gone else index.missing_id
        values, ids = values.drop_nulls(), ids[~is_missing.to_numpy()]
        if isinstance(index, ValueIndex):
            return cls(index, values, ids, gone, kind, missing_id)
        stay = ~np.isin(index._ids, gone)
        values, ids = pl.concat([index._values.filter(pl.Series(stay)), values]), np.append(index._ids[stay], ids)
        return cls(index._base, values, ids, np.union1d(index._gone[:-1], gone), kind, missing_id)

    @property
    def num_changed(self) -> int:
        """Values that have another id than in the base."""
        return len(self._ids)

    @property
    def size_bytes(self) -> int:
        """Of memory that the base does not need."""
        return self._changed.size_bytes + self._ids.nbytes + self._gone.nbytes + int(self._values.estimated_size())

    def lookup(self, values: pl.Series) -> pl.Series:
        """As `ValueIndex.lookup`."""
        changed, before = (index.lookup(values).to_numpy() for index in (self._changed, self._base))
        return pl.Series(values.name, self._joined(changed, before))

    def ids_of_numbers(
        self, numbers: npt.NDArray[np.integer], is_missing: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int32]:
        """As `ValueIndex.ids_of_numbers`."""
        changed, before = (index.ids_of_numbers(numbers, is_missing) for index in (self._changed, self._base))
        return self._joined(changed, before)

    def id_of(self, value: int | str | None) -> int:
        """As `ValueIndex.id_of`."""
        if (found := self._changed.id_of(value)) != UNKNOWN_ID:
            return found
        before = self._base.id_of(value)
        is_gone = self._gone_at[bisect_left(self._gone_at, before)] == before
        return UNKNOWN_ID if is_gone else before

    def _joined(self, changed: npt.NDArray[np.int32], before: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        is_gone = self._gone[np.searchsorted(self._gone, before)] == before
        return np.where(changed != UNKNOWN_ID, changed, np.where(is_gone, np.int32(UNKNOWN_ID), before))
