"""Lines -> typed columns: what is accepted, what is a bad row, and that cuts do not matter."""

import bz2
import gzip
import io
import lzma
import random
import zipfile
from itertools import pairwise
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.find import find_files
from torchdlrm.logs.format import extra_columns
from torchdlrm.logs.formats.text import TEXT, parse_chunk
from torchdlrm.logs.lines import MAX_ROW_BYTES, plan_chunks, read_chunks
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.storage.reading import identity_of

SCHEMA = FeatureSchema(
    name="small",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="count", kind="int"),
        DenseColumn(name="price", kind="float"),
        SparseColumn(name="hex", kind="hex"),
        SparseColumn(name="number", kind="int"),
        SparseColumn(name="text", kind="string"),
    ),
)
GOOD = b"1\t-3\t2.5\t0Fe\t7\tK\xc3\xb6ln\n"
GOOD_ROW = (1, -3, 2.5, 0x0FE, 7, "Köln")


def first_example(bad_rows: BadRows):
    (reason,) = bad_rows.examples
    return reason, bad_rows.examples[reason][0]


def test_cells_become_the_types_of_their_columns_and_empty_ones_null():
    chunk = parse_chunk(GOOD + b"0\t\t\t\t\t\n", SCHEMA)
    assert chunk.frame.rows() == [GOOD_ROW, (0, None, None, None, None, None)]
    assert chunk.frame.dtypes == [pl.Int8, pl.Int64, pl.Float64, pl.UInt32, pl.Int64, pl.String]
    assert (chunk.num_lines, chunk.bad_rows.total) == (2, 0)


def test_extreme_values_are_kept_exactly():
    line = b"0\t9223372036854775807\t1e-300\tffffffff\t-9223372036854775808\t\xef\xbb\xbf\n"
    chunk = parse_chunk(line, SCHEMA)
    assert chunk.frame.rows() == [(0, 2**63 - 1, 1e-300, 2**32 - 1, -(2**63), "\ufeff")]


@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last_end", [True, False])
def test_line_ends_of_unix_and_windows_are_read_alike(end, last_end):
    text = GOOD.replace(b"\n", end) * 3
    chunk = parse_chunk(text if last_end else text.removesuffix(end), SCHEMA)
    assert chunk.frame.rows() == [GOOD_ROW] * 3
    assert (chunk.num_lines, chunk.bad_rows.total) == (3, 0)


def test_quotes_and_hashes_are_text_like_any_other():
    chunk = parse_chunk(b'1\t1\t1\t1\t1\t"a\n#\t1\t1\t1\t1\tb\n1\t1\t1\t1\t1\tc"d"\n', SCHEMA)
    assert chunk.frame["text"].to_list() == ['"a', 'c"d"']
    assert chunk.bad_rows.counts == {"label": 1}


