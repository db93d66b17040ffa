"""Raw cells -> typed columns: what counts as a number, a hex value, a label, a list, and what is a bad cell.

| kind | type of the column | accepted |
| --- | --- | --- |
| label | Int8 | 0 or 1, true or false, never missing; with a threshold any number |
| dense int | Int64 | a decimal number of 64 bits, with or without a sign |
| dense float | Float64 | a finite decimal number |
| sparse hex | UInt32 | 1 to 8 hexadecimal digits, upper or lower case |
| sparse int | Int64 | as dense int |
| sparse string | String | anything |
| sparse, several values | List of these | the values between separators; empty ones are left out |
| time | Int64 | a number, or a date and time as ISO 8601 writes it; never missing; ordered as the times are |
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.data.bad_rows import BadRow, BadRows
from torchdlrm.schema import Column, DenseColumn, FeatureSchema, IgnoredColumn, LabelColumn, SparseColumn, TimeColumn

_FEW_ROWS = 4_096
_DATETIME_FORMATS = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")  # without a zone: UTC


def text_frame(schema: FeatureSchema, columns: dict[str, list[str | None]]) -> pl.DataFrame:
    """Raw cells as a frame of text columns; columns that are not given have no rows."""
    names = [column.name for column in schema.columns]
    return pl.DataFrame({name: columns.get(name, []) for name in names}, schema=dict.fromkeys(names, pl.String))


def to_typed_columns(
    text: pl.DataFrame,
    schema: FeatureSchema,
    bad_rows: BadRows,
    line_numbers: npt.NDArray[np.int64] | None = None,
) -> tuple[pl.DataFrame, pl.Series | None]:
    """Cast raw cells to the types of their columns.

    Args:
        text: a String column for each column of the schema, B rows.
        schema: the columns.
        bad_rows: takes the rows whose cells do not fit, each by its leftmost fault.
        line_numbers: int64 [B], the line of each row from 0; by default its position.

    Returns:
        The typed columns, B rows; and a Boolean mask of the good rows, or None when all are good.
    """
    used = [column for column in schema.columns if not isinstance(column, IgnoredColumn)]
    lists = [column for column in used if isinstance(column, SparseColumn) and column.is_multi_valued]
    plain = [column for column in used if column not in lists]
    clean: set[str] = set()
    if text.height > _FEW_ROWS:
        typed = text.select(_cast(column) for column in plain).to_dict()
    else:
        typed, clean = _typed_few(text, plain)
    good: npt.NDArray[np.bool_] | None = None
    for column in used:
        if column.name in clean:
            continue
        if isinstance(column, SparseColumn) and column.is_multi_valued:
            typed[column.name], bad = _typed_lists(text[column.name], column)
            if bad is None:
                continue
        else:
            cells = typed[column.name]
            if isinstance(column, LabelColumn) and cells.null_count():
                cells = typed[column.name] = _with_words(text[column.name], cells)
            if _is_clean(text[column.name], cells, column):
                continue
            bad = _is_bad(text[column.name], cells, column).to_numpy()
        rows = np.flatnonzero(bad if good is None else bad & good)
        examples = [
            BadRow(
                line=int(row if line_numbers is None else line_numbers[row]) + 1,
                column=column.name,
                value=_as_text(text[column.name][int(row)], column),
            )
            for row in rows[: BadRows.NUM_EXAMPLES]
        ]
        bad_rows.add(
            column.kind if isinstance(column, DenseColumn | SparseColumn) else column.role, len(rows), examples
        )
        good = ~bad if good is None else good & ~bad
    frame = pl.DataFrame([typed[column.name] for column in used])
    return frame, None if good is None else pl.Series(good)


def typed_cells(text: pl.Series, column: DenseColumn | SparseColumn) -> tuple[pl.Series, bool]:
    """Cast the cells of a column with one value a row.

    Args:
        text: String; the cells of the column, or those of several columns of the same role and kind one after another.
        column: it, or one of them.

    Returns:
        The typed cells, null where one is missing or bad; and whether none is bad.
    """
    typed = pl.DataFrame([text.alias(column.name)]).select(_cast(column)).to_series()
    return typed, _is_clean(text, typed, column)


def _typed_few(text: pl.DataFrame, columns: Sequence[Column]) -> tuple[dict[str, pl.Series], set[str]]:
    """The typed columns of few rows, and the names of some that are clean.

    The cost is then that of the casts, not of the cells: columns of the same kind are cast as one.
    """
    alike: dict[tuple[str, str], list[DenseColumn | SparseColumn]] = {}
    typed: dict[str, pl.Series] = {}
    clean: set[str] = set()
    for column in columns:
        if isinstance(column, DenseColumn | SparseColumn):
            alike.setdefault((column.role, column.kind), []).append(column)
        else:
            typed[column.name] = text.select(_cast(column)).to_series()
    for group in alike.values():
        cells, is_clean = typed_cells(pl.concat([text[column.name] for column in group]), group[0])
        for i, column in enumerate(group):
            typed[column.name] = cells.slice(i * text.height, text.height).alias(column.name)
        clean |= {column.name for column in group if is_clean}
    return typed, clean


def _as_text(cell: object, column: Column) -> str:
    if isinstance(cell, pl.Series):
        return (getattr(column, "value_separator", None) or ",").join(map(str, cell))
    return "" if cell is None else str(cell)


def _typed_lists(text: pl.Series, column: SparseColumn) -> tuple[pl.Series, npt.NDArray[np.bool_] | None]:
    """Lists of typed values, null where the cell is missing; and which rows have a bad one (None: no row)."""
    assert column.value_separator is not None
    lists = text if text.dtype == pl.List else text.str.split(column.value_separator)
    flat = pl.DataFrame({"row": pl.int_range(len(lists), dtype=pl.Int64, eager=True), "value": lists}).explode("value")
    flat = flat.filter(pl.col("value") != "")
    if column.max_values is not None:
        flat = flat.group_by("row", maintain_order=True).head(column.max_values)
    values = flat["value"]
    typed = pl.DataFrame({column.name: values}).select(_cast_value(pl.col(column.name), column)).to_series()
    bad_rows: npt.NDArray[np.bool_] | None = None
    if not _is_clean(values, typed, column):
        bad_rows = np.bincount(flat["row"].filter(_is_bad(values, typed, column)).to_numpy(), minlength=len(lists)) > 0
    counts = np.bincount(flat["row"].to_numpy(), minlength=len(lists))
    offsets = np.concatenate([[0], np.cumsum(counts)])
    grouped = pl.Series(column.name, pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), typed.to_arrow()))
    # A cell of separators alone has no values, and so is missing as an empty one is.
    return pl.select(pl.when(pl.Series(counts > 0)).then(grouped).alias(column.name)).to_series(), bad_rows


def _cast(column: Column) -> pl.Expr:
    cell = pl.col(column.name)
    if isinstance(column, LabelColumn):
        if column.threshold is None:
            return cell.cast(pl.Int8, strict=False)
        number = cell.cast(pl.Float64, strict=False)
        return pl.when(number.is_finite()).then((number >= column.threshold).cast(pl.Int8)).alias(column.name)
    if isinstance(column, TimeColumn):
        return _cast_time(cell, column)
    if isinstance(column, DenseColumn):
        return cell.cast(pl.Int64 if column.kind == "int" else pl.Float64, strict=False)
    assert isinstance(column, SparseColumn)
    return _cast_value(cell, column)


def _cast_value(cell: pl.Expr, column: SparseColumn) -> pl.Expr:
    if column.kind == "hex":
        return cell.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    return cell.cast(pl.Int64, strict=False) if column.kind == "int" else cell


def _cast_time(cell: pl.Expr, column: TimeColumn) -> pl.Expr:
    """Int64 numbers in the order of the times: themselves, or microseconds, or the bits of a float64 made to ascend."""
    if column.kind == "int":
        return cell.cast(pl.Int64, strict=False)
    if column.kind == "datetime":
        # Every format by itself: left to infer one, Polars would judge a row by the others of its chunk.
        text = cell.str.replace("T", " ", literal=True).str.replace("Z$", "+00:00")
        times = [text.str.to_datetime(form, time_unit="us", strict=False) for form in _DATETIME_FORMATS]
        zoned = [text.str.to_datetime(form + "%:z", time_unit="us", strict=False) for form in _DATETIME_FORMATS[1:]]
        return pl.coalesce(*(time.cast(pl.Int64) for time in (*times, *zoned))).alias(column.name)
    number = cell.cast(pl.Float64, strict=False)
    bits = (number + 0.0).reinterpret(dtype=pl.Int64)  # + 0.0 makes -0.0 the same time as 0.0
    ascending = pl.when(bits >= 0).then(bits).otherwise(bits.xor(pl.lit(2**63 - 1, pl.Int64)))
    return pl.when(number.is_finite()).then(ascending).alias(column.name)


def _with_words(text: pl.Series, typed: pl.Series) -> pl.Series:
    """A label with `true` and `false` read as 1 and 0."""
    words = text.str.to_lowercase().replace_strict({"true": 1, "false": 0}, default=None, return_dtype=pl.Int8)
    return typed.fill_null(words) if (typed.is_null() & words.is_not_null()).any() else typed


def _is_clean(text: pl.Series, typed: pl.Series, column: Column) -> bool:
    """Whether a whole column is good, told from figures that cost almost nothing."""
    if isinstance(column, LabelColumn):
        return typed.null_count() == 0 and typed.is_between(0, 1).all()
    if isinstance(column, TimeColumn):
        return typed.null_count() == 0
    if typed.null_count() != text.null_count():
        return False
    if isinstance(column, SparseColumn) and column.kind == "hex":
        return not _is_odd_hex(text).any()
    return not (isinstance(column, DenseColumn) and column.kind == "float") or typed.is_finite().all()


def _is_bad(text: pl.Series, typed: pl.Series, column: Column) -> pl.Series:
    if isinstance(column, LabelColumn):
        return ~typed.is_between(0, 1).fill_null(value=False)
    if isinstance(column, TimeColumn):
        return typed.is_null()
    bad = typed.is_null() & text.is_not_null()
    if isinstance(column, SparseColumn) and column.kind == "hex":
        bad |= _is_odd_hex(text).fill_null(value=False)
    if isinstance(column, DenseColumn) and column.kind == "float":
        bad |= ~typed.is_finite().fill_null(value=True)
    return bad


def _is_odd_hex(text: pl.Series) -> pl.Series:
    """What the cast takes and the schema does not: leading zeros past 8 digits, and a sign."""
    cell = pl.col(text.name)
    return text.to_frame().select((cell.str.len_bytes() > 8) | cell.str.starts_with("+")).to_series()
