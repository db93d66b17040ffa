"""Tensors -> rows: a frame of typed columns, as a log gives them, or, of few, by column name, as JSON gives them.

In: one tensor a column, [N] or [N, 1]; or packed, `dense` [N, dense columns] and `sparse` [N, sparse columns].
Out: the rows; what was not sent is missing, and what a column's `null_values` name.

| column | takes |
| --- | --- |
| dense | any number, NaN is missing; or BYTES, as a log writes it |
| sparse int | integers, or BYTES |
| sparse hex | integers, which are the number itself, or BYTES, its digits |
| sparse string, sparse with several values | BYTES |
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.data.bad_rows import REASONS, BadRows
from torchdlrm.data.log.cells import to_typed_columns, without_null_values
from torchdlrm.data.vocabulary import VALUE_TYPES
from torchdlrm.schema import DenseColumn, FeatureSchema
from torchdlrm.serve.batch import Rows
from torchdlrm.serve.open_inference.few_rows import Feature, few_rows
from torchdlrm.serve.open_inference.tensors import BYTES, Tensor
from torchdlrm.serve.refusals import RefusedRequest, bad_request, too_large

DENSE, SPARSE = "dense", "sparse"  # of the packed inputs
OUTPUT = "prediction"
PLATFORM = "torchdlrm"
_MAX_INT64 = 2**63
_FEW_ROWS = 16


def feature_type(column: Feature) -> pl.DataType:
    """The type of a typed column."""
    if isinstance(column, DenseColumn):
        return pl.Int64() if column.kind == "int" else pl.Float64()
    value = VALUE_TYPES[column.kind]
    return pl.List(value) if column.is_multi_valued else value()


def model_metadata(name: str, version: str, schema: FeatureSchema) -> dict[str, Any]:
    """What the protocol tells of a model: an input for each column, and the output."""
    inputs = [{"name": column.name, "datatype": _datatype(column), "shape": [-1]} for column in features_of(schema)]
    return {
        "name": name,
        "versions": [version],
        "platform": PLATFORM,
        "inputs": inputs,
        "outputs": [{"name": OUTPUT, "datatype": "FP32", "shape": [-1]}],
    }


def features_of(schema: FeatureSchema) -> tuple[Feature, ...]:
    """The columns that a model reads: dense, then sparse."""
    return (*schema.dense, *schema.sparse)


def _datatype(column: Feature) -> str:
    """The one of a column's datatypes that can say everything, a missing value too where that is possible."""
    if isinstance(column, DenseColumn):
        return "FP64" if column.kind == "float" else "INT64"
    return "INT64" if column.kind == "int" and not column.is_multi_valued else BYTES


def rows_of_tensors(tensors: Sequence[Tensor], schema: FeatureSchema, max_rows: int) -> Rows:
    """The rows that tensors hold.

    Args:
        tensors: of one request.
        schema: the columns.
        max_rows: more are refused.

    Returns:
        Few rows as mappings from column name to cell, which are encoded in a fraction of the time; otherwise typed
        columns in the order of the schema: first the dense, then the sparse ones.

    Raises:
        RefusedRequest: a tensor is unknown or given twice, the sizes differ, or a value does not fit its column.
    """
    placed = _placed(tensors, schema, max_rows)
    few = few_rows(placed) if 0 < tensors[0].shape[0] <= _FEW_ROWS else None
    return _frame(placed, schema) if few is None else few


def _placed(
    tensors: Sequence[Tensor], schema: FeatureSchema, max_rows: int
) -> Sequence[tuple[Tensor, Sequence[Feature]]]:
    """Each tensor with the columns that it holds."""
    if not tensors:
        raise bad_request("inputs: no tensor; send one for a column at least, or 'dense' and 'sparse'")
    features: dict[str, Feature] = {column.name: column for column in features_of(schema)}
    num_rows = tensors[0].shape[0]
    if num_rows > max_rows:
        msg = f"{num_rows:,} rows in a request, and at most {max_rows:,} are taken; send several requests"
        raise too_large(msg)
    placed = []
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.shape[0] != num_rows:
            msg = f"input {tensor.name!r} has {tensor.shape[0]:,} rows, and {tensors[0].name!r} has {num_rows:,}"
            raise bad_request(msg)
        columns = _columns_of(tensor, schema, features)
        for column in columns:
            if column.name in seen:
                msg = f"column {column.name} is given twice"
                raise bad_request(msg)
            seen.add(column.name)
        placed.append((tensor, columns))
    return placed


