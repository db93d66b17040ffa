"""Tensors -> a frame of typed columns, as a log gives them.

In: one tensor a column, [N] or [N, 1]; or packed, `dense` [N, dense columns] and `sparse` [N, sparse columns].  Out: a
frame with every dense and sparse column of the schema; what was not sent is missing.

| column | takes |
| --- | --- |
| dense | any number, NaN is missing; or BYTES, as a log writes it |
| sparse int | integers, or BYTES |
| sparse hex | integers, which are the number itself, or BYTES, its digits |
| sparse string, sparse with several values | BYTES |
"""

from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.data.bad_rows import REASONS
from torchdlrm.data.log.cells import typed_cells
from torchdlrm.data.vocabulary import VALUE_TYPES
from torchdlrm.schema import DenseColumn, FeatureSchema, SparseColumn
from torchdlrm.serve.open_inference.tensors import BYTES, Tensor
from torchdlrm.serve.refusals import bad_request, too_large

DENSE, SPARSE = "dense", "sparse"
Feature = DenseColumn | SparseColumn
_MAX_INT64 = 2**63


def feature_type(column: Feature) -> pl.DataType:
    """The type of a typed column."""
    if isinstance(column, DenseColumn):
        return pl.Int64() if column.kind == "int" else pl.Float64()
    value = VALUE_TYPES[column.kind]
    return pl.List(value) if column.is_multi_valued else value()


def frame_of(tensors: Sequence[Tensor], schema: FeatureSchema, max_rows: int) -> pl.DataFrame:
    """The rows that tensors hold.

    Args:
        tensors: of one request.
        schema: the columns.
        max_rows: more are refused.

    Returns:
        Typed columns in the order of the schema: first the dense, then the sparse ones.

    Raises:
        RefusedRequest: a tensor is unknown or given twice, the sizes differ, or a value does not fit its column.
    """
    if not tensors:
        raise bad_request("inputs: no tensor; send one for a column at least, or 'dense' and 'sparse'")
    features: dict[str, Feature] = {column.name: column for column in (*schema.dense, *schema.sparse)}
    num_rows = tensors[0].shape[0]
    if num_rows > max_rows:
        msg = f"{num_rows:,} rows in a request, and at most {max_rows:,} are taken; send several requests"
        raise too_large(msg)
    found: dict[str, pl.Series] = {}
    for tensor in tensors:
        if tensor.shape[0] != num_rows:
            msg = f"input {tensor.name!r} has {tensor.shape[0]:,} rows, and {tensors[0].name!r} has {num_rows:,}"
            raise bad_request(msg)
        for name, values in _by_column(tensor, schema, features):
            if name in found:
                msg = f"column {name} is given twice"
                raise bad_request(msg)
            found[name] = _typed(values, features[name], tensor)
    missing = {name: pl.Series(name, [None], dtype=feature_type(features[name])) for name in features.keys() - found}
    columns = [found[name] if name in found else missing[name].new_from_index(0, num_rows) for name in features]
    return pl.DataFrame(columns)


def _by_column(tensor: Tensor, schema: FeatureSchema, features: dict[str, Feature]) -> Iterator[tuple[str, pl.Series]]:
    """The columns of a tensor, each with its values."""
    if tensor.name in features:
        if len(tensor.shape) == 2 and tensor.shape[1] != 1:
            msg = f"input {tensor.name!r}: a column has the shape [N] or [N, 1], not {list(tensor.shape)}"
            raise bad_request(msg)
        yield tensor.name, tensor.values
        return
    packed: dict[str, Sequence[Feature]] = {DENSE: schema.dense, SPARSE: schema.sparse}
    if tensor.name not in packed:
        msg = f"input {tensor.name!r} is no column of this model, and neither 'dense' nor 'sparse'"
        raise bad_request(msg)
    columns = packed[tensor.name]
    if len(tensor.shape) != 2 or tensor.shape[1] != len(columns):
        msg = f"input {tensor.name!r}: the shape is [N, {len(columns)}], not {list(tensor.shape)}"
        raise bad_request(msg)
    for index, column in enumerate(columns):
        yield column.name, tensor.values.gather_every(len(columns), index)


def _typed(values: pl.Series, column: Feature, tensor: Tensor) -> pl.Series:
    if tensor.datatype == BYTES:
        typed, bad = typed_cells(values, column)
    elif isinstance(column, SparseColumn) and (
        column.is_multi_valued or column.kind == "string" or not values.dtype.is_integer()
    ):
        wanted = BYTES if column.is_multi_valued or column.kind == "string" else f"INT64 or {BYTES}"
        msg = f"input {tensor.name!r}: column {column.name} takes {wanted}, not {tensor.datatype}"
        raise bad_request(msg)
    else:
        typed, bad = _from_numbers(values, column)
    if bad is not None and bad.any():
        row = int(np.argmax(bad))
        msg = f"row {row}, column {column.name}: {REASONS[column.kind]}: {str(values[row])[:80]!r}"
        raise bad_request(msg)
    return typed.alias(column.name)


def _from_numbers(values: pl.Series, column: Feature) -> tuple[pl.Series, NDArray[np.bool_] | None]:
    """Typed values, and which are bad."""
    if values.dtype.is_float():
        values = values.cast(pl.Float64).fill_nan(None)
        bad = ~values.is_finite()
        if isinstance(column, DenseColumn) and column.kind == "int":
            bad |= (values != values.floor()) | (values < -_MAX_INT64) | (values >= _MAX_INT64)
    elif isinstance(column, SparseColumn) and column.kind == "hex":
        bad = (values < 0) | (values > 2**32 - 1)
    elif values.dtype == pl.UInt64 and feature_type(column) == pl.Int64:
        bad = values > _MAX_INT64 - 1
    else:
        bad = pl.Series([False])
    typed = values.cast(feature_type(column), strict=False)
    return typed, bad.fill_null(value=False).to_numpy() if bad.any() else None
