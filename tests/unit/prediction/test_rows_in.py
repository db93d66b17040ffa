"""A log is read in chunks, and every row of it is either good or has its place among the bad."""

import gzip
import os
import threading

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, IgnoredColumn, LabelColumn, SparseColumn, TimeColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.find import find_files
from torchdlrm.prediction.rows_in import STANDARD_INPUT, RowsIn

SCHEMA = FeatureSchema(
    name="small",
    separator=",",
    quote='"',
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="count", kind="int"),
        SparseColumn(name="text", kind="string"),
    ),
)
GOOD = ["1,2,a", '0,,"b,\n""c"""', '1,-3,""']
BAD = ["2,2,a", "1,x,a", "1,2", "", '1,2,a"b', "1,2,\0"]


def read(paths, **options):
    """All chunks as one: frame, positions of bad rows, number of rows, and (line, reason) of the bad rows."""
    chunks = list(RowsIn(paths, SCHEMA, **options))
    starts = np.cumsum([0, *(chunk.num_rows for chunk in chunks)])
    bad = np.concatenate([chunk.bad_positions + start for chunk, start in zip(chunks, starts, strict=False)])
    lines = sorted(
        (row.line, reason) for chunk in chunks for reason, rows in chunk.bad_rows.examples.items() for row in rows
    )
    return pl.concat([chunk.frame for chunk in chunks]), bad.tolist(), int(starts[-1]), lines


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(st.sampled_from(GOOD + BAD), min_size=1, max_size=12), data=st.data())
def test_every_row_is_good_or_bad_in_its_place_however_the_log_is_cut(rows, data, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "log.csv"
    # Good rows first: which layout the log has is told by most of its lines.
    rows = [*["0,1,x"] * 13, *rows]
    text = "".join(row + "\n" for row in rows)
    data = text.encode() if data.draw(st.booleans()) else gzip.compress(text.encode())
    path.write_bytes(data)
    frame, bad, num_rows, lines = read([path], chunk_bytes=64)
    assert num_rows == len(rows)
    assert bad == [i for i, row in enumerate(rows) if row in BAD]
    starts = np.cumsum([1, *(row.count("\n") + 1 for row in rows)])
    told, all_bad = {line for line, _ in lines}, {int(starts[i]) for i in bad}
    assert told <= all_bad
    assert told == all_bad or len(bad) > 5  # the first five of a chunk and reason are told
    assert frame.height == len(rows) - len(bad)


def test_a_header_shifts_lines_and_not_rows(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"\xef\xbb\xbftext,more,count\na,?,1\nb,?,x\n")
    frame, bad, num_rows, lines = read([path])
    assert frame.rows() == [("a", 1)]
    assert (bad, num_rows, lines) == ([1], 2, [(3, "int")])


@pytest.mark.parametrize("kind", ["text", "gzip", "zstd", "parquet", "json lines"])
def test_standard_input_is_read_like_a_file(kind, tmp_path, monkeypatch):
    rows = pl.DataFrame({"label": [1, 0] * 500, "count": range(1000), "text": ["a", "b,c"] * 500})
    rows.write_parquet(tmp_path / "log.parquet")
    text = rows.write_csv(include_header=False).encode()
    content = {
        "text": text,
        "gzip": gzip.compress(text),
        "zstd": pa.compress(text, "zstd", asbytes=True),
        "parquet": (tmp_path / "log.parquet").read_bytes(),
        "json lines": rows.write_ndjson().encode(),
    }[kind]

    reading, writing = os.pipe()

    def write():
        with os.fdopen(writing, "wb", buffering=0) as pipe:
            for start in range(0, len(content), 3_000):
                pipe.write(content[start : start + 3_000])

    writer = threading.Thread(target=write)
    writer.start()
    with os.fdopen(reading, "rb") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        frame, bad, num_rows, _ = read([STANDARD_INPUT], chunk_bytes=1_000)
    writer.join(timeout=60)
    assert (bad, num_rows) == ([], 1000)
    assert frame.select(rows.columns).rows() == rows.rows()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "is empty"),
        (b"\x1f\x8b" + b"damaged" * 9, r"the gzip stream is damaged or cut off \("),
        (b"\x28\xb5\x2f\xfd" + b"damaged" * 9, r"the zstd stream is damaged or cut off \("),
    ],
)
def test_standard_input_that_is_no_log_is_named_as_the_fault(content, fault, tmp_path, monkeypatch):
    (tmp_path / "log").write_bytes(content)
    with (tmp_path / "log").open("rb") as pipe:
        monkeypatch.setattr("sys.stdin", pipe)
        with pytest.raises(LogError, match=f"^standard input: {fault}"):
            read([STANDARD_INPUT])