def _frame(placed: Sequence[tuple[Tensor, Sequence[Feature]]], schema: FeatureSchema) -> pl.DataFrame:
    features: dict[str, Feature] = {column.name: column for column in features_of(schema)}
    num_rows = placed[0][0].shape[0]
    texts: dict[str, pl.Series] = {}
    typed: dict[str, pl.Series] = {}
    for tensor, columns in placed:
        if tensor.datatype == BYTES:
            for index, column in enumerate(columns):
                texts[column.name] = tensor.values.gather_every(len(columns), index).alias(column.name)
        else:
            typed |= _from_numbers(tensor, columns)
    if texts:
        layout = schema.with_columns([features[name] for name in texts])
        bad_rows = BadRows()
        frame, _ = to_typed_columns(pl.DataFrame(texts), layout, bad_rows)
        for reason, examples in bad_rows.examples.items():
            raise _bad_cell(examples[0].line - 1, str(examples[0].column), reason, examples[0].value)
        typed |= frame.to_dict()
    for name in features.keys() - typed.keys():
        typed[name] = pl.Series(name, [None], dtype=feature_type(features[name])).new_from_index(0, num_rows)
    return pl.DataFrame([typed[name] for name in features])


def _columns_of(tensor: Tensor, schema: FeatureSchema, features: dict[str, Feature]) -> Sequence[Feature]:
    """The columns that a tensor holds."""
    if tensor.name in features:
        if len(tensor.shape) == 2 and tensor.shape[1] != 1:
            msg = f"input {tensor.name!r}: a column has the shape [N] or [N, 1], not {list(tensor.shape)}"
            raise bad_request(msg)
        return [features[tensor.name]]
    packed: dict[str, Sequence[Feature]] = {DENSE: schema.dense, SPARSE: schema.sparse}
    if tensor.name not in packed:
        msg = f"input {tensor.name!r} is no column of this model, and neither 'dense' nor 'sparse'"
        raise bad_request(msg)
    columns = packed[tensor.name]
    if len(tensor.shape) != 2 or tensor.shape[1] != len(columns):
        msg = f"input {tensor.name!r}: the shape is [N, {len(columns)}], not {list(tensor.shape)}"
        raise bad_request(msg)
    return columns


def _from_numbers(tensor: Tensor, columns: Sequence[Feature]) -> dict[str, pl.Series]:
    """The typed columns of a tensor of numbers."""
    for column in columns:
        _check_takes_numbers(tensor, column)
    num_columns = len(columns)
    if len({column.kind for column in columns}) == 1:  # cast as one: the cost of few rows is that of the casts
        parts = [(columns, tensor.values)]
    else:
        parts = [([column], tensor.values.gather_every(num_columns, i)) for i, column in enumerate(columns)]
    typed = {}
    for alike, values in parts:
        cast, bad = _cast(values, alike[0])
        if bad is not None:
            row, index = divmod(int(np.argmax(bad)), len(alike))
            raise _bad_cell(row, alike[index].name, alike[index].kind, values[int(np.argmax(bad))])
        for index, column in enumerate(alike):
            typed[column.name] = without_null_values(cast.gather_every(len(alike), index).alias(column.name), column)
    return typed


def _check_takes_numbers(tensor: Tensor, column: Feature) -> None:
    if isinstance(column, DenseColumn):
        return
    wanted = BYTES if column.is_multi_valued or column.kind == "string" else f"INT64 or {BYTES}"
    if wanted == BYTES or not tensor.values.dtype.is_integer():
        msg = f"input {tensor.name!r}: column {column.name} takes {wanted}, not {tensor.datatype}"
        raise bad_request(msg)


def _cast(values: pl.Series, column: Feature) -> tuple[pl.Series, NDArray[np.bool_] | None]:
    """Typed values, and which are bad; None where none is."""
    target = feature_type(column)
    if values.dtype.is_float():
        values = values.cast(pl.Float64).fill_nan(None)
        bad = ~values.is_finite()
        if target == pl.Int64:
            bad |= (values != values.floor()) | (values < -_MAX_INT64) | (values >= _MAX_INT64)
    elif target == pl.UInt32:
        if values.dtype != pl.UInt64:
            values = values.cast(pl.Int64)  # the limits must fit the type that they are compared in
        bad = (values < 0) | (values > 2**32 - 1)
    elif values.dtype == pl.UInt64 and target == pl.Int64:
        bad = values > _MAX_INT64 - 1
    else:
        return values.cast(target), None
    return values.cast(target, strict=False), bad.fill_null(value=False).to_numpy() if bad.any() else None


def _bad_cell(row: int, column: str, reason: str, value: object) -> RefusedRequest:
    msg = f"row {row}, column {column}: {REASONS[reason]}: {str(value)[:80]!r}"
    return bad_request(msg)
