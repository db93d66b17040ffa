"""What a log to predict looks like is told from its first lines, or from its columns' names."""

from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, IgnoredColumn, LabelColumn, SparseColumn, TimeColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.formats.text import TEXT
from torchdlrm.prediction.rows_in import find_columns, schema_for_writing
from torchdlrm.storage.reading import FileIdentity

SCHEMA = FeatureSchema(
    name="shop",
    separator=";",
    columns=(
        IgnoredColumn(name="order_id"),
        TimeColumn(name="time"),
        LabelColumn(name="label"),
        DenseColumn(name="price", header_name="Price in EUR", kind="float"),
        SparseColumn(name="country", kind="string"),
    ),
)
LOG = Path("log.csv")


def found(log, schema, wanted):
    read, passthrough = find_columns(log, LOG, schema, wanted)
    return SimpleNamespace(schema=read, passthrough=passthrough, has_label=bool(read.labels))


def columns_of_text(head, schema, wanted):
    with TEXT.opened(BytesIO(head), LogFile(LOG, FileIdentity(len(head), 0), None, TEXT), schema) as log:
        return found(log, schema, wanted)


def columns_of_names(names, wanted):
    return found(SimpleNamespace(names=names), SCHEMA, wanted)


def roles(columns):
    return [(column.role, column.name) for column in columns.schema.columns]


def test_a_text_without_a_header_has_the_columns_of_the_schema_in_order():
    columns = columns_of_text(b"1;2;0;3.5;de\n", SCHEMA, [])
    expected = [("ignore", "order_id"), ("ignore", "time"), ("label", "label"), ("dense", "price")]
    assert roles(columns) == [*expected, ("sparse", "country")]
    assert columns.has_label
    assert not columns.schema.header


def test_or_these_without_the_label_which_most_lines_tell():
    columns = columns_of_text(b"1;2;0;3.5;de\n" + b"1;2;3.5;de\nbad\n" * 2, SCHEMA, ["order_id"])
    assert roles(columns) == [("sparse", "order_id"), ("ignore", "time"), ("dense", "price"), ("sparse", "country")]
    assert not columns.has_label


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_header_is_found_and_gives_the_order(end):
    head = f'country,"Price in EUR",user id{end}de,1,7{end}'.encode()
    columns = columns_of_text(head, schema_for_writing(SCHEMA, "csv"), ["user id"])
    assert roles(columns) == [("sparse", "country"), ("dense", "price"), ("sparse", "user id")]
    assert columns.schema.header
    assert (columns.schema.separator, columns.schema.quote) == (",", '"')


def test_a_quote_is_a_letter_where_the_schema_has_no_quotes():
    columns = columns_of_text(b'1;2;0;3.5;d"e\n1;2;0;3.5;"de\n', schema_for_writing(SCHEMA, "log"), [])
    assert columns.has_label


def test_what_is_no_feature_may_be_missing_or_more():
    columns = columns_of_names(["x", "country", "label", "Price in EUR", "x2"], ["label"])
    assert roles(columns) == [
        ("ignore", "@0"),
        ("sparse", "country"),
        ("label", "label"),
        ("dense", "price"),
        ("ignore", "@4"),
    ]


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["country", "cost"], [], "log.csv: has no column Price in EUR, which the model reads"),
        (["country", "Price in EUR"], ["label"], "log.csv has no column label; it has country, Price in EUR"),
        (["country", "Price in EUR", "country"], [], "log.csv: names the column country more than once"),
    ],
)
def test_what_is_missing_is_told(names, wanted, message):
    with pytest.raises(LogError, match=message):
        columns_of_names(names, wanted)


def test_a_column_that_is_wanted_and_not_there_is_told_without_a_header_too():
    with pytest.raises(LogError, match=r"^`columns`: log\.csv has no column label; it has order_id, time, price"):
        columns_of_text(b"1;2;3.5;de\n", SCHEMA, ["label"])


def test_a_schema_with_a_header_needs_one():
    with pytest.raises(LogError, match=r"log.csv, line 1 \(header\): has no column Price in EUR, country"):
        columns_of_text(b"1;2;0;3.5;de\n", SCHEMA.model_copy(update={"header": True}), [])
