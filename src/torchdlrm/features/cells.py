"""Makes raw cells typed columns: what counts as a number, a hex value, a label, a list, or a bad cell.

Cells are text, or what Parquet files and frames hold: numbers, times, booleans, and lists.  Those mean what their text
means.  Numbers and times become values without being written out (`_typed_directly`); columns of other types, and those
with a bad cell, are written out and read as text, which finds the cell and says what is wrong with it.

| column | type | accepted |
| --- | --- | --- |
| label | Int8 | 0 or 1, true or false; with a threshold any number; or the values that the schema names |
| dense, sparse | that of its kind | as `torchdlrm.features.kinds` says |
| dense, a vector | List of Float32 | as `torchdlrm.features.vectors` says |
| sparse, several values | List of that | the values between separators; empty ones are left out |
| the same with weights | List of structs, value and weight (Float32) | VALUE or VALUE:WEIGHT, of which 1 is left out |
| weight | Float32 | a number of at least 0; never missing |
| time | Int64 | a number, or a date and time as ISO 8601 writes it; never missing; ordered as the times are |

An empty cell is missing, and so is one of the column's `null_values`: the text itself, or, where it is a number of the
column's kind, that number however it is written.
"""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRow, BadRows
from torchdlrm.features.casts import (
    bad_cells,
    cast_text,
    null_numbers,
    with_words,
    without_null_texts,
    without_null_values,
)
from torchdlrm.features.columns import Column, Feature, LabelColumn, SparseColumn, TimeColumn, WeightColumn
from torchdlrm.features.kinds import FLOAT, KINDS, map_lists
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import is_vector, typed_vectors
from torchdlrm.features.vocabulary import MAX_ID

# What is wrong, and in which rows.
_Fault = tuple[str, npt.NDArray[np.bool_]]
_FEW_ROWS = 4_096
_TEXT_TIMES = (-62_135_596_800_000_000, 253_402_300_799_999_999)  # of the years 1 to 9999, in microseconds


def text_frame(schema: FeatureSchema, columns: dict[str, list[str | None]]) -> pl.DataFrame:
    """Raw cells as a frame of text columns; columns that are not given have no rows."""
    names = [column.name for column in schema.columns]
    return pl.DataFrame({name: columns.get(name, []) for name in names}, schema=dict.fromkeys(names, pl.String))


def to_typed_columns(
    cells: pl.DataFrame,
    schema: FeatureSchema,
    bad_rows: BadRows,
    line_numbers: npt.NDArray[np.int64] | None = None,
    *,
    is_label_optional: bool = False,
) -> tuple[pl.DataFrame, pl.Series | None]:
    """Cast raw cells to the types of their columns.

    Args:
        cells: a column for each column of the schema, B rows; in text a missing cell is null.
        schema: the columns.
        bad_rows: takes the rows whose cells do not fit, each by its leftmost fault.
        line_numbers: int64 [B], the line of each row from 0; by default its position.
        is_label_optional: whether these are rows to predict, of which one without label or weight is good, where they
            are null, and one with an id outside of its table too, which is unknown.

    Returns:
        The typed columns, B rows; and a Boolean mask of the good rows, or None when all are good.
    """
    dtypes = cells.schema
    others = [column for column in schema.used if not (_is_text(dtypes[column.name]) or is_vector(column))]
    typed: dict[str, pl.Series] = {}
    for column in others:
        values = _typed_directly(cells[column.name], column, is_label_optional=is_label_optional)
        if values is None:
            cells = cells.with_columns(cells_as_text(cells[column.name], column))
        else:
            typed[column.name] = values.alias(column.name)
    columns = [column for column in schema.used if column.name not in typed]
    read, good = _read_texts(cells, columns, bad_rows, line_numbers, is_label_optional=is_label_optional)
    return pl.DataFrame([(typed if column.name in typed else read)[column.name] for column in schema.used]), good


def _is_text(dtype: pl.DataType) -> bool:
    return isinstance(dtype, pl.String) or dtype == pl.List(pl.String)


