"""Cells of every type that Parquet files and frames hold mean what their text means."""

import datetime
from decimal import Decimal

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, TimeColumn, WeightColumn
from torchdlrm.features.schema import FeatureSchema

NUMBERS = [0, 1, 2, -1, 7, 127, 128, 255, 300, 2**24 + 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**53 + 1, 2**63 - 1, 2**63]
INTEGERS = [getattr(pl, f"{sign}Int{bits}") for sign in ("", "U") for bits in (8, 16, 32, 64)] + [pl.Int128]
FLOATS = [pl.Float16, pl.Float32, pl.Float64]


def values_of(dtype):
    if dtype in INTEGERS:
        low, high = (pl.select(getattr(dtype, f"{side}")()).item() for side in ("min", "max"))
        return st.integers(low, high) | st.sampled_from([x for x in NUMBERS if low <= x <= high])
    if dtype in FLOATS:
        width = {pl.Float16: 16, pl.Float32: 32, pl.Float64: 64}[dtype]
        return st.floats(width=width) | st.sampled_from([0.0, -0.0, 1.0, 0.5, -7.0, 2.0**11 + 8])
    return VALUES[dtype]


MOMENTS = st.datetimes(datetime.datetime(1, 1, 1), datetime.datetime(9999, 12, 31))
VALUES = {
    pl.Boolean: st.booleans(),
    pl.Decimal(20, 2): st.integers(-(10**10), 10**10).map(lambda x: Decimal(x) / 100),
    pl.Date: st.dates(),
    pl.Datetime("ms"): MOMENTS,
    pl.Datetime("us"): MOMENTS,
    pl.Datetime("us", "Europe/Berlin"): st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2100, 1, 1)),
    pl.Datetime("ns"): st.datetimes(datetime.datetime(1900, 1, 1), datetime.datetime(2100, 1, 1)),
    pl.Time: st.times(),
    pl.String: st.sampled_from(
        ["", "0", "1", "-7", "1.0", "0.5", "1e3", "ff", "NULL", "inf", "nan", "2024-01-02", "é"]
    ),
    pl.Categorical: st.sampled_from(["", "0", "ff", "NULL", "true"]),
    pl.Binary: st.sampled_from([b"", b"0", b"ff", b"NULL"]),
    pl.Null: st.none(),
}
TYPES = [*INTEGERS, *FLOATS, *VALUES]
NULLS = st.sampled_from([None, ("-7", "NULL"), ("1", "0.5", "inf"), ("1.00",), ("ff", "128")])


def columns():
    """Columns of every role and kind."""
    features = [DenseColumn(name="x", kind=kind) for kind in ("int", "float")]
    features += [SparseColumn(name="x", kind=kind) for kind in ("int", "hex", "string")]
    return [
        LabelColumn(name="x"),
        LabelColumn(name="x", threshold=0.7),
        LabelColumn(name="x", positive=("1", "true")),
        WeightColumn(name="x"),
        *(TimeColumn(name="x", kind=kind) for kind in ("int", "float", "datetime")),
        *features,
    ]


def lists():
    kinds = [SparseColumn(name="x", kind=kind, value_separator=";") for kind in ("int", "hex", "string")]
    return [*kinds, SparseColumn(name="x", kind="int", value_separator=";", max_values=2)]


WEIGHTED = [SparseColumn(name="x", kind=kind, value_separator=";", weight_separator=":") for kind in ("int", "string")]


def written(cells, column):
    """The text of cells, as a program writes it that makes CSV of them."""
    if isinstance(cells.dtype, pl.Struct):
        values = written(cells.struct.field("value"), column).fill_null("")
        pairs = zip(values, cells.struct.field("weight").cast(pl.String).fill_null(""), strict=True)
        return pl.Series([f"{value}:{weight}" for value, weight in pairs], dtype=pl.String)
    if cells.dtype.is_float():
        cells = cells.fill_nan(None)
    kind = getattr(column, "kind", None)
    if kind == "hex" and cells.dtype.is_numeric():
        numbers = [None if x is None else float(x) for x in cells]
        texts = [None if x is None else str(text) for x, text in zip(cells, cells.cast(pl.String), strict=True)]
        whole = [x is not None and x.is_integer() and 0 <= x < 2**32 for x in numbers]
        parts = zip(numbers, texts, whole, strict=True)
        return pl.Series(
            [f"{int(x):08x}" if ok else text and f"the number {text}" for x, text, ok in parts], dtype=pl.String
        )
    if kind == "int" and cells.dtype.is_float():
        whole = [x is not None and float(x).is_integer() and abs(x) <= 2**53 for x in cells]
        parts = zip(cells, cells.cast(pl.String), whole, strict=True)
        return pl.Series([str(int(x)) if ok else text for x, text, ok in parts], dtype=pl.String)
    if isinstance(column, TimeColumn) and cells.dtype in (pl.Datetime, pl.Date):
        if getattr(cells.dtype, "time_zone", None):
            cells = cells.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return cells.cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f")
    return cells.cast(pl.String)


def read(cells, column, *, is_label_optional):
    layout = FeatureSchema.model_construct(name="one", columns=(column,))
    bad_rows = BadRows()
    frame, good = to_typed_columns(cells.alias("x").to_frame(), layout, bad_rows, is_label_optional=is_label_optional)
    good = pl.Series([True] * len(cells), dtype=pl.Boolean) if good is None else good
    return frame.filter(good), good, bad_rows


def check(cells, text, column, *, is_label_optional=False):
    found, good, bad_rows = read(cells, column, is_label_optional=is_label_optional)
    expected, expected_good, expected_bad = read(text, column, is_label_optional=is_label_optional)
    assert good.to_list() == expected_good.to_list()
    assert bad_rows == expected_bad
    assert found.schema == expected.schema
    assert found.rows() == expected.rows() or found.equals(expected)


@pytest.mark.parametrize("dtype", [dtype for dtype in TYPES if dtype != pl.String], ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cell_of_any_type_means_what_its_text_means(dtype, data):
    column = data.draw(st.sampled_from(columns())).model_copy(update={"null_values": data.draw(NULLS)})
    cells = pl.Series("x", data.draw(st.lists(st.none() | values_of(dtype), max_size=8)), dtype=dtype)
    text = written(cells, column)
    check(cells, text.set(text == "", None), column, is_label_optional=data.draw(st.booleans()))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_list_of_any_type_means_what_the_list_of_its_texts_means(dtype, data):
    column = data.draw(st.sampled_from(lists() + WEIGHTED)).model_copy(update={"null_values": data.draw(NULLS)})
    one, drawn = dtype, values_of(dtype)
    if column.weight_separator is not None:
        weight = data.draw(st.sampled_from([pl.Float32, pl.Float64, pl.Int64]))
        one = pl.Struct({"value": dtype, "weight": weight})
        drawn = st.fixed_dictionaries({"value": st.none() | drawn, "weight": st.none() | values_of(weight)})
    drawn = st.lists(st.none() | st.lists(st.none() | drawn, max_size=4), max_size=6)
    cells = pl.Series("x", data.draw(drawn), dtype=pl.List(one))
    texts = [None if cell is None else written(cell, column).to_list() for cell in cells]
    check(cells, pl.Series("x", texts, dtype=pl.List(pl.String)), column)
