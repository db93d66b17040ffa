"""Converts users' frames and rows to typed columns, or to rows by column name as in JSON.

| given | read as |
| --- | --- |
| a Polars or pandas frame, or what else gives an Arrow stream | a Parquet file of these columns: NaN is missing |
| a dict of lists, a list of dicts | rows of JSON: what a row does not name is missing |
"""

from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import pyarrow as pa

from torchdlrm.errors import RowError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import Feature, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import Row, check_cells

_CELLS = (pl.Boolean, pl.String, pl.Categorical, pl.Enum, pl.Date, pl.Datetime, pl.Null)


def frame_or_rows(rows: Any) -> pl.DataFrame | Sequence[Row]:
    """A frame as one of Polars, or rows by column name.

    Raises:
        RowError: it is none of what this module takes, or its lists differ in length.
    """
    if isinstance(rows, pl.DataFrame):
        return rows
    if (isinstance(rows, Mapping) and any(map(_is_cell, rows.values()))) or (
        hasattr(rows, "to_dict") and getattr(rows, "ndim", 2) == 1  # a row of a pandas frame
    ):
        row = "row" if isinstance(rows, Mapping) else "row.to_dict()"
        raise RowError(f"this is one row, a {type(rows).__name__}; put it in a list, as in predict([{row}])")
    if isinstance(rows, Mapping):
        lists = {name: values.tolist() if hasattr(values, "tolist") else list(values) for name, values in rows.items()}
        lengths = {name: len(values) for name, values in lists.items()}
        if len(set(lengths.values())) > 1:
            msg = "the lists differ in length: " + ", ".join(f"{name} has {count:,}" for name, count in lengths.items())
            raise RowError(msg)
        return [dict(zip(lists, cells, strict=True)) for cells in zip(*lists.values(), strict=True)]
    try:
        if hasattr(rows, "__arrow_c_stream__"):
            return pl.DataFrame(pa.table(rows))
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise RowError(f"the frame cannot be read: {error}") from error
    if isinstance(rows, Sequence) and not isinstance(rows, str | bytes):
        return rows
    msg = f"rows are a Polars or pandas frame, a dict of lists or a list of dicts, and not a {type(rows).__name__}"
    raise RowError(msg)


def _is_cell(value: object) -> bool:
    return isinstance(value, str) or not hasattr(value, "__iter__")


def typed_columns(frame: pl.DataFrame, schema: FeatureSchema) -> pl.DataFrame:
    """The features of a frame, by their names in the schema or in the log; other columns are not read.

    Raises:
        RowError: a feature is not there, or a cell does not fit; names the row (from 0), the column and the value.
    """
    cells = pl.DataFrame([_cells(_column(frame, column), column) for column in schema.features])
    bad_rows = BadRows()
    typed, _ = to_typed_columns(cells, schema.with_columns(schema.features), bad_rows, is_label_optional=True)
    check_cells(bad_rows)
    return typed


def _column(frame: pl.DataFrame, column: Feature) -> pl.Series:
    for name in (column.name, column.log_name):
        if name in frame.columns:
            return frame[name].alias(column.name)
    raise RowError(f"column {column.name!r}: the frame has no such column; it has {', '.join(frame.columns)}")


def _cells(cells: pl.Series, column: Feature) -> pl.Series:
    """The cells of a column, of a type that cells may have; an empty text is a missing one."""
    is_list = isinstance(cells.dtype, pl.List | pl.Array)
    one = cells.dtype.inner if isinstance(cells.dtype, pl.List | pl.Array) else cells.dtype
    is_cell = one.is_numeric() or one in _CELLS
    if isinstance(column, SparseColumn) and column.weight_separator is not None and isinstance(one, pl.Struct):
        is_cell = {field.name for field in one.fields} == {"value", "weight"}
    if (is_list and not column.is_multi_valued) or not is_cell:
        msg = f"column {column.name!r}: {cells.dtype} is no type of its cells; expected {column.value_kind.expected}"
        raise RowError(msg)
    return cells.set(cells == "", None) if cells.dtype == pl.String else cells
