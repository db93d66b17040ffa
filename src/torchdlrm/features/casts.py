"""Says for one column with one value in a cell what its text becomes, and which cells are bad.

In: a column of a schema.  Out: expressions on its text (String, missing cells null), and judgements of what they gave.
`torchdlrm.features.cells` puts the columns of rows together.
"""

from collections.abc import Sequence
from functools import cache

import polars as pl

from torchdlrm.features.columns import Column, Feature, LabelColumn, TimeColumn, WeightColumn

_DATETIME_FORMATS = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M")  # without a zone: UTC


def cast_text(column: Column) -> pl.Expr:
    """The column's text as values, null where a cell is missing or bad."""
    cell = pl.col(column.name)
    if isinstance(column, LabelColumn):
        if column.positive is not None:
            return _cast_named_label(cell, column)
        if column.threshold is None:
            return cell.cast(pl.Int8, strict=False)
        number = cell.cast(pl.Float64, strict=False)
        return pl.when(number.is_finite()).then((number >= column.threshold).cast(pl.Int8)).alias(column.name)
    if isinstance(column, TimeColumn):
        return _cast_time(cell, column)
    if isinstance(column, WeightColumn):
        return cell.cast(pl.Float64, strict=False).cast(pl.Float32)
    assert isinstance(column, Feature)
    return column.value_kind.from_text(cell)


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


def _label_number(cell: pl.Expr) -> pl.Expr:
    """A label as a number, `true` as 1 and `false` as 0; null where it is none."""
    words = cell.str.to_lowercase().replace_strict({"true": 1.0, "false": 0.0}, default=None, return_dtype=pl.Float64)
    return pl.coalesce(cell.cast(pl.Float64, strict=False), words)


def _cast_named_label(cell: pl.Expr, column: LabelColumn) -> pl.Expr:
    """1 for the values that are clicks, 0 for those that are none; they are compared as texts, numbers as numbers."""

    def is_one_of(values: Sequence[str]) -> pl.Expr:
        texts = pl.Series(column.name, values)
        numbers = texts.to_frame().select(_label_number(pl.col(column.name))).to_series().drop_nulls()
        return cell.is_in(values) | _label_number(cell).is_in(numbers).fill_null(value=False)

    assert column.positive is not None, "the caller saw to it"
    others = cell.is_not_null() if column.negative is None else is_one_of(column.negative)
    return pl.when(is_one_of(column.positive)).then(1).when(others).then(0).cast(pl.Int8).alias(column.name)


def with_words(text: pl.Series, typed: pl.Series) -> pl.Series:
    """A label with `true`, `false`, `1.0` and `0.0` read as the numbers that they are."""
    number = text.to_frame().select(_label_number(pl.col(text.name))).to_series()
    return typed.fill_null(
        pl.select(pl.when(number.is_in([0.0, 1.0])).then(number.cast(pl.Int8, strict=False))).to_series()
    )


def bad_cells(text: pl.Series, typed: pl.Series, column: Column) -> pl.Series | None:
    """Which cells are bad, also missing ones where a column may not lack a value; None where all are good."""
    if isinstance(column, Feature):
        return column.value_kind.bad(text, typed)
    if isinstance(column, LabelColumn):
        bad = ~typed.is_between(0, 1).fill_null(value=False)
    elif isinstance(column, TimeColumn):
        bad = typed.is_null()
    else:
        assert isinstance(column, WeightColumn)
        bad = ~((typed >= 0) & typed.is_finite()).fill_null(value=False)
    return bad if bad.any() else None


def without_null_values(typed: pl.Series, column: Feature) -> pl.Series:
    """Typed cells, null where one is a number that the column's `null_values` name."""
    if not column.null_values or len(numbers := null_numbers(column)) == 0:
        return typed
    return pl.select(pl.when(~typed.is_in(numbers)).then(typed).alias(typed.name)).to_series()


@cache
def null_numbers(column: Feature) -> pl.Series:
    """Those of a column's `null_values` that are numbers of its kind: of the type of the column, none for texts."""
    texts = pl.Series(column.name, column.null_values or [], dtype=pl.String)
    if column.value_kind.is_text:
        return texts.head(0)
    numbers = texts.to_frame().select(cast_text(column)).to_series()
    bad = bad_cells(texts, numbers, column)
    return numbers if bad is None else numbers.filter(~bad)


def without_null_texts(column: Column) -> pl.Expr:
    """The cells of a column, null where they are one of its `null_values`."""
    cell = pl.col(column.name)
    assert column.null_values, "only of columns that have some"
    return pl.when(~cell.is_in(column.null_values)).then(cell).alias(column.name)