@pytest.mark.parametrize(
    ("line", "reason", "column", "value"),
    [
        (b"1\t2\t3\t4\t5", "columns", None, "5 columns, not 6, cut at each tab"),
        (b"1\t2\t3\t4\t5\t6\t7", "columns", None, "7 columns, not 6, cut at each tab"),
        (b"", "columns", None, "an empty line"),
        (b"2\t2\t3\t4\t5\t6", "label", "label", "2"),
        (b"-1\t2\t3\t4\t5\t6", "label", "label", "-1"),
        (b"\t2\t3\t4\t5\t6", "no_label", "label", ""),
        (b"yes\t2\t3\t4\t5\t6", "label", "label", "yes"),
        (b"1\t2.0\t3\t4\t5\t6", "int", "count", "2.0"),
        (b"1\t 2\t3\t4\t5\t6", "int", "count", " 2"),
        (b"1\t9223372036854775808\t3\t4\t5\t6", "int", "count", "9223372036854775808"),
        (b"1\t2\tnan\t4\t5\t6", "float", "price", "nan"),
        (b"1\t2\t1e999\t4\t5\t6", "float", "price", "1e999"),
        (b"1\t2\tdear\t4\t5\t6", "float", "price", "dear"),
        (b"1\t2\t3\tfffffffff\t5\t6", "hex", "hex", "fffffffff"),
        (b"1\t2\t3\t000000001\t5\t6", "hex", "hex", "000000001"),
        (b"1\t2\t3\t+1\t5\t6", "hex", "hex", "+1"),
        (b"1\t2\t3\tg\t5\t6", "hex", "hex", "g"),
        (b"1\t2\t3\t4\t1e3\t6", "int", "number", "1e3"),
        (b"1\t2\t3\t4\t5\ta\0b", "nul_byte", "text", "a\0b"),
        (b"1\t2\0\t3\t4\t5\t6", "nul_byte", "count", "2\0"),
        (b"1\t2\t3\t4\t5\t\xff", "utf8", "text", "\ufffd"),
        (b"1\tx\t3\tx\t5\t6", "int", "count", "x"),
    ],
)
@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_a_bad_row_is_counted_once_by_its_leftmost_fault_and_the_others_are_kept(line, reason, column, value, position):
    before, after = {"first": (0, 3), "middle": (2, 1), "last": (3, 0)}[position]
    chunk = parse_chunk(GOOD * before + line + b"\n" + GOOD * after, SCHEMA)
    assert chunk.frame.rows() == [GOOD_ROW] * 3
    assert chunk.num_lines == 4
    assert chunk.bad_rows.counts == {reason: 1}
    found_reason, example = first_example(chunk.bad_rows)
    assert (found_reason, example.line, example.column, example.value) == (reason, before + 1, column, value)


def test_a_long_and_a_short_line_do_not_make_up_for_each_other():
    chunk = parse_chunk(b"1\t2\t3\t4\t5\n" + GOOD + b"1\t2\t3\t4\t5\t6\t7\n", SCHEMA)
    assert chunk.frame.rows() == [GOOD_ROW]
    assert chunk.bad_rows.counts == {"columns": 2}


def test_a_chunk_of_bad_rows_alone_has_no_rows():
    chunk = parse_chunk(b"\n\n\xff\n", SCHEMA)
    assert chunk.frame.shape == (0, 6)
    assert chunk.bad_rows.counts == {"columns": 3}


CELL = {
    "label": st.sampled_from([b"0", b"1", b"2", b""]),
    "count": st.sampled_from([b"", b"5", b"-2", b"x", b"9" * 19]),
    "price": st.sampled_from([b"", b"0.5", b"inf"]),
    "hex": st.sampled_from([b"", b"ab", b"+a", b"123456789"]),
    "number": st.sampled_from([b"", b"3"]),
    "text": st.sampled_from([b"", b"\xc3\xa4", b"\xff", b"\xef\xbb\xbf", b'"', b"a b", b"\0"]),
}
LINE = st.one_of(
    st.tuples(*CELL.values()).map(b"\t".join),
    st.tuples(*CELL.values()).map(b"\t".join),
    st.sampled_from([b"", b"\t", GOOD[:-1], b"\xef\xbb\xbf" + GOOD[:-1], b"1\t2\t3\t4\t5\t6\t7"]),
)


@settings(max_examples=150, deadline=None)
@given(lines=st.lists(LINE, min_size=1, max_size=12), cuts=st.sets(st.integers(1, 11)))
def test_any_cut_at_line_ends_gives_the_same_rows_and_bad_rows(lines, cuts):
    whole = parse_chunk(b"".join(line + b"\n" for line in lines), SCHEMA)
    frames, bad_rows, num_lines = [], BadRows(), 0
    edges = [0, *sorted(cut for cut in cuts if cut < len(lines)), len(lines)]
    for start, end in pairwise(edges):
        part = parse_chunk(b"".join(line + b"\n" for line in lines[start:end]), SCHEMA)
        frames.append(part.frame)
        bad_rows.add_chunk(part.bad_rows, "", num_lines)
        num_lines += part.num_lines
    assert pl.concat(frames).equals(whole.frame)
    assert num_lines == whole.num_lines
    assert bad_rows == whole.bad_rows


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("last_end", [True, False])
@pytest.mark.parametrize("chunk_bytes", [40, 64, 1000, 1 << 20])
def test_chunks_are_whole_lines_and_together_the_file(tmp_path, compressed, last_end, chunk_bytes):
    lines = [b"%d\t%s\n" % (i, b"x" * (i % 30)) for i in range(300)]
    text = b"".join(lines) if last_end else b"".join(lines)[:-1]
    path = tmp_path / "log"
    path.write_bytes(b"\xef\xbb\xbf" + text if not compressed else gzip.compress(text))
    (file,) = find_files([path])
    chunks = list(read_chunks(file, SCHEMA, chunk_bytes))
    assert b"".join(chunks) == text
    assert all(chunk.endswith(b"\n") for chunk in chunks[:-1])
    assert max(map(len, chunks)) <= chunk_bytes


