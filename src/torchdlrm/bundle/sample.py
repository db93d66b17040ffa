"""Reconstructs raw rows from encoded ones: a bundle carries them, to be checked with wherever it is opened.

A dataset holds encoded rows alone.  An id becomes its value again by the vocabulary, id 0 a value outside of it, a
dense value what its transform maps to it; and a row is kept where encoding it gives exactly the encoded row again.  For
a hashed feature any value will do, and for a vector the one that is stored.

B rows.
"""

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.errors import BundleError
from torchdlrm.features.columns import DenseColumn, SparseColumn
from torchdlrm.features.encode import ValueLookup, encode
from torchdlrm.features.kinds import map_lists
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import DenseTransform
from torchdlrm.features.vectors import typed_vectors
from torchdlrm.features.vocabulary import UNKNOWN_ID, Vocabulary

PREDICTION_COLUMN = "prediction"
_MAX_SAMPLE_ROWS = 1_024
_MAX_SAMPLE_BYTES = 64 * 2**20
UNREADABLE = (
    *(pa.ArrowException, OSError, ValueError, KeyError, MemoryError),
    *(pl.exceptions.PolarsError, pl.exceptions.PanicException),
)
_CANDIDATES = 64


def sample_types(schema: FeatureSchema) -> dict[str, pl.DataType]:
    """The features of raw rows and their types."""
    return {column.name: column.dtype for column in schema.features}


def read_sample(path: Path, schema: FeatureSchema, *, sha256: str) -> pl.DataFrame:
    """What a bundle's sample, a regular file, holds: the features and `prediction`s, of at most 1,024 rows.

    Raises:
        BundleError: it holds something else.
    """
    own = schema.label_columns(PREDICTION_COLUMN)
    expected = sample_types(schema) | dict.fromkeys(own, pl.Float32())
    try:
        size_bytes = path.stat().st_size
        data = path.read_bytes() if size_bytes <= _MAX_SAMPLE_BYTES else b""
        if hashlib.sha256(data).hexdigest() != sha256:
            raise pa.ArrowInvalid(f"{size_bytes:,} bytes that are not those that were written")
        file = pq.ParquetFile(io.BytesIO(data))
        about = file.metadata
        groups = range(min(about.num_row_groups, _MAX_SAMPLE_ROWS))
        unpacked_bytes = sum(about.row_group(i).total_byte_size for i in groups)
        if max(about.num_rows, about.num_row_groups) > _MAX_SAMPLE_ROWS or unpacked_bytes > _MAX_SAMPLE_BYTES:
            raise pa.ArrowInvalid(f"{about.num_rows:,} rows of {unpacked_bytes:,} bytes")
        table = file.read(use_threads=False)
        table.validate(full=True)
        # The names that are known and no metadata: of others that are no text Polars would panic.
        frame = pl.DataFrame(pl.from_arrow(pa.table({name: table.column(name) for name in expected})))
    except UNREADABLE as error:
        raise BundleError(f"{path}: not a sample of rows: {str(error)[:200]}; export the run again") from error
    if (
        frame.schema != expected
        or frame.height > _MAX_SAMPLE_ROWS
        or frame.select(own).null_count().sum_horizontal().item()
    ):
        raise BundleError(f"{path}: its columns are not those of the schema; export the run again")
    return frame


def raw_sample(
    encoded: pl.DataFrame,
    schema: FeatureSchema,
    dense: Mapping[str, DenseTransform],
    vocabularies: Mapping[str, ValueLookup],
    *,
    max_rows: int,
) -> pl.DataFrame:
    """Raw typed rows of encoded ones, at most `max_rows`; features without a vocabulary are hashed.

    Dense columns are Int64 or Float64, sparse columns UInt32, Int64 or String, or lists of it,
    or of structs with weights.
    """
    raw = pl.DataFrame(
        [_raw_dense(encoded[column.name], column, dense[column.name]) for column in schema.dense]
        + [typed_vectors(encoded[column.name], column)[0] for column in schema.content]
        + [_raw_sparse(encoded, column, vocabularies.get(column.name)) for column in schema.sparse_columns]
    )
    raw = raw.with_columns(
        _with_missing(raw[feature.raw_name], encoded[feature.name], vocabularies.get(feature.name))
        for feature in schema.sparse
        if feature.raw_name != feature.name
    )
    again = encode(raw, schema, dense, vocabularies)
    same = np.ones(raw.height, np.bool_)
    for column in (*schema.dense, *schema.sparse):
        if not (isinstance(column, SparseColumn) and column.hash is not None):
            same &= (again[column.name] == encoded[column.name].cast(again[column.name].dtype)).to_numpy()
    return raw.filter(pl.Series(same)).head(max_rows)


