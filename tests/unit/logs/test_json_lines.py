"""JSON Lines: a row means what it means in a request, and a line that is no row is bad by itself."""

import gzip
import json

import polars as pl
import pyarrow as pa
import pytest

from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, TimeColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.proposal.propose import propose_schema
from torchdlrm.prediction.json_rows import RowReader
from torchdlrm.prediction.rows_in import RowsIn

SCHEMA = FeatureSchema(
    name="shop",
    quote='"',
    header=True,
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="count", kind="int"),
        DenseColumn(name="price", header_name="the price", kind="float", null_values=("-1",)),
        SparseColumn(name="hex", kind="hex"),
        SparseColumn(name="text", kind="string"),
        SparseColumn(name="tags", kind="int", value_separator="|", weight_separator=":"),
    ),
)
GOOD = [
    {"label": 1, "count": 3, "the price": 0.5, "hex": "ff", "text": "ä\n", "tags": [1, 2, 1]},
    {"label": True, "count": 3.0, "the price": 2, "hex": "", "text": 7, "tags": {"4": 0.5, "5": 2}},
    {"label": "0", "count": "-3", "the price": -1, "text": None, "tags": "6|7:0.25", "other": {"a": [1]}},
    {"label": 0},
]
BAD = [
    ("nonsense", "json"),
    ("[1]", "json"),
    ("", "json"),
    ('{"label": 1} {"label": 0}', "json"),
    ('{"label": NaN}', "json"),
    ('{"label": 1, "text": "' + "x" * (1 << 20) + '"', "long"),
    ('{"label": 2}', "label"),
    ('{"count": 1}', "no_label"),
    ('{"label": 1, "count": 0.5}', "int"),
    ('{"label": 1, "count": 123456789012345678901}', "int"),
    ('{"label": 1, "hex": 12}', "hex"),
    ('{"label": 1, "text": ["a"]}', "nested"),
    ('{"label": 1, "tags": [1, "x"]}', "int"),
]


def read(path, lines, pack=lambda text: text, schema=SCHEMA):
    path.write_bytes(pack("".join(line + "\n" for line in lines).encode()))
    (file,) = find_files([path])
    layout = file.format.layout(file, schema)
    (chunk,) = file.format.chunks(file, layout, 1 << 30)
    return file.format.read(file, chunk, layout)


def test_rows_are_what_the_same_rows_of_a_request_are(tmp_path):
    chunk = read(tmp_path / "log.jsonl", map(json.dumps, GOOD))
    assert chunk.bad_rows.total == 0
    requested = [{key.removeprefix("the "): cell for key, cell in row.items() if key != "other"} for row in GOOD]
    expected = RowReader(SCHEMA).read(requested)
    assert chunk.frame.select(expected.columns).equals(expected)
    assert chunk.frame["label"].to_list() == [1, 1, 0, 0]
    assert chunk.frame["text"].to_list() == ["ä\n", "7", None, None]


@pytest.mark.parametrize(("line", "reason"), BAD)
def test_a_bad_line_has_its_place_whatever_stands_around_it(tmp_path, line, reason):
    good = [json.dumps(row) for row in GOOD]
    chunk = read(tmp_path / "log.jsonl", [*good, line, *good])
    assert chunk.bad_rows.counts == {reason: 1}
    assert [row.line for row in chunk.bad_rows.examples[reason]] == [5]
    assert (chunk.bad_positions.tolist(), chunk.num_lines) == ([4], 9)
    assert chunk.frame[4:].equals(chunk.frame[:4])


@pytest.mark.parametrize("pack", [gzip.compress, lambda text: pa.compress(text, "zstd", asbytes=True)])
def test_a_packed_log_to_predict_is_read_as_it_comes(tmp_path, pack):
    path = tmp_path / "log"
    path.write_bytes(pack(b"".join(json.dumps(row).encode() + b"\r\n" for row in GOOD) + b"bad\n"))
    chunks = list(RowsIn([path], SCHEMA, chunk_bytes=40))
    assert pl.concat(chunk.frame for chunk in chunks)["text"].to_list() == ["ä\n", "7", None, None]
    assert [row.line for chunk in chunks for row in chunk.bad_rows.examples.get("json", [])] == [5]
    assert [chunk.has_label for chunk in chunks] == [True] * len(chunks)


def test_quotes_of_json_are_not_those_of_a_csv_file(tmp_path):
    row = json.dumps({"label": 1, "text": "a", "other": ["a", 'x"']}, separators=(",", ":")) + "\n"
    path, schema = tmp_path / "log", SCHEMA.model_copy(update={"separator": ","})
    path.write_text(row * 6_000)
    chunks = list(RowsIn([path], schema, chunk_bytes=20_000))
    assert sum(chunk.frame.height for chunk in chunks) == 6_000
    assert max(chunk.num_rows for chunk in chunks[1:]) < 1_000, "it is cut at the ends of lines"


def test_a_log_of_other_columns_is_refused(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n')
    (file,) = find_files([path])
    with pytest.raises(LogError, match=r"has no column label, count, the price, .* its columns are a"):
        file.format.layout(file, SCHEMA)
    with pytest.raises(LogError, match="has no column count, the price"):
        list(RowsIn([path], SCHEMA))


def test_a_schema_is_proposed_from_rows_all_over_the_log(tmp_path, monkeypatch):
    monkeypatch.setattr("torchdlrm.logs.lines._MIN_BLOCK_BYTES", 4_096)
    monkeypatch.setattr("torchdlrm.logs.lines._BYTES_A_ROW", 0)
    path = tmp_path / "log.jsonl"
    rows = [
        {
            "click": i % 3 == 0,
            "user_id": i % 50,
            "price": i / 7,
            "tags": [f"t{i % 5}", f"t{i % 3}"],
            "at": f"2024-01-{1 + i // 500:02d} 00:00:00",
            **({"late": "x" if i % 2 else "y"} if i > 8_000 else {}),
        }
        for i in range(10_000)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    proposal = propose_schema(path, 2_000)
    columns = {column["name"]: column for column in proposal.schema["columns"]}
    roles = {name: column["role"] for name, column in columns.items()}
    assert roles == {
        "click": "label",
        "user_id": "sparse",
        "price": "dense",
        "tags": "sparse",
        "at": "time",
        "late": "sparse",
    }
    assert columns["tags"]["value_separator"] == ","
    assert "separator" not in proposal.schema
    schema = FeatureSchema.model_validate(proposal.schema)
    assert any(isinstance(column, TimeColumn) for column in schema.columns)
    assert read(path, map(json.dumps, rows), schema=schema).bad_rows.total == 0