@settings(max_examples=100, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=9).map(lambda line: line.replace(b"\n", b"")), min_size=1, max_size=30),
    last_end=st.booleans(),
    mark=st.booleans(),
    chunk_bytes=st.integers(20, 60),
)
def test_planned_chunks_are_whole_lines_and_together_the_file(tmp_path_factory, lines, last_end, mark, chunk_bytes):
    text = b"".join(line + b"\n" for line in lines).removeprefix(b"\xef\xbb\xbf")
    text = text if last_end else text.removesuffix(b"\n")
    text = text or b"x\n"
    path = tmp_path_factory.mktemp("plan") / "log"
    path.write_bytes(b"\xef\xbb\xbf" + text if mark else text)
    file = LogFile(path, identity_of(path), None, TEXT)
    chunks = plan_chunks(file, SCHEMA, chunk_bytes)
    data = path.read_bytes()
    assert b"".join(data[chunk.start : chunk.end] for chunk in chunks) == text
    assert all(data[chunk.end - 1 : chunk.end] == b"\n" for chunk in chunks[:-1])
    assert all(chunk.end - chunk.start <= chunk_bytes + 9 for chunk in chunks)


def test_a_file_without_line_ends_is_one_bad_row_and_does_not_fill_the_memory(tmp_path):
    path = tmp_path / "log"
    with path.open("wb") as file:
        file.truncate(200 << 20)
    (file,) = find_files([path])
    chunks = list(read_chunks(file, SCHEMA, 1000))
    planned = plan_chunks(file, SCHEMA, 1000)
    assert [len(chunk) for chunk in chunks] == [MAX_ROW_BYTES + 1]
    assert sum(chunk.end - chunk.start for chunk in planned) <= MAX_ROW_BYTES + 1001
    assert parse_chunk(chunks[0], SCHEMA).bad_rows.counts == {"long": 1}


def whole_file(file, schema, chunk_bytes, *, planned):
    """All good rows, the bad rows with their lines in the file, and where they stand."""
    if planned:
        data = file.path.read_bytes()
        texts = [data[chunk.start : chunk.end] for chunk in plan_chunks(file, schema, chunk_bytes)]
    else:
        texts = list(read_chunks(file, schema, chunk_bytes))
    frames, bad_rows, num_lines = [], BadRows(), 0
    for text in texts:
        assert len(text) <= max(chunk_bytes, 16 << 20) + MAX_ROW_BYTES + 1
        parsed = parse_chunk(text, schema)
        frames.append(parsed.frame)
        bad_rows.add_chunk(parsed.bad_rows, file.name, num_lines)
        num_lines += parsed.num_lines
    return pl.concat(frames), bad_rows