def _read_texts(
    text: pl.DataFrame,
    columns: Sequence[Column],
    bad_rows: BadRows,
    line_numbers: npt.NDArray[np.int64] | None,
    *,
    is_label_optional: bool,
) -> tuple[dict[str, pl.Series], pl.Series | None]:
    """As `to_typed_columns`, of columns of text, or of lists of text."""
    if any(column.null_values for column in columns):
        plain_texts = [column for column in columns if column.null_values and text[column.name].dtype == pl.String]
        text = text.with_columns(map(without_null_texts, plain_texts))
    plain = [column for column in columns if not (isinstance(column, Feature) and column.is_multi_valued)]
    clean: set[str] = set()
    if text.height > _FEW_ROWS:
        typed = text.select(cast_text(column) for column in plain).to_dict()
    else:
        typed, clean = _typed_few(text, plain)
    good: npt.NDArray[np.bool_] | None = None
    for column in columns:
        if column.name in clean and (is_label_optional or getattr(column, "kind", None) != "id"):
            continue
        values = typed.get(column.name)
        if values is None:
            values, faults = _typed_lists(text[column.name], column)
        else:
            if isinstance(column, LabelColumn) and column.positive is None and values.null_count():
                values = with_words(text[column.name], values)
            faults = list(_faults(text[column.name], values, column, is_label_optional=is_label_optional))
            if isinstance(column, Feature):
                values = without_null_values(values, column)
        if isinstance(column, SparseColumn) and column.kind == "id" and not is_label_optional:
            faults.append((column.kind, _outside_of_table(values, column).to_numpy()))
        typed[column.name] = values
        for reason, bad in faults:
            rows = np.flatnonzero(bad if good is None else bad & good)
            examples = [
                BadRow(
                    line=int(row if line_numbers is None else line_numbers[row]) + 1,
                    column=column.name,
                    value=_as_text(text[column.name][int(row)], column),
                )
                for row in rows[: BadRows.NUM_EXAMPLES]
            ]
            bad_rows.add(reason, len(rows), examples)
            if bad.any():
                good = ~bad if good is None else good & ~bad
    return typed, None if good is None else pl.Series(good)


def _outside_of_table(values: pl.Series, column: SparseColumn) -> pl.Series:
    """Which rows have a value that is no row of a table of ids, or lack one where they have one value each."""
    last = (column.num_embeddings or MAX_ID) - 1
    if values.dtype == pl.List:
        one = pl.element()
        if column.weight_separator is not None:
            one = one.struct.field("value")
        return values.list.eval(~one.is_between(0, last)).list.any().fill_null(value=False)
    return ~values.is_between(0, last).fill_null(value=False)


def _typed_directly(cells: pl.Series, column: Column, *, is_label_optional: bool) -> pl.Series | None:
    """Cells of another type than text as values, without text; None where that needs text, or one of them is bad."""
    if isinstance(column, Feature):
        if isinstance(column, SparseColumn) and column.is_multi_valued:
            values, faults = _typed_lists(cells, column) if _are_typed_lists(cells.dtype, column) else (None, [])
            values = None if faults else values
        else:
            values = None
            if _is_number(cells.dtype) and not column.value_kind.is_text:
                typed, bad = column.value_kind.from_numbers(cells)
                values = None if bad is not None else without_null_values(typed, column)
        if values is None or not isinstance(column, SparseColumn) or column.kind != "id" or is_label_optional:
            return values
        return None if _outside_of_table(values, column).any() else values
    if column.null_values:
        return None
    values = None
    if isinstance(column, LabelColumn) and column.positive is None and column.threshold is None:
        values = cells.cast(pl.Int8, strict=False) if cells.dtype.is_integer() or cells.dtype == pl.Boolean else None
    elif isinstance(column, WeightColumn) and _is_number(cells.dtype):
        values = cells.cast(pl.Float64).cast(pl.Float32)
    elif isinstance(column, TimeColumn) and column.kind == "int" and cells.dtype.is_integer():
        values = cells.cast(pl.Int64, strict=False)
    elif isinstance(column, TimeColumn) and column.kind == "datetime" and cells.dtype == pl.Datetime:
        values = cells.dt.cast_time_unit("us").to_physical()
        values = values if values.is_between(*_TEXT_TIMES).all() else None
    return values if values is not None and bad_cells(cells, values, column) is None else None


def _is_number(dtype: Any) -> bool:
    """Whether values of a type become numbers as they are; a decimal's are rounded as its text is."""
    return dtype.is_integer() or dtype.is_float()


def _are_typed_lists(dtype: pl.DataType, column: SparseColumn) -> bool:
    """Whether lists of a type become lists of values as they are."""
    if not isinstance(dtype, pl.List | pl.Array) or column.null_values:
        return False
    if column.weight_separator is None:
        return _is_number(dtype.inner) and not column.value_kind.is_text
    if not isinstance(dtype.inner, pl.Struct):
        return False
    value, weight = (dtype.inner.to_schema()[name] for name in ("value", "weight"))
    return _is_number(weight) and (value == pl.String or (_is_number(value) and not column.value_kind.is_text))


