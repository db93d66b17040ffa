"""Rows from JSON become the columns that the same rows of a log become."""

import json

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdlrm.errors import RowError
from torchdlrm.features.columns import DenseColumn, IgnoredColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.formats.text import parse_chunk
from torchdlrm.prediction.json_rows import RowReader

SCHEMA = FeatureSchema(
    name="mixed",
    null_values=("NULL", "-7"),
    columns=(
        SparseColumn(name="tags", kind="string", value_separator=";", max_values=3, null_values=("d", "b;d")),
        DenseColumn(name="count", kind="int"),
        LabelColumn(name="label"),
        DenseColumn(name="price", kind="float", null_values=("n/a", "2.50", "x")),
        SparseColumn(name="hex", kind="hex", null_values=("g", "00ff")),
        SparseColumn(name="hex_2", kind="hex"),
        IgnoredColumn(name="note"),
        SparseColumn(name="number", kind="int"),
        SparseColumn(name="numbers", kind="int", value_separator=";"),
        SparseColumn(name="text", kind="string"),
    ),
)
READER = RowReader(SCHEMA)
DEEP = json.loads("[" * 900 + "]" * 900)
FEATURES = [column.name for column in (*SCHEMA.dense, *SCHEMA.sparse)]
CELLS = {
    "tags": st.sampled_from(["", "a", "a;b", ";a;;b;c;d", ";", "NULL", "d", "b;d", "d;d"]),
    "count": st.sampled_from(
        ["", "0", "NULL", "-07", "-7", "+7", "9223372036854775807", "9223372036854775808", "1.0", "x", " 1"]
    ),
    "label": st.sampled_from(["0", "1", "1.0", "-1", "TRUE", "yes"]),
    "price": st.sampled_from(["", "1", "-2.5", "2.5", "NULL", "x", "1e-300", "nan", "inf", "1e400", "2,5"]),
    "hex": st.sampled_from(["", "0", "Ff", "ffffffff", "0ffffffff", "+f", "0x1", "g"]),
    "hex_2": st.sampled_from(["", "1", "+1", "NULL"]),
    "note": st.sampled_from(["", "anything"]),
    "number": st.sampled_from(["", "-7", "NULL", "-9223372036854775808", "5", "5.0", "five"]),
    "numbers": st.sampled_from(["", "1;2", ";", "1;x", "NULL", "1;-07;NULL"]),
    "text": st.sampled_from(["", "a", "Köln", '"', "NULL", "-7"]),
}


@settings(max_examples=200, deadline=None)
@given(row=st.fixed_dictionaries(CELLS))
def test_texts_mean_what_they_mean_in_a_log(row):
    chunk = parse_chunk("\t".join(row[column.name] for column in SCHEMA.columns).encode() + b"\n", SCHEMA)
    if chunk.bad_rows.total:
        with pytest.raises(RowError, match=r"^row 0, column '\w+': "):
            READER.read([row])
    else:
        assert READER.read([row]).equals(chunk.frame.select(*FEATURES, "label"))


def test_many_rows_are_read_as_each_by_itself():
    rows = [{"count": str(i), "hex": f"{i:x}", "price": i / 7, "numbers": [i, i + 1]} for i in range(300)]
    assert READER.read(rows).equals(pl.concat([READER.read([row]) for row in rows]))


def test_numbers_are_themselves_and_what_is_absent_is_missing():
    rows = json.loads(
        '[{"count": 3, "price": 0.1, "number": -1, "text": 5, "numbers": [1, 2], "tags": ["a;b", "", "c"]},'
        ' {"count": 3.0, "price": 7, "number": 2e3, "hex": null, "numbers": 4, "tags": []}, {}]'
    )
    frame = READER.read(rows)
    assert frame.columns == FEATURES
    assert frame["count"].to_list() == [3, 3, None]
    assert frame["price"].to_list() == [0.1, 7.0, None]
    assert frame["number"].to_list() == [-1, 2000, None]
    assert frame["text"].to_list() == ["5", None, None]
    assert frame["numbers"].to_list() == [[1, 2], [4], None]
    assert frame["tags"].to_list() == [["a;b", "c"], None, None]
    assert frame["hex"].to_list() == [None, None, None]
    assert READER.read([]).schema == frame.schema