@pytest.mark.parametrize("chunk_bytes", [5_000, 1 << 20, 64 << 20])
@pytest.mark.parametrize("way", ["plain", "no quotes", "quoted"])
def test_a_row_of_more_than_a_mebibyte_is_bad_however_the_file_is_cut(tmp_path, way, chunk_bytes):
    schema = SCHEMA if way == "plain" else SCHEMA.model_copy(update={"quote": '"'})
    cell = b'"a ""long""\tcell %s"' if way == "quoted" else b"a long cell %s"
    long_row = b"1\t2\t3\t4\t5\t" + cell + b"\n"
    limit = MAX_ROW_BYTES - len(long_row) + 3
    rows = [long_row % (b"x" * num) for num in (limit + 1, 3 << 20, limit, limit + 1)]
    lines = [GOOD * 50, rows[0], GOOD, rows[1], GOOD * 200, rows[2], GOOD * 3, rows[3].removesuffix(b"\n")]
    (tmp_path / "log").write_bytes(b"".join(lines))
    (tmp_path / "log.gz").write_bytes(gzip.compress(b"".join(lines), 1))
    for file in find_files([tmp_path / "log", tmp_path / "log.gz"]):
        frame, bad_rows = whole_file(file, schema, chunk_bytes, planned=file.packing is None)
        assert frame.height == 255
        assert [len(text) > 1000 for text in frame["text"]].index(True) == 251
        assert bad_rows.counts == {"long": 3}
        assert [row.line for row in bad_rows.examples["long"]] == [51, 53, 258]
        assert bad_rows.examples["long"][0].value.startswith("1\t2\t3\t4\t5\t")
    log = RowsIn([tmp_path / "log"], schema)
    assert sum(chunk.frame.height for chunk in log) == 255
    assert sum(chunk.bad_rows.counts.get("long", 0) for chunk in log) == 3


def test_a_quote_that_is_never_closed_is_told(tmp_path):
    (tmp_path / "log").write_bytes(GOOD * 9 + b'1\t2\t3\t4\t5\t"opened\n' + GOOD * (1 << 20))
    (file,) = find_files([tmp_path / "log"])
    with pytest.raises(LogError, match=r"a row that starts with '1.*opened' has no end in \d\d,"):
        plan_chunks(file, SCHEMA.model_copy(update={"quote": '"'}), 1 << 20)


def test_a_header_may_name_the_columns_in_any_order_and_others_too(tmp_path):
    schema = SCHEMA.model_copy(update={"header": True, "separator": ",", "quote": '"'})
    path = tmp_path / "log.csv"
    lines = b'text,"of, another",count,label,hex,price,number,\n"K\xc3\xb6ln",x,-3,1,0Fe,2.5,7,y\n'
    path.write_bytes(b"\xef\xbb\xbf" + lines)
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress(lines.replace(b"\n", b"\r\n")))
    for file in find_files([path, tmp_path / "log.csv.gz"]):
        layout = file.format.layout(file, schema)
        (chunk,) = read_chunks(file, schema)
        assert parse_chunk(chunk, layout).frame.select(column.name for column in SCHEMA.columns).rows() == [GOOD_ROW]
        assert extra_columns(layout) == ("of, another", "")
    assert extra_columns(schema) is None


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"label,count,prize,hex,number,title\n", "has no column price, text, which the schema 'small' reads"),
        (b"label,count\n", "has no column price, hex, number, text,"),
        (b"\n", "has no column label, count, price, hex, number, text,"),
        (b"label,count,count,price,hex,hex,number,text\n", "names the column count, hex more than once"),
    ],
)
def test_a_header_that_lacks_columns_or_has_one_twice_is_reported(tmp_path, header, message):
    schema = SCHEMA.model_copy(update={"header": True, "separator": ","})
    path = tmp_path / "log.csv"
    path.write_bytes(header + b"1,2,3,4,5,6\n")
    (file,) = find_files([path])
    with pytest.raises(LogError, match=r"line 1 \(header\)") as caught:
        file.format.layout(file, schema)
    assert message in str(caught.value)


def test_day_files_are_read_by_number_and_other_files_as_given(tmp_path):
    for name in ("day_10", "day_2.gz", "day_0_sample.tsv", "b.tsv", "a.tsv"):
        (tmp_path / name).write_bytes(b"x")
    days = [tmp_path / "day_10", tmp_path / "day_2.gz", tmp_path / "day_0_sample.tsv"]
    assert [file.name for file in find_files(days)] == ["day_0_sample.tsv", "day_2.gz", "day_10"]
    others = [tmp_path / "b.tsv", tmp_path / "day_2.gz", tmp_path / "a.tsv"]
    assert [file.name for file in find_files(others)] == ["b.tsv", "day_2.gz", "a.tsv"]


