"""Encodes typed columns for the model: dense values as float32, categorical values as int32 ids.

In: a frame of the types that `torchdlrm.features.cells` gives, missing values null.  Out: the same columns encoded.
Both the preprocessing job and everything that meets raw rows later run this code, with the same constants.
"""

from collections.abc import Mapping
from typing import Protocol

import polars as pl

from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.kinds import map_lists
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import DenseTransform
from torchdlrm.features.value_hash import hashed_ids
from torchdlrm.features.vectors import encode_vectors

_FEW_ROWS = 4_096


class ValueLookup(Protocol):
    """Gives values their ids: a `Vocabulary` in memory, or a `ValueIndex` on disk."""

    def lookup(self, values: pl.Series) -> pl.Series:
        """The id of each value: Int32, 0 for a value without one; the name of `values`."""


def encode(
    frame: pl.DataFrame,
    schema: FeatureSchema,
    dense: Mapping[str, DenseTransform],
    vocabularies: Mapping[str, ValueLookup],
) -> pl.DataFrame:
    """Raw rows as the model reads them.

    Args:
        frame: typed columns, B rows; the label may be absent.
        schema: the columns.
        dense: the fitted transform of each dense column.
        vocabularies: the vocabulary of each sparse column that is not hashed.

    Returns:
        Float32 dense columns, vectors as lists of their stored type, and Int32 sparse columns (lists of it where a row
        has several values; where these have weights, lists of Float32 follow) in the order of the schema, B rows.
    """
    columns = list(encode_dense(frame, dense).iter_columns())
    columns += [encode_vectors(frame[column.name], column) for column in schema.content]
    for column in schema.sparse:
        values = frame[column.raw_name]
        columns.append(encode_sparse(values, column, vocabularies.get(column.name)))
        if column.weights_name is not None:
            columns.append(map_lists(values.alias(column.weights_name), lambda flat: flat.struct.field("weight")))
    return pl.DataFrame(columns)


def encode_sparse(values: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    """The ids of a sparse column's values: Int32, or lists of it; a missing list of values is an empty one.

    Args:
        values: Int64, UInt32 or String, Int64 or Float64 where buckets make categories of them, nullable; or lists of
            these; or lists of structs of `value` and `weight`.
        column: the feature.
        vocabulary: its vocabulary; None where its values are hashed.
    """

    def ids(flat: pl.Series) -> pl.Series:
        if column.weights_name is not None:
            flat = flat.struct.field("value")
        flat = column.categories(flat)
        if column.hash is not None:
            return pl.Series(flat.name, hashed_ids(flat, column.hash))
        assert vocabulary is not None, "a column that is not hashed has a vocabulary"
        return vocabulary.lookup(flat)

    return map_lists(values, ids) if column.is_multi_valued else ids(values).alias(column.name)


def encode_dense(frame: pl.DataFrame, dense: Mapping[str, DenseTransform]) -> pl.DataFrame:
    """The dense columns of `frame` alone, each through its transform."""
    if frame.height > _FEW_ROWS:
        return frame.select([fitted.expression(name) for name, fitted in dense.items()])
    # Of few rows, the cost is that of the expressions: columns of the same constants are transformed as one.
    alike: dict[DenseTransform, list[str]] = {}
    for name, fitted in dense.items():
        alike.setdefault(fitted, []).append(name)
    columns = {}
    for fitted, names in alike.items():
        x = pl.concat([frame[name].cast(pl.Float64) for name in names])
        encoded = x.to_frame("x").select(fitted.expression("x")).to_series()
        for i, name in enumerate(names):
            columns[name] = encoded.slice(i * frame.height, frame.height).alias(name)
    return pl.DataFrame([columns[name] for name in dense])
