"""How a text log is written is told from its first lines, and before any work of one that its schema does not fit."""

import gzip
from pathlib import Path

import pytest

from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.formats.text import TEXT
from torchdlrm.logs.sniff import is_quoted, sniff
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.storage.reading import FileIdentity


@pytest.mark.parametrize(
    ("text", "separator", "quoted", "num_columns"),
    [
        ("a,b,c\n1,2,3\n", ",", False, 3),
        ("a\tb\n1,2\t3\n1,2\t5\n", "\t", False, 2),
        ('a;b;c\n1;2,5;"x;y"\n1;2,5;3\n', ";", True, 3),
        ("1,2.5,a|b|c|d\n" * 5, ",", False, 3),
        ("a|b|c\n1|Paris, F|2\n1|Paris, F|2\n", "|", False, 3),
        ("# a comment\n\na,b,c\n1,2,3\n1,2,3\n", ",", False, 3),
        ('a,"x\ny, z",c\n' * 5, ",", True, 3),
        ('a\t5" screen\tc\n' * 5, "\t", False, 3),
        ("a\x01b,\n" * 5, "\x01", False, 2),
    ],
)
def test_the_separator_is_the_mark_that_cuts_the_lines_alike(text, separator, quoted, num_columns):
    cut = sniff(text.encode(), LogFile(Path("log"), FileIdentity(len(text), 0), None, TEXT))
    assert (cut.mark, cut.num_columns) == (separator, num_columns)
    assert is_quoted([text.encode()], cut.mark) == quoted


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_log_that_is_cut_otherwise_than_its_schema_says_is_refused_before_any_work(tmp_path, pack):
    path = tmp_path / "log"
    path.write_bytes(pack(b"1,2,3\n4,5,6\n" * 10))
    with pytest.raises(LogError) as error:
        preprocess([path], tmp_path / "dataset", criteo_schema(), PreprocessOptions(max_bad_rows=19))
    expected = (
        "looks comma-separated (3 columns), and the schema 'criteo' is tab-separated (40 columns); try `dlrm schema"
    )
    assert expected in str(error.value)
    assert list(tmp_path.iterdir()) == [path]
    path.write_bytes(pack(b"1,2,3\r4,5,6\r"))
    with pytest.raises(LogError, match="its lines end with a carriage return alone"):
        preprocess([path], tmp_path / "dataset", criteo_schema())
    path.write_bytes(pack(b"1,2,3\n4,5,6\n" * 10))
    columns = [{"role": "label", "name": "a"}, {"role": "dense", "name": "b"}, {"role": "sparse", "name": "c"}]
    with_header = FeatureSchema.model_validate({"name": "small", "header": True, "columns": columns})
    with pytest.raises(LogError, match="looks comma-separated"):
        preprocess([path], tmp_path / "dataset", with_header)


@pytest.mark.parametrize("cell", ["x" * 100_000, '"' + "x\n" * 50_000 + '"'])
def test_a_first_row_that_is_longer_than_what_is_looked_at_is_no_reason_to_refuse(tmp_path, cell):
    path = tmp_path / "log"
    path.write_text(f"1,2,{cell}\n" + "0,3,a\n" * 20)
    columns = [{"role": "label", "name": "a"}, {"role": "dense", "name": "b"}, {"role": "sparse", "name": "c"}]
    schema = {"name": "small", "separator": ",", "quote": '"', "columns": columns}
    dataset = preprocess([path], tmp_path / "dataset", FeatureSchema.model_validate(schema))
    assert sum(split.rows for split in dataset.splits.values()) == 21


def test_empty_lines_and_comments_are_told_as_such(tmp_path):
    path = tmp_path / "log"
    row = "\t".join(["1", *["3"] * 13, *["0000000a"] * 26]) + "\n"
    path.write_text(row * 30 + "\n" + row + "# the end\n")
    with pytest.raises(LogError) as error:
        preprocess([path], tmp_path / "dataset", criteo_schema())
    assert "log, line 31: the line has the wrong number of columns (an empty line)" in str(error.value)
    assert "log, line 33: the line has the wrong number of columns (1 columns, not 40: a comment?)" in str(error.value)
