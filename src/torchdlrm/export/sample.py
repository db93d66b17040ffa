"""Raw rows made back from encoded ones: what a bundle carries to be checked with wherever it is opened.

A dataset holds encoded rows alone.  An id becomes its value again by the vocabulary, id 0 a value outside of it, a
dense value what its transform maps to it; and a row is kept where encoding it gives exactly the encoded row again.  For
a hashed feature any value will do.

B rows.
"""

from collections.abc import Mapping

import numpy as np
import polars as pl

from torchdlrm.data.transforms import FittedDense, ValueLookup, encode
from torchdlrm.data.vocabulary import UNKNOWN_ID, VALUE_TYPES, Vocabulary
from torchdlrm.schema import DenseColumn, FeatureSchema, SparseColumn

_CANDIDATES = 64


def raw_sample(
    encoded: pl.DataFrame,
    schema: FeatureSchema,
    dense: Mapping[str, FittedDense],
    vocabularies: Mapping[str, ValueLookup],
    *,
    max_rows: int,
) -> pl.DataFrame:
    """Raw typed rows.

    Args:
        encoded: held-out rows of the dataset.
        schema: the columns.
        dense: the fitted transforms.
        vocabularies: of the features that are not hashed.
        max_rows: give at most so many.

    Returns:
        Dense columns Int64 or Float64, sparse columns UInt32, Int64 or String, or lists of it: at most `max_rows` rows.
    """
    raw = pl.DataFrame(
        [_raw_dense(encoded[column.name], column, dense[column.name]) for column in schema.dense]
        + [_raw_sparse(encoded[column.name], column, vocabularies.get(column.name)) for column in schema.sparse]
    )
    again = encode(raw, schema, dense, vocabularies)
    same = np.ones(raw.height, np.bool_)
    for column in (*schema.dense, *schema.sparse):
        if not (isinstance(column, SparseColumn) and column.hash is not None):
            same &= (again[column.name] == encoded[column.name].cast(again[column.name].dtype)).to_numpy()
    return raw.filter(pl.Series(same)).head(max_rows)


def _raw_dense(values: pl.Series, column: DenseColumn, fitted: FittedDense) -> pl.Series:
    x = values.cast(pl.Float64).to_numpy()
    x = (np.exp(x) if fitted.log else x * fitted.deviation) - fitted.shift
    if column.kind == "int":
        return pl.Series(column.name, np.clip(np.rint(x), -(2.0**62), 2.0**62).astype(np.int64))
    return pl.Series(column.name, x)


def _raw_sparse(ids: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    flat = ids.explode(empty_as_null=False) if column.is_multi_valued else ids
    values = _values(flat, column, vocabulary)
    if not column.is_multi_valued:
        return values.alias(column.name)
    lengths = ids.list.len().to_numpy()
    frame = pl.DataFrame({"row": np.repeat(np.arange(len(ids)), lengths), "value": values})
    lists = frame.group_by("row", maintain_order=True).agg("value")
    every = pl.DataFrame({"row": np.arange(len(ids))}).join(lists, on="row", how="left", maintain_order="left")
    return every["value"].fill_null(pl.Series([[]], dtype=pl.List(values.dtype))).alias(column.name)


def _values(ids: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    dtype = VALUE_TYPES[column.kind]
    if vocabulary is None:
        return pl.Series((ids.to_numpy().astype(np.int64) * 7919 + 1) % 2**31).cast(dtype)
    if not isinstance(vocabulary, Vocabulary):
        return ids.cast(dtype)
    known = vocabulary.table["value"]
    found = known.gather((ids.cast(pl.Int64) - 1).clip(0, max(0, len(known) - 1))) if len(known) else None
    unknown = _outside(vocabulary, dtype)
    if found is None:
        return pl.select(pl.repeat(unknown, len(ids), dtype=dtype)).to_series()
    is_unknown = ids == UNKNOWN_ID
    return found.zip_with(~is_unknown, pl.Series([unknown], dtype=dtype))


def _outside(vocabulary: Vocabulary, dtype: type[pl.DataType]) -> str | int:
    """A value that has no id of its own."""
    numbers = pl.Series(np.random.default_rng(0).integers(2**31, size=_CANDIDATES))
    candidates = pl.select(pl.lit("unknown-") + numbers.cast(pl.String)).to_series() if dtype == pl.String else numbers
    candidates = candidates.cast(dtype)
    outside = candidates.filter(vocabulary.lookup(candidates) == UNKNOWN_ID)
    assert len(outside), "64 values out of 2^31 that are all in one vocabulary"
    value: str | int = outside[0]
    return value