def test_files_that_cannot_be_a_log_are_reported(tmp_path):
    good, empty = tmp_path / "good", tmp_path / "empty"
    good.write_bytes(GOOD)
    empty.touch()
    for paths, message in (
        ([], "no log given"),
        ([tmp_path / "absent"], "absent: there is no such file"),
        (
            [tmp_path / "*.tsv"],
            r"\*\.tsv: there is no such file; .*; a shell makes names of such a pattern where it is",
        ),
        ([tmp_path], "is a folder"),
        ([good, empty], "empty: the file is empty"),
        ([good, tmp_path / "." / "good"], "given twice"),
    ):
        with pytest.raises(LogError, match=message):
            find_files(paths)


def zipped(content):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("log", content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("log.bz2", bz2.compress(GOOD, 1), "log.bz2: is packed by bzip2"),
        ("log.xz", lzma.compress(GOOD), "log.xz: is packed by xz"),
        ("log.json", b'[{"click": 1, "price": 2.5}]\n', "log.json: is one JSON array"),
        ("log.html", b"<!DOCTYPE html><html>", "log.html: is a page of HTML"),
        ("log.zip", zipped(GOOD), "log.zip: is a zip archive"),
        ("bare", GOOD.decode().encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8 bare > bare.utf8"),
        ("a log.csv", GOOD.decode().encode("utf-16"), "iconv -f UTF-16 -t UTF-8 'a log.csv'"),
    ],
)
def test_a_file_of_a_kind_that_is_not_read_is_told_with_what_makes_a_log_of_it(
    tmp_path, monkeypatch, name, content, message
):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(content)
    with pytest.raises(LogError, match="a log is UTF-8 text") as caught:
        find_files([Path(name)])
    assert message in str(caught.value)


def test_few_rows_are_read_as_they_are_among_many(seed):
    """Columns of few rows are cast together, with a bad cell in none, one or several of them."""
    rng = random.Random(seed)
    hexes, counts = ["", "0fe", "FF", "ffffffff"], ["", "1", "-3"]
    schema = criteo_schema()
    lines = []
    for i in range(9_000):
        bad = {0: ["x"], 1: ["+f", "1.5"]}.get(i % 100, [])
        cells = ["1", *rng.choices(counts + bad, k=13), *rng.choices(hexes + bad, k=26)]
        lines.append("\t".join(cells).encode() + b"\n")
    whole = parse_chunk(b"".join(lines), schema)
    parts = [parse_chunk(b"".join(lines[i : i + 50]), schema) for i in range(0, 9_000, 50)]
    assert 50 < whole.bad_rows.total < 9_000
    assert pl.concat(part.frame for part in parts).equals(whole.frame)
    bad = [i * 50 + position for i, part in enumerate(parts) for position in part.bad_positions]
    assert bad == whole.bad_positions.tolist()
    assert sum(part.bad_rows.total for part in parts) == whole.bad_rows.total == len(bad)


def test_null_values_of_the_file_and_of_a_column_are_missing():
    schema = FeatureSchema(
        name="nulls",
        null_values=("NULL", "-"),
        columns=(
            LabelColumn(name="label"),
            DenseColumn(name="count", kind="int", null_values=("-999",)),
            DenseColumn(name="price", kind="float", null_values=("nan", "-1")),
            SparseColumn(name="hex", kind="hex"),
            SparseColumn(name="text", kind="string"),
            SparseColumn(name="tags", kind="int", value_separator="|"),
        ),
    )
    lines = b"1\t-999\tnan\tNULL\t-\tNULL\n0\t-0999\t-1.0\t-\tNULL \t1|-|2\n-\t1\t1\t1\t1\t1\n0\tNULL\t1\t1\t1\t1\n"
    for copies in (1, 2_000):  # few rows and many are cast in different ways
        chunk = parse_chunk(lines * copies, schema)
        assert chunk.frame.rows() == copies * [
            (1, None, None, None, None, None),
            (0, None, None, None, "NULL ", [1, 2]),
        ]
        # A column with null values of its own does not have the file's, and a label is never missing.
        assert chunk.bad_rows.counts == {"no_label": copies, "int": copies}


