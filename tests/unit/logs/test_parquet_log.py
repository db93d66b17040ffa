"""Cells of Parquet: a number is itself, NaN is missing, and what cannot be a cell is told before anything is read."""

import math

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.find import find_files
from torchdlrm.preprocessing.preprocess import preprocess, work_folder

SCHEMA = FeatureSchema(
    name="parquet",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="count", kind="int"),
        DenseColumn(name="price", kind="float", null_values=("-1",)),
        SparseColumn(name="hex", kind="hex", null_values=("0000ffff",)),
        SparseColumn(name="number", kind="int"),
        SparseColumn(name="text", kind="string"),
        SparseColumn(name="tags", kind="hex", value_separator="|"),
    ),
)
COLUMNS = {
    "label": pa.array([0.0, 1.0, 0.0]),
    "count": pa.array([1.0, math.nan, -7.0]),
    "price": pa.array([math.nan, 0.5, -1.0]),
    "hex": pa.array([2**32 - 1, 10, 0xFFFF], pa.int64()),
    "number": pa.array([3.0, -1.0, None]),
    "text": pa.array(["a", None, ""]),
    "tags": pa.array([[10, None, 255], [], None], pa.list_(pa.uint64())),
}


def read(path, columns, **options):
    pq.write_table(pa.table(columns), path)
    (file,) = find_files([path])
    (chunk,) = file.format.chunks(file, SCHEMA, 1 << 30)
    return file.format.read(file, chunk, SCHEMA, **options)


def test_numbers_are_themselves_and_nan_is_missing(tmp_path):
    chunk = read(tmp_path / "log.parquet", COLUMNS)
    assert chunk.frame.rows() == [
        (0, 1, None, 2**32 - 1, 3, "a", [10, 255]),
        (1, None, 0.5, 10, -1, None, None),
        (0, -7, None, None, None, None, None),
    ]
    assert chunk.frame.dtypes == [pl.Int8, pl.Int64, pl.Float64, pl.UInt32, pl.Int64, pl.String, pl.List(pl.UInt32)]


@pytest.mark.parametrize(
    ("name", "values", "told"),
    [
        ("hex", pa.array([-1, 2**32, 1]), "the number -1"),
        ("hex", pa.array([0.5, 1e20, 1.0]), "the number 0.5"),
        ("number", pa.array([2**63, 2**64 - 1, 1], pa.uint64()), "9223372036854775808"),
        ("number", pa.array([0.5, 1e17, 1.0]), "0.5"),
        ("count", pa.array([0.5, math.inf, 1.0]), "0.5"),
        ("label", pa.array([0.5, 2.0, 1.0]), "0.5"),
    ],
)
def test_numbers_that_do_not_fit_are_bad_rows(tmp_path, name, values, told):
    chunk = read(tmp_path / "log.parquet", {**COLUMNS, name: values})
    ((reason, count),) = chunk.bad_rows.counts.items()
    assert (reason, count) == ("hex" if name == "hex" else "label" if name == "label" else "int", 2)
    assert chunk.bad_rows.examples[reason][0].value == told


def test_a_row_without_a_label_is_bad_but_not_where_labels_are_optional(tmp_path):
    columns = {**COLUMNS, "label": pa.array([None, math.nan, 1.0])}
    assert read(tmp_path / "a.parquet", columns).bad_rows.counts == {"no_label": 2}
    assert read(tmp_path / "b.parquet", columns, is_label_optional=True).frame["label"].to_list() == [None, None, 1]


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("text", pa.array([1, 2, 3], pa.duration("us")), r"column text: is of the Parquet type duration\[us\]"),
        ("tags", pa.array([[{"a": 1}]] * 3), "column tags: is of the Parquet type list<"),
        ("count", pa.array([{"a": 1}] * 3), "column count: is of the Parquet type struct<"),
        ("text", pa.array([["a"]] * 3), "column text: holds lists"),
    ],
)
def test_a_type_that_is_no_cell_is_told_at_once_and_the_corrected_schema_runs(tmp_path, name, values, message):
    log = tmp_path / "log.parquet"
    table = {**COLUMNS, name: values}
    pq.write_table(pa.table({key: pa.concat_arrays([column] * 40) for key, column in table.items()}), log)
    with pytest.raises(LogError, match=message):
        preprocess([log], tmp_path / "dataset", SCHEMA)
    assert not work_folder(tmp_path / "dataset").exists()
    corrected = SCHEMA.with_columns([column for column in SCHEMA.columns if column.name != name])
    assert preprocess([log], tmp_path / "dataset", corrected).manifest.bad_rows.total == 0


def test_bytes_that_are_no_text_are_told(tmp_path):
    with pytest.raises(LogError, match="column text: holds bytes that are no text in UTF-8"):
        read(tmp_path / "log.parquet", {**COLUMNS, "text": pa.array([b"a", b"\xff", None])})
