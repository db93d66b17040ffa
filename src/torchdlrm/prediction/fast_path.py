"""Encodes plain JSON rows for the model, without columns in between.

In: rows as mappings from column name to cell.  Out: the same bits that `json_rows` and `features.encode` give,
or None where a row needs those: they know every cell that a log may hold, and which one is wrong.  But they cost some
forty calls of Polars, whatever the number of rows: a millisecond for one row, where this takes a tenth.
Why: docs/decisions/a-row-has-a-fast-and-a-slow-path.md.

| column | a plain cell, apart from null and an absent one |
| --- | --- |
| int | a JSON integer of 64 bits |
| float | a finite JSON number |
| hex | a text of 8 digits, or an empty one |
| string | a text that is not too long |
| vector | a list of finite JSON numbers |

A cell that is one of the column's `null_values` is missing.

B rows, D dense columns of the same kind, transform and null values, F sparse features of the same kind and null values.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.bundle import ServedVocabulary
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.features.casts import null_numbers
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.encode import encode_sparse
from torchdlrm.features.kinds import ValueKind
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import DenseTransform
from torchdlrm.features.value_hash import hash_integers
from torchdlrm.features.vectors import encoded_rows, plain_rows
from torchdlrm.prediction.json_rows import MAX_CELL_CHARACTERS, Part, Row, cells_of, parts_of

Vocabularies = Mapping[str, ServedVocabulary]
# Up to this many rows an id is found faster by itself than by a dozen calls of NumPy for the column.
_FEW_ROWS = 16
# The ids of these buckets are a table, not searched in an index: the 13 bucket features of a row take 19 us.
_TABLED_BUCKETS = range(-64, 2_048)


class PlainRowEncoder:
    """Encodes the plain rows of a schema; safe to use from many threads.

    Args:
        schema: the columns.
        dense: the fitted transform of each dense column.
        vocabularies: of each sparse column that is not hashed.
    """

    def __init__(
        self,
        schema: FeatureSchema,
        dense: Mapping[str, DenseTransform],
        vocabularies: Vocabularies,
    ) -> None:
        self._has_lists = any(column.is_multi_valued for column in schema.sparse)
        self._num_dense, self._num_sparse, self._content = len(schema.dense), len(schema.sparse), schema.content
        # A label is checked by the slow path; what else is no feature may stand in a row and is not read.
        self._names = frozenset(column.name for column in schema.columns if not isinstance(column, LabelColumn))
        alike_dense: dict[tuple[object, ...], list[int]] = {}
        for i, column in enumerate(schema.dense):
            alike_dense.setdefault((column.kind, column.null_values, dense[column.name]), []).append(i)
        self._dense = [
            _DenseGroup([schema.dense[i] for i in places], places, dense[schema.dense[places[0]].name])
            for places in alike_dense.values()
        ]
        alike: dict[tuple[object, ...], list[int]] = {}
        for i, feature in enumerate(schema.sparse):
            same = (feature.kind, feature.hash is not None, feature.null_values, feature.buckets)
            alike.setdefault(same, []).append(i)
        self._sparse: list[_NumberFeatures | _TextFeatures] = []
        for places in alike.values():
            features = [schema.sparse[i] for i in places]
            group = _TextFeatures if features[0].value_kind.is_text else _NumberFeatures
            self._sparse.append(group(features, places, vocabularies))

    def encode(self, rows: Sequence[Row]) -> EncodedRows | None:
        """What the model reads of B rows, or None where one of them is not plain or has a cell that is wrong."""
        if self._has_lists or not rows:
            return None
        parts = parts_of(rows)
        for shared, own in parts:
            if not self._names.issuperset(shared):
                return None
            for row in own:
                if type(row) is not dict or not self._names.issuperset(row):
                    return None
        width = self._num_dense + sum(column.size or 0 for column in self._content)
        dense_BD, filled = np.empty((len(rows), width), np.float32), None
        ids_FB = np.empty((self._num_sparse, len(rows)), np.int32)
        try:
            for group in self._dense:
                is_missing = group.encode(parts, dense_BD)
                if group.never_missing and is_missing is not None:
                    filled = np.zeros(dense_BD.shape, np.bool_) if filled is None else filled
                    filled[:, group.places] = is_missing.reshape(len(group.places), -1).T
            vectors = [
                encoded_rows(plain_rows(cells_of(parts, [column.name]), column), column) for column in self._content
            ]
            dense_BD[:, self._num_dense :] = np.concatenate(vectors, axis=1) if vectors else 0
            for features in self._sparse:
                features.encode(parts, ids_FB)
        except (ValueError, OverflowError):
            return None
        return EncodedRows(dense_BD, ids_FB, is_filled=None if filled is None or not filled.any() else filled)


class _DenseGroup:
    """Dense columns of one kind and one transform, some of whose cells may be missing, or never were in training."""

    def __init__(self, columns: Sequence[DenseColumn], places: list[int], fitted: DenseTransform) -> None:
        self._names = [column.name for column in columns]
        self._kind, self.places, self._fitted = columns[0].value_kind, places, fitted
        self.never_missing = fitted.never_missing
        self._nulls = null_numbers(columns[0]).to_numpy()

    def encode(self, parts: Sequence[Part], dense_BD: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Write the columns; which cells of them are missing, one column after another, None where none is."""
        values, is_missing = _numbers(parts, self._names, self._kind, self._nulls)
        numbers = values.astype(np.float64)
        if is_missing is not None:
            numbers[is_missing] = math.nan
        dense_BD[:, self.places] = self._fitted.of_numbers(numbers).reshape(len(self.places), -1).T
        return is_missing