def cells_as_text(cells: pl.Series, column: Column) -> pl.Series:
    """Cells of any type as a text file would have them: String, or lists of it; null where one is missing.

    Raises:
        LogError: they are bytes that are no text.
    """
    if isinstance(cells.dtype, pl.List | pl.Array):
        return map_lists(cells.cast(pl.List(cells.dtype.inner)), lambda flat: _values_as_text(flat, column))
    text = _values_as_text(cells, column)
    # In a text file an empty cell is a missing one.
    return pl.select(pl.when(text != "").then(text).alias(column.name)).to_series()


def _values_as_text(cells: pl.Series, column: Column) -> pl.Series:
    cells = cells.alias(column.name)
    if isinstance(column, SparseColumn) and isinstance(cells.dtype, pl.Struct):
        # No weight is a bad one, and no value none.
        values = _values_as_text(cells.struct.field("value"), column).fill_null("")
        weights = cells.struct.field("weight").cast(pl.String).fill_null("")
        return pl.select(pl.concat_str(values, pl.lit(column.weight_separator), weights)).to_series()
    if cells.dtype.is_numeric():
        return KINDS.get(getattr(column, "kind", ""), FLOAT).text_of_numbers(cells)
    if cells.dtype == pl.Binary:
        try:
            return cells.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            msg = f"column {column.log_name}: holds bytes that are no text in UTF-8; write them as text"
            raise LogError(msg) from error
    if isinstance(column, TimeColumn) and cells.dtype in (pl.Datetime, pl.Date):
        if getattr(cells.dtype, "time_zone", None):
            cells = cells.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return cells.cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f")
    return cells.cast(pl.String)


def typed_cells(text: pl.Series, column: Feature) -> tuple[pl.Series, bool]:
    """Cast the cells of a column with one value a row.

    Args:
        text: String; the cells of the column, or those of several columns of the same role, kind and null values one
            after another.
        column: it, or one of them.

    Returns:
        The typed cells, null where one is missing or bad; and whether none is bad.  (Where one is, `null_values` that
        are numbers are still there: which cell is bad must be found first.)
    """
    frame = pl.DataFrame([text.alias(column.name)])
    if column.null_values:
        frame = frame.select(without_null_texts(column))
    typed = frame.select(cast_text(column)).to_series()
    is_clean = bad_cells(frame.to_series(), typed, column) is None
    return without_null_values(typed, column) if is_clean else typed, is_clean


def _typed_few(text: pl.DataFrame, columns: Sequence[Column]) -> tuple[dict[str, pl.Series], set[str]]:
    """The typed columns of few rows, and the names of some that are clean.

    The cost is then that of the casts, not of the cells: columns of the same kind are cast as one.
    """
    alike: dict[tuple[object, ...], list[Feature]] = {}
    typed: dict[str, pl.Series] = {}
    clean: set[str] = set()
    for column in columns:
        if isinstance(column, Feature):
            alike.setdefault((column.role, column.kind, column.null_values), []).append(column)
        else:
            typed[column.name] = text.select(cast_text(column)).to_series()
    for group in alike.values():
        cells, is_clean = typed_cells(pl.concat([text[column.name] for column in group]), group[0])
        for i, column in enumerate(group):
            typed[column.name] = cells.slice(i * text.height, text.height).alias(column.name)
        clean |= {column.name for column in group if is_clean}
    return typed, clean


def _as_text(cell: object, column: Column) -> str:
    if isinstance(cell, pl.Series):
        text = (getattr(column, "value_separator", None) or ",").join(map(str, cell))
        return f"{len(cell)} of {column.size} numbers, {text}" if is_vector(column) else text
    return "" if cell is None else str(cell)


def _typed_lists(cells: pl.Series, column: Column) -> tuple[pl.Series, list[_Fault]]:
    """Lists of typed values, null where the cell is missing; and what is wrong with some.

    Args:
        cells: text that separators cut, or lists: of text, of numbers, or of structs of a value and its weight.
        column: of several values.
    """
    if is_vector(column):
        vectors, is_bad = typed_vectors(cells, column)
        return vectors, [(column.kind, is_bad)] if is_bad.any() else []
    assert isinstance(column, SparseColumn), "other columns have one value a row"
    flat, num_rows = _values_of_lists(cells, column), len(cells)
    values = flat["value"]
    bad: pl.Series | None
    if values.dtype == pl.String:
        typed = pl.DataFrame({column.name: values}).select(column.value_kind.from_text(pl.col(column.name))).to_series()
        bad = bad_cells(values, typed, column)
    else:
        typed, bad = column.value_kind.from_numbers(values)

    def rows_of(bad: pl.Series) -> npt.NDArray[np.bool_]:
        return np.bincount(flat["row"].filter(bad).to_numpy(), minlength=num_rows) > 0

    faults: list[_Fault] = [] if bad is None else [(column.kind, rows_of(bad))]
    if column.weight_separator is not None and (odd := ~flat["weight"].is_finite().fill_null(value=False)).any():
        faults.append(("value_weight", rows_of(odd)))
    if column.null_values and len(numbers := null_numbers(column)):
        kept = ~typed.is_in(numbers)
        flat, typed = flat.filter(kept.fill_null(value=True)), typed.filter(kept.fill_null(value=True))
    counts = np.bincount(flat["row"].to_numpy(), minlength=num_rows)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    if column.weight_separator is not None:
        typed = pl.DataFrame({"value": typed, "weight": flat["weight"]}).to_struct(column.name)
    grouped = pl.Series(column.name, pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), typed.to_arrow()))
    # A cell of separators alone has no values, and so is missing as an empty one is.
    return pl.select(pl.when(pl.Series(counts > 0)).then(grouped).alias(column.name)).to_series(), faults