def test_a_carriage_return_inside_a_line_is_part_of_its_cell(tmp_path):
    path = tmp_path / "log.csv"
    path.write_bytes(b"1,2,a\n0,3,b\rc\n")
    frame, bad, num_rows, _ = read([path])
    assert (bad, num_rows, frame["text"].to_list()) == ([], 2, ["a", "b\rc"])


def test_standard_input_goes_alone(tmp_path):
    with pytest.raises(LogError, match="-: standard input is read alone, not among files"):
        list(RowsIn([STANDARD_INPUT, tmp_path / "log.csv"], SCHEMA))


@pytest.mark.parametrize("name", ["log.csv", "bare.csv", "log.parquet"])
def test_columns_that_name_a_row_are_kept_so_that_scores_can_be_joined(tmp_path, name):
    """Times, what the schema ignores, and ids by their names, of the log alone too; `all` is the whole row."""
    path = tmp_path / name
    cells = {"label": 1, "count": 2, "text": "a", "movieId": "m", "at": 7, "title": "t", "tag_id": "x;y"}
    columns = [
        *SCHEMA.columns,
        SparseColumn(name="movie", header_name="movieId", kind="string"),
        TimeColumn(name="at"),
        IgnoredColumn(name="title"),
        SparseColumn(name="tags", header_name="tag_id", kind="string", value_separator=";"),
    ]
    schema = SCHEMA.with_columns(columns).model_copy(update={"header": name == "log.csv"})
    more = {} if name == "bare.csv" else {"prediction": 0.5, "request_id": "r", "note": "n"}
    frame = pl.DataFrame(cells | more)
    if path.suffix == ".parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path, include_header=name == "log.csv")
    keys = ["movie", "at", "title", *(["request_id"] if more else [])]
    everything = ["label", "count", "text", "movie", "at", "title", "tags", *(["request_id", "note"] if more else [])]
    for kept, wanted in (("keys", keys), ("all", everything), ("none", [])):
        rows = RowsIn([path], schema, kept=kept)
        (chunk,) = rows
        assert rows.passthrough == wanted
        assert set(wanted) <= set(chunk.frame.columns)
    rows = RowsIn([path], schema, passthrough=["title"], kept="keys")
    (chunk,) = rows
    assert rows.passthrough == ["title", *(key for key in keys if key != "title")]
    assert chunk.frame["title"].to_list() == ["t"]


def test_columns_are_handed_on_by_either_name(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("label,count,text,user id\n1,2,a,u\n")
    columns = [*SCHEMA.columns, IgnoredColumn(name="user_id", header_name="user id")]
    schema = SCHEMA.with_columns(columns).model_copy(update={"header": True})
    for name in ("user id", "user_id"):
        (chunk,) = RowsIn([path], schema, passthrough=[name])
        assert chunk.frame["user_id"].to_list() == ["u"]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize("names", [("user id", "km"), ("user_id", "distance"), ("user_id", "km")])
def test_a_column_is_found_by_its_name_where_its_header_name_is_not_in_the_file(tmp_path, kind, names):
    """To predict and to train; where both are there, the header_name is meant, and the other is of the log alone."""
    user = SparseColumn(name="user_id", header_name="user id", kind="string")
    columns = (LabelColumn(name="label"), DenseColumn(name="distance", header_name="km", kind="int"), user)
    schema = SCHEMA.with_columns(columns).model_copy(update={"header": True})
    path = tmp_path / f"log.{kind}"
    rows = pl.DataFrame({"label": 1, names[0]: "u", names[1]: 5})
    for frame in (rows, rows if "user id" not in names else rows.with_columns(pl.lit("other").alias("user_id"))):
        {"csv": frame.write_csv, "jsonl": frame.write_ndjson, "parquet": frame.write_parquet}[kind](path)
        for kept in ("keys", "all"):
            log = RowsIn([path], schema, kept=kept)
            (chunk,) = log
            assert chunk.frame.select("label", "user_id", "distance").rows() == [(1, "u", 5)]
            assert "user_id" in log.passthrough
        (file,) = find_files([path])
        layout = file.format.layout(file, schema)
        (part,) = file.format.chunks(file, layout, 1 << 30)
        assert file.format.read(file, part, layout).frame.select("user_id", "distance").rows() == [("u", 5)]


def test_names_that_two_columns_exchange_are_those_of_the_log(tmp_path):
    """A key that is one column's header_name is that column, whatever has it as its name."""
    columns = [SparseColumn(name="a", header_name="b", kind="string"), SparseColumn(name="b", kind="string")]
    columns[1] = columns[1].model_copy(update={"header_name": "a"})
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": "1"}\n')
    (chunk,) = RowsIn([path], SCHEMA.with_columns([LabelColumn(name="label"), *columns]))
    assert chunk.frame.select("a", "b").rows() == [(None, "1")]