class _NumberFeatures:
    """Sparse features of one kind of numbers and the same buckets, all with a vocabulary or all hashed."""

    def __init__(self, features: Sequence[SparseColumn], places: list[int], vocabularies: Vocabularies) -> None:
        self._names = [feature.raw_name for feature in features]
        self._places, self._kind = places, features[0].value_kind
        buckets = features[0].buckets
        self._bucketing = None if buckets is None else buckets.bucketing
        self._nulls = null_numbers(features[0]).to_numpy()
        self._hash_sizes = np.array([[feature.hash] for feature in features if feature.hash is not None], np.uint64)
        self._vocabularies = [vocabularies[feature.name] for feature in features if feature.hash is None]
        if self._bucketing is not None and self._vocabularies:
            tabled = [vocabulary.ids_of_numbers(np.array(_TABLED_BUCKETS)) for vocabulary in self._vocabularies]
            self._bucket_ids = np.stack(tabled)  # [F, buckets]
            self._missing_ids = np.array([[vocabulary.id_of(None)] for vocabulary in self._vocabularies], np.int32)
            self._features = np.arange(len(tabled))[:, None]

    def encode(self, parts: Sequence[Part], ids_FB: NDArray[np.int32]) -> None:
        numbers, is_missing = _numbers(parts, self._names, self._kind, self._nulls)
        num_rows = ids_FB.shape[1]
        if self._bucketing is not None:
            numbers = self._bucketing.of_numbers(numbers)
            first, last = _TABLED_BUCKETS[0], _TABLED_BUCKETS[-1]
            if self._vocabularies and first <= numbers.min() and numbers.max() <= last:
                found = self._bucket_ids[self._features, numbers.reshape(-1, num_rows) - first]
                if is_missing is not None:
                    found = np.where(is_missing.reshape(-1, num_rows), self._missing_ids, found)
                ids_FB[self._places] = found
                return
        if not self._vocabularies:
            hashes_FB = hash_integers(numbers.astype(np.int64), is_missing).reshape(-1, num_rows)
            ids_FB[self._places] = hashes_FB % self._hash_sizes
        elif num_rows <= _FEW_ROWS:
            values = numbers.tolist()
            if is_missing is not None:
                for place in np.flatnonzero(is_missing):
                    values[place] = None
            ids = [
                vocabulary.id_of(values[i * num_rows + row])
                for i, vocabulary in enumerate(self._vocabularies)
                for row in range(num_rows)
            ]
            ids_FB[self._places] = np.array(ids, np.int32).reshape(-1, num_rows)
        else:
            for i, vocabulary in enumerate(self._vocabularies):
                here = slice(i * num_rows, (i + 1) * num_rows)
                ids_FB[self._places[i]] = vocabulary.ids_of_numbers(
                    numbers[here], None if is_missing is None else is_missing[here]
                )


class _TextFeatures:
    """Sparse features of one kind of texts, all with a vocabulary or all hashed."""

    def __init__(self, features: Sequence[SparseColumn], places: list[int], vocabularies: Vocabularies) -> None:
        self._features = [
            (feature, place, vocabularies.get(feature.name)) for feature, place in zip(features, places, strict=True)
        ]

    def encode(self, parts: Sequence[Part], ids_FB: NDArray[np.int32]) -> None:
        for feature, place, vocabulary in self._features:
            cells, _ = _cells(parts, [feature.name], feature.value_kind)
            if max(map(len, filter(None, cells)), default=0) > MAX_CELL_CHARACTERS:
                raise ValueError("a text is too long")
            if feature.null_values:
                cells = [None if cell in feature.null_values else cell for cell in cells]
            texts = pl.Series(cells, dtype=feature.dtype)
            ids_FB[place] = encode_sparse(texts, feature, vocabulary).to_numpy()


def _cells(parts: Sequence[Part], names: Sequence[str], kind: ValueKind) -> tuple[list[Any], NDArray[np.bool_] | None]:
    """The cells of columns, one column after another, with a stand-in for missing ones; and which are missing.

    Raises:
        ValueError: a cell is of another type than plain cells of the kind.
    """
    cells = cells_of(parts, names)
    if not kind.json_types.issuperset(map(type, cells)):
        raise ValueError("a cell is of another type")
    if str in kind.json_types:
        missing = [i for i, cell in enumerate(cells) if not cell]  # an empty text too
    elif None in cells:
        missing = [i for i, cell in enumerate(cells) if cell is None]
    else:
        return cells, None
    if not missing:
        return cells, None
    for i in missing:
        cells[i] = kind.stand_in
    is_missing = np.zeros(len(cells), np.bool_)
    is_missing[missing] = True
    return cells, is_missing


def _numbers(
    parts: Sequence[Part], names: Sequence[str], kind: ValueKind, nulls: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """As `_cells`, but numbers; those that are null values are missing."""
    cells, is_missing = _cells(parts, names, kind)
    numbers = kind.numbers_of_cells(cells)
    if len(nulls):
        is_null = np.isin(numbers, nulls)
        is_missing = is_null if is_missing is None else is_missing | is_null
    return numbers, is_missing