def test_an_empty_value_is_left_out_also_where_it_has_a_weight():
    tags = SparseColumn(name="tags", value_separator="|", weight_separator=":", max_values=2)
    schema = FeatureSchema(name="weighted", columns=(LabelColumn(name="label"), tags))
    chunk = parse_chunk(b"1\t:0.4|a||b:2|c\n0\t:0.4\n", schema)
    assert chunk.bad_rows.total == 0
    assert chunk.frame["tags"].to_list() == [[{"value": "a", "weight": 1.0}, {"value": "b", "weight": 2.0}], None]


@pytest.mark.parametrize(
    ("keys", "labels"),
    [
        ({}, {"0": 0, "1": 1, "true": 1, "False": 0, "1.0": 1, "0.0": 0, "2": None, "-1": None, "yes": None}),
        ({"positive": "yes"}, {"yes": 1, "no": 0, "Yes": 0, "": None}),
        ({"positive": 1}, {"1": 1, "-1": 0, "1.0": 1, "true": 1, "0": 0}),
        ({"positive": ["buy", "cart"], "negative": "view"}, {"buy": 1, "cart": 1, "view": 0, "1": None, "": None}),
        ({"positive": True, "negative": [-1, 0]}, {"TRUE": 1, "1": 1, "0.0": 0, "-1": 0, "2": None}),
        ({"threshold": 4.0}, {"4": 1, "3.5": 0, "5.0": 1, "x": None}),
        ({"positive": "1", "null_values": "?"}, {"1": 1, "?": None, "0": 0}),
    ],
)
def test_the_schema_says_which_labels_are_clicks(keys, labels):
    column = {"role": "label", "name": "label", **keys}
    schema = FeatureSchema.model_validate({**SCHEMA.model_dump(), "columns": [column, *SCHEMA.columns[1:]]})
    for copies in (1, 5_000):
        chunk = parse_chunk("".join(f"{label}\t\t\t\t\t\n" for label in labels).encode() * copies, schema)
        assert chunk.frame["label"].to_list() == [label for label in labels.values() if label is not None] * copies
    to_predict = parse_chunk(
        "".join(f"{label}\t\t\t\t\t\n" for label in labels).encode(), schema, is_label_optional=True
    )
    missing = [label for label in labels if label in ("", "?")]
    assert to_predict.frame["label"].null_count() == len(missing)
    assert chunk.bad_rows.counts.get("no_label", 0) == 5_000 * len(missing)


def test_bad_cells_are_told_with_the_key_of_the_schema_that_reads_them():
    bad_rows = parse_chunk(
        b"yes\t1\t1\t1\t1\tx\n1\tNULL\t1\t1\t1\tx\n1\t1\t-\t1\t1\tx\n1\t1\t1\t1\t9223372036854775808\tx\n", SCHEMA
    ).bad_rows
    with pytest.raises(LogError) as caught:
        bad_rows.check(0)
    assert 'which of the labels "yes" are clicks: positive = ' in str(caught.value)
    assert "threshold = " in str(caught.value)
    assert 'null_values = ["-", "NULL"]' in str(caught.value)
    assert 'kind = "string"' in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"threshold": 1.0, "positive": "1"}, "has threshold and positive"),
        ({"negative": "no"}, "negative needs positive"),
        ({"positive": ["a", "b"], "negative": ["b"]}, "b stands in positive and in negative"),
        ({"positive": []}, "at least 1 item"),
        ({"null_values": [None]}, "null_values"),
    ],
)
def test_contradicting_keys_of_a_label_are_refused(keys, message):
    column = {"role": "label", "name": "label", **keys}
    with pytest.raises(ValidationError, match=message):
        FeatureSchema.model_validate({**SCHEMA.model_dump(), "columns": [column, *SCHEMA.columns[1:]]})


def test_a_log_may_have_no_dense_column_but_must_have_a_sparse_one():
    label, dense, sparse = LabelColumn(name="l"), DenseColumn(name="d"), SparseColumn(name="s")
    assert FeatureSchema(name="categorical", columns=(label, sparse)).dense == ()
    with pytest.raises(ValidationError, match="at least one column must have the role 'sparse'"):
        FeatureSchema(name="numbers", columns=(label, dense))
