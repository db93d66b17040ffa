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

_SLOTS_PER_ID = 8


class PatchedIndex:
    """Ids of the values of a sparse feature; safe to use from many threads.  `PatchedIndex.of` makes one.

    A value has the base's id, unless it has none there or that id is gone: then it is looked for among the changed
    ones.  A value that gets another id leaves its former one to another value, or free.

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
        # 0, which says that the base does not know a value, and at the end one above all ids, so that a search ends.
        self._gone = np.concatenate([np.array([UNKNOWN_ID], np.int32), gone, np.array([MAX_ID], np.int32)])
        self._gone_at: Sequence[int] = memoryview(self._gone.data)
        # Most ids are not gone, which their last bits tell at once.
        self._may_be_gone = np.zeros(1 << (_SLOTS_PER_ID * len(gone)).bit_length(), np.bool_)
        self._last_bits = len(self._may_be_gone) - 1
        self._may_be_gone[self._gone & self._last_bits] = True
        self._may_be_gone_at: Sequence[bool] = memoryview(self._may_be_gone.data)

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

        Raises:
            ValueError: a value or an id stands in several rows.
        """
        found, all_ids, given_ids = (
            [pl.Series(dtype=KINDS[kind].dtype)],
            [np.empty(0, np.int32)],
            [np.empty(0, np.int32)],
        )
        for values, ids in rows:
            is_other = index.lookup(values).to_numpy() != ids
            found.append(values.filter(pl.Series(is_other)))
            all_ids.append(ids[is_other])
            given_ids.append(ids)
        values, ids = pl.concat(found), np.concatenate(all_ids)
        _check_distinct(values, np.concatenate(given_ids))
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
        _check_distinct(values, ids)
        return cls(index._base, values, ids, np.union1d(index._gone[1:-1], gone), kind, missing_id)

    @property
    def num_changed(self) -> int:
        """Values that have another id than in the base."""
        return len(self._ids)

    @property
    def size_bytes(self) -> int:
        """Of memory that the base does not need."""
        arrays = self._ids.nbytes + self._gone.nbytes + self._may_be_gone.nbytes
        return self._changed.size_bytes + arrays + int(self._values.estimated_size())

    def lookup(self, values: pl.Series) -> pl.Series:
        """As `ValueIndex.lookup`."""
        before = self._base.lookup(values)
        ids = before.to_numpy()
        rows = self._gone_rows(ids)
        if not len(rows):
            return before
        ids = ids.copy()
        ids[rows] = self._changed.lookup(values.gather(rows)).to_numpy()
        return pl.Series(values.name, ids)

    def ids_of_numbers(
        self, numbers: npt.NDArray[np.integer], is_missing: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int32]:
        """As `ValueIndex.ids_of_numbers`."""
        ids = self._base.ids_of_numbers(numbers, is_missing)
        rows = self._gone_rows(ids)
        if len(rows):
            ids[rows] = self._changed.ids_of_numbers(numbers[rows], None if is_missing is None else is_missing[rows])
        return ids

    def id_of(self, value: int | str | None) -> int:
        """As `ValueIndex.id_of`."""
        before = self._base.id_of(value)
        if (
            self._may_be_gone_at[before & self._last_bits]
            and self._gone_at[bisect_left(self._gone_at, before)] == before
        ):
            return self._changed.id_of(value)
        return before

    def _gone_rows(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Where values have to be looked for among the changed ones."""
        rows = np.flatnonzero(self._may_be_gone[ids & self._last_bits])
        if not len(rows):
            return rows
        found = ids[rows]
        return rows[self._gone[np.searchsorted(self._gone, found)] == found]


def _check_distinct(values: pl.Series, ids: npt.NDArray[np.int32]) -> None:
    """See that no value is there twice, which would take long to look up, and no id."""
    if values.n_unique() < len(values) or len(np.unique(ids)) < len(ids):
        raise ValueError("a value or an id stands in several rows")