def _values_of_lists(cells: pl.Series, column: SparseColumn) -> pl.DataFrame:
    """`row` and `value` of those values of lists that count, and their `weight` (Float32) where they have some."""
    assert column.value_separator is not None
    lists = cells.str.split(column.value_separator) if cells.dtype == pl.String else cells
    rows = pl.int_range(len(lists), dtype=pl.Int64, eager=True)
    if isinstance(lists.dtype, pl.Array):
        lists = lists.arr.to_list()
    flat = pl.DataFrame({"row": rows, "value": lists}).explode("value")
    if flat["value"].dtype == pl.Struct:
        flat = flat.unnest("value").with_columns(pl.col("weight").cast(pl.Float64).cast(pl.Float32))
    elif column.weight_separator is not None:
        flat = _with_weights(flat, column.weight_separator)
    if flat["value"].dtype == pl.String:
        flat = flat.filter(pl.col("value") != "")
    else:
        if flat["value"].dtype.is_float():
            flat = flat.with_columns(pl.col("value").fill_nan(None))
        flat = flat.drop_nulls("value")
    if column.null_values:
        flat = flat.filter(~pl.col("value").is_in(column.null_values))
    if column.max_values is not None:
        by_row = flat.group_by("row", maintain_order=True)
        flat = by_row.head(column.max_values) if column.keep is None else by_row.tail(column.max_values)
    return flat


def _with_weights(flat: pl.DataFrame, separator: str) -> pl.DataFrame:
    """The `value` of each text and its `weight`, Float32: 1 where no separator is there, null where it is bad."""
    parts = pl.col("value").str.extract_groups(f"(?s)^(.*){re.escape(separator)}(.*)$")
    value, weight = parts.struct.field("1"), parts.struct.field("2")
    return flat.with_columns(
        pl.coalesce(value, "value").alias("value"),
        pl.when(weight.is_null())
        .then(pl.lit(1.0, pl.Float32))
        .otherwise(weight.cast(pl.Float64, strict=False).cast(pl.Float32))
        .alias("weight"),
    )


def _faults(
    text: pl.Series, typed: pl.Series, column: Column, *, is_label_optional: bool
) -> Iterator[tuple[str, npt.NDArray[np.bool_]]]:
    """What is wrong with cells: each reason, and in which rows."""
    bad = bad_cells(text, typed, column)
    if bad is None:
        return
    if isinstance(column, LabelColumn):
        if not is_label_optional:
            yield "no_label", text.is_null().to_numpy()
        bad &= text.is_not_null()
    elif isinstance(column, WeightColumn) and is_label_optional:
        bad &= text.is_not_null()
    yield column.kind if isinstance(column, Feature) else column.role, bad.to_numpy()


def written_cells(values: pl.Series, column: Feature) -> pl.Series:
    """Typed cells as a log has them, for example hex values as digits; lists stay lists, of texts where they weigh."""
    to_text = column.value_kind.to_text
    if isinstance(column, SparseColumn) and column.weight_separator is not None:
        to_text = partial(_weighted_texts, column)
    if not column.is_multi_valued:
        return to_text(values)
    return pl.select(pl.when(values.is_not_null()).then(map_lists(values, to_text)).alias(values.name)).to_series()


def _weighted_texts(column: SparseColumn, flat: pl.Series) -> pl.Series:
    """Values with their weights, as they stand in cells."""
    texts = column.value_kind.to_text(flat.struct.field("value")).cast(pl.String)
    weights = flat.struct.field("weight").cast(pl.String)
    return pl.select(pl.concat_str(texts, pl.lit(column.weight_separator), weights)).to_series()