@given(
    number=st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    name=st.sampled_from(["count", "price", "number"]),
)
def test_a_number_means_what_its_text_means(number, name):
    if name != "price" and not float(number).is_integer():
        return
    text = str(number if name == "price" or abs(number) > 2**53 else int(number))
    if name != "price" and isinstance(number, float) and abs(number) > 2**53:
        with pytest.raises(RowError, match="may have been rounded"):
            READER.read([{name: number}])
    else:
        assert READER.read([{name: number}, {}]).equals(READER.read([{name: text}, {}]))


def test_a_label_is_read_where_it_is_given():
    rows = [{}, {"label": 1}, {"label": None}, {"label": "0"}, {"label": True}, {"note": "x"}]
    assert READER.read(rows)["label"].to_list() == [None, 1, None, 0, 1, None]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ({"nme": 1}, "row 1, column 'nme': the model has no such column; it has count, price, tags"),
        ({"count": 2.5}, "row 1, column 'count': the cell is not an integer of 64 bits: '2.5'"),
        ({"count": 2**63}, "row 1, column 'count': the cell is not an integer of 64 bits: '9223372036854775808'"),
        ({"count": -(2.0**63)}, "row 1, column 'count': the float -9.22.* may have been rounded; send an integer"),
        ({"count": True}, "row 1, column 'count': expected an integer, not True"),
        ({"count": [1]}, "row 1, column 'count': expected an integer, not \\[1\\]"),
        ({"price": float("nan")}, "row 1, column 'price': the cell is not a finite number: 'nan'"),
        ({"hex": 12}, "row 1, column 'hex': expected hexadecimal digits as text, such as '68fd1e64', not 12"),
        ({"text": {"a": 1}}, "row 1, column 'text': expected text, not {'a': 1}"),
        ({"text": "\ud800"}, "a row holds the text '.*', which is not Unicode"),
        ({"numbers": [1, [2]]}, "row 1, column 'numbers': expected an integer, or a list of such, not \\[2\\]"),
        ({"label": 2}, "row 1, column 'label': the label means neither 0 nor 1: '2'"),
        ({"label": []}, "row 1, column 'label': a label is 0 or 1, not \\[\\]"),
        (["a"], "row 1: expected the row's cells by column name, not \\['a'\\]"),
        ({"tags": ["a"] * 65_537}, "row 1, column 'tags': the cell has 65,537 values; at most 65,536 are taken"),
        ({"numbers": "1;" * 40_000}, "row 1, column 'numbers': the cell has 80,000 characters; at most 65,536"),
        ({"count": DEEP}, r"row 1, column 'count': expected an integer, not \[\[\[\.\.\.\]\]\]"),
        ({"count": {"a": DEEP}}, r"row 1, column 'count': expected an integer, not {'a': \[\[\.\.\.\]\]}"),
    ],
)
def test_a_cell_that_does_not_fit_is_told_with_row_column_and_value(cells, message):
    with pytest.raises(RowError, match=message):
        READER.read([{"count": 1}, cells])


@pytest.mark.parametrize(
    "row",
    [
        {"\U0010ffff" * 100_000: 1},
        {"hex": "\U0010ffff" * 50_000},
        {"count": "x" * 50_000},
        {"count": ["y" * 50_000] * 10},
        {"count": {"y" * 50_000: "z" * 50_000}},
        {"text": "\ud800" * 50_000},
        {"numbers": ["x" * 50_000]},
        {"label": "x" * 50_000},
        ["x" * 50_000],
    ],
)
def test_a_message_repeats_little_of_what_was_sent(row):
    with pytest.raises(RowError) as refused:
        READER.read([row])
    assert len(str(refused.value)) < 250