def _raw_dense(values: pl.Series, column: DenseColumn, fitted: DenseTransform) -> pl.Series:
    x = fitted.inverse(values.cast(pl.Float64).to_numpy())
    return column.value_kind.from_floats(x).alias(column.name)


def _with_missing(numbers: pl.Series, ids: pl.Series, vocabulary: ValueLookup | None) -> pl.Series:
    """A dense column, null where its bucket says so: among dense values a missing one is like others."""
    missing_id = vocabulary.missing_id if isinstance(vocabulary, Vocabulary) else None
    if missing_id is None:
        return numbers
    return pl.select(pl.when(ids != missing_id).then(numbers).alias(numbers.name)).to_series()


def _raw_sparse(encoded: pl.DataFrame, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    def raw(ids: pl.Series) -> pl.Series:
        values = _values(ids, column, vocabulary)
        if column.weights_name is None:
            return values
        weights = encoded[column.weights_name].explode(empty_as_null=False)
        return pl.DataFrame({"value": values, "weight": weights}).to_struct()

    ids = encoded[column.name]
    return map_lists(ids, raw) if column.is_multi_valued else raw(ids).alias(column.name)


def _values(ids: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    dtype = column.value_kind.dtype
    if vocabulary is None:
        return pl.Series((ids.to_numpy().astype(np.int64) * 7919 + 1) % 2**31).cast(dtype)
    if not isinstance(vocabulary, Vocabulary):
        return ids.cast(dtype)
    known, unknown = vocabulary.table["value"], pl.Series([_outside(vocabulary, column)], dtype=dtype)
    if column.buckets is not None:
        known = _numbers_of(known, column)
    if not len(known):
        return unknown.new_from_index(0, len(ids))
    places = vocabulary.table["id"].search_sorted(ids.cast(pl.Int32))  # ids have gaps where values come and go
    return known.gather(places.clip(0, len(known) - 1)).zip_with(ids != UNKNOWN_ID, unknown)


def _numbers_of(categories: pl.Series, column: SparseColumn) -> pl.Series:
    """A number in each bucket; null stays null."""
    assert column.buckets is not None, "the caller saw to it"
    is_float = column.kind == "float"
    numbers = column.buckets.bucketing.numbers_of(categories.fill_null(0).to_numpy(), is_float=is_float)
    return pl.select(pl.when(categories.is_not_null()).then(pl.Series(numbers))).to_series()


def _outside(vocabulary: Vocabulary, column: SparseColumn) -> str | float:
    """A value that has no id of its own; of buckets, which may all have one, any."""
    dtype = column.value_kind.dtype
    numbers = pl.Series(np.random.default_rng(0).integers(2**31, size=_CANDIDATES))
    candidates = pl.select(pl.lit("unknown-") + numbers.cast(pl.String)).to_series() if dtype == pl.String else numbers
    candidates = candidates.cast(dtype)
    if column.buckets is not None:
        candidates = candidates.append(_numbers_of(pl.Series(np.arange(-_CANDIDATES, _CANDIDATES)), column))
    outside = candidates.filter(vocabulary.lookup(column.categories(candidates)) == UNKNOWN_ID)
    assert len(outside) or column.buckets is not None, "64 values out of 2^31 that are all in one vocabulary"
    return (outside if len(outside) else candidates)[0]
