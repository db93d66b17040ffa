"""A proposed schema reads the log it was proposed for, and its roles are those that a person would give."""

import contextlib
import gzip
import random
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from helpers.raw_logs import avazu_like, clicks, movielens_like, write
from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.features.schema_file import load_schema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.proposal.propose import propose_schema
from torchdlrm.logs.proposal.sample import take_sample
from torchdlrm.preprocessing.preprocess import preprocess


def roles_of(proposal):
    return {column["name"]: column["role"] for column in proposal.schema["columns"]}


def preprocessed(proposal, path, folder):
    """The dataset that preprocessing makes by the proposal as it is."""
    (folder / "proposed.toml").write_text(proposal.text)
    return preprocess([path], folder / "dataset", load_schema(str(folder / "proposed.toml")))


def test_a_log_like_avazus_has_codes_ids_that_are_left_out_and_a_split_by_time(tmp_path, seed):
    path = write(tmp_path / "avazu.csv", avazu_like(3_000, random.Random(seed)))
    proposal = propose_schema(path)
    roles = roles_of(proposal)
    assert {name for name, role in roles.items() if role != "sparse"} == {"id", "click", "hour"}
    assert (roles["id"], roles["click"], roles["hour"]) == ("ignore", "label", "time")
    assert proposal.schema["split"]["rule"] == "time"
    assert proposal.origin == "all 3,000 rows"
    kinds = {column["name"]: column.get("kind") for column in proposal.schema["columns"]}
    assert (kinds["C20"], kinds["device_type"], kinds["site_id"]) == ("int", "int", "hex")
    assert sum(split.rows for split in preprocessed(proposal, path, tmp_path).splits.values()) == 3_000


def test_a_log_like_movielens_has_a_threshold_codes_and_lists(tmp_path, seed):
    path = write(tmp_path / "ratings.csv", movielens_like(3_000, random.Random(seed)))
    proposal = propose_schema(path)
    columns = {column["name"]: column for column in proposal.schema["columns"]}
    roles = {name: column["role"] for name, column in columns.items()}
    assert roles == {
        "user_id": "sparse",
        "item": "sparse",
        "rating": "label",
        "timestamp": "time",
        "age": "dense",
        "gender": "sparse",
        "zip": "sparse",
        "genres": "sparse",
    }
    assert columns["rating"]["threshold"] == 4.0
    assert columns["genres"]["value_separator"] == "|"
    assert columns["zip"]["kind"] == "string", "007 and 7 are two places"
    dataset = preprocessed(proposal, path, tmp_path)
    assert sum(split.rows for split in dataset.splits.values()) == 3_000


@pytest.mark.parametrize(
    ("no", "yes", "keys"),
    [
        ("0", "1", {}),
        ("0.0", "1.0", {}),
        ("False", "True", {}),
        ("-1", "1", {"positive": "1", "negative": "-1"}),
        ("No", "Yes", {"positive": "Yes", "negative": "No"}),
    ],
)
def test_a_label_of_any_two_words_is_the_label(tmp_path, seed, no, yes, keys):
    rows = [(header, [[no, yes][row[0]], *row[1:]]) for header, row in clicks(300, random.Random(seed))]
    path = write(tmp_path / "log.csv", rows)
    proposal = propose_schema(path)
    label = proposal.schema["columns"][0]
    assert {key: label[key] for key in label if key not in ("role", "name")} == keys
    assert roles_of(proposal) == {"click": "label", "price": "dense", "city": "sparse"}
    dataset = preprocessed(proposal, path, tmp_path)
    count = sum(pl.read_parquet(file.path)["click"].sum() for split in dataset.splits.values() for file in split.files)
    assert count == sum(row[0] == yes for _, row in rows)


def test_the_last_column_of_two_texts_is_proposed_as_the_label_and_the_rarer_one_as_the_click(tmp_path, seed):
    """As in census-income, whose label is called `income` and says how much."""
    clicked = clicks(300, random.Random(seed))
    rows = [(["price", "city", "income"], [*row[1:3], " 50000+." if row[0] else "- 50000."]) for _, row in clicked]
    path = write(tmp_path / "log.csv", rows)
    proposal = propose_schema(path)
    label = proposal.schema["columns"][-1]
    assert label == {"role": "label", "name": "income", "positive": " 50000+.", "negative": "- 50000."}
    dataset = preprocessed(proposal, path, tmp_path)
    count = sum(pl.read_parquet(file.path)["income"].sum() for split in dataset.splits.values() for file in split.files)
    assert count == sum(row[-1] == " 50000+." for _, row in rows)


def test_columns_that_tell_the_label_are_left_out_with_a_warning(tmp_path, seed):
    rng = random.Random(seed)
    path = write(
        tmp_path / "log.csv",
        clicks(
            2_000,
            rng,
            copy=lambda label: label,
            nearly=lambda label: label if rng.random() < 0.99 else 1 - label,
            paid=lambda label: f"{rng.random():.4f}" if label else "",
            seconds=lambda label: 1_000 * label + rng.randrange(900),
            converted=lambda _: rng.randrange(2),
            clicks_last_week=lambda _: rng.randrange(50),
            honest=lambda label: rng.randrange(10) + label,
        ),
    )
    proposal = propose_schema(path)
    roles = roles_of(proposal)
    leaks = ["copy", "nearly", "paid", "seconds", "converted"]
    assert [name for name, role in roles.items() if role == "ignore"] == leaks
    for name in leaks:
        assert any(warning.startswith(f"{name} looks like the label and is left out") for warning in proposal.warnings)
    assert any(warning.startswith("clicks_last_week is named like a label") for warning in proposal.warnings)
    assert (roles["honest"], roles["clicks_last_week"]) == ("sparse", "dense")


def test_texts_for_missing_values_are_counted_and_proposed(tmp_path, seed):
    rng = random.Random(seed)
    prices = [f"{rng.random() * 9:.2f}" for _ in range(19)]
    path = write(
        tmp_path / "log.csv",
        clicks(400, rng, bid=["NULL", *prices], cost=["unknown", *prices], shop=["\\N", "p", "q"], land=["NA", "DE"]),
    )
    proposal = propose_schema(path)
    columns = {column["name"]: column for column in proposal.schema["columns"]}
    assert sorted(proposal.schema["null_values"]) == ["NULL", "\\N"], "NA may be a country"
    assert (columns["bid"]["role"], columns["bid"]["kind"]) == ("dense", "float")
    assert columns["cost"]["null_values"] == [*proposal.schema["null_values"], "unknown"]
    assert '20 missing ("NULL" 20)' in proposal.text
    dataset = preprocessed(proposal, path, tmp_path)
    vocabulary = pl.read_parquet(dataset.path / "vocabulary" / "shop.parquet")
    assert sorted(vocabulary["value"].drop_nulls().to_list()) == ["p", "q"]


def test_one_column_is_the_time_and_others_say_why_not(tmp_path, seed):
    rng = random.Random(seed)
    days = [f"2024-01-{day:02d}" for day in range(1, 29)]
    path = write(
        tmp_path / "log.csv",
        clicks(280, rng, birthday=days, updated_at=days[::-1], ts=range(1_700_000_000, 1_700_000_280), hour=range(24)),
    )
    proposal = propose_schema(path)
    roles = roles_of(proposal)
    assert [roles[name] for name in ("birthday", "updated_at", "ts", "hour")] == ["ignore", "ignore", "time", "sparse"]
    assert "a time; ts orders the rows" in proposal.text
    assert preprocessed(proposal, path, tmp_path).splits["test"].rows == 28
    write(path, clicks(280, rng, ts=[1_700_000_000, 1_700_000_001]))
    assert propose_schema(path).schema["split"]["rule"] == "order", "too many rows have the same time"


def test_ids_are_never_numbers(tmp_path, seed):
    rng = random.Random(seed)
    large = [2**53 + i for i in range(100)]
    path = write(
        tmp_path / "log.csv",
        clicks(
            400,
            rng,
            key64=[2**63 + i for i in range(50)],
            big=large,
            big_float=[f"{value}.0" for value in large],
            row_number=range(400),
            token=[f"t{i}" for i in range(400)],
            zipcode=[f"{i:05d}" for i in range(40)],
            delta=[-500, *range(60)],
            sentinel=[-1, *range(60)],
        ),
    )
    proposal = propose_schema(path)
    columns = {column["name"]: (column["role"], column.get("kind")) for column in proposal.schema["columns"]}
    assert columns["key64"] == ("sparse", "string")
    assert columns["big"] == ("sparse", "int")
    assert columns["big_float"] == ("sparse", "string")
    assert columns["row_number"][0] == columns["token"][0] == "ignore"
    assert columns["zipcode"] == ("sparse", "string")
    transforms = {column["name"]: column.get("transform") for column in proposal.schema["columns"]}
    assert (transforms["delta"], transforms["sentinel"], transforms["price"]) == ("standardize", "log_plus_3", "log1p")
    preprocessed(proposal, path, tmp_path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_sample_comes_from_the_whole_of_a_large_log(tmp_path, packed, monkeypatch):
    monkeypatch.setattr("torchdlrm.logs.lines._MIN_BLOCK_BYTES", 4_096)
    monkeypatch.setattr("torchdlrm.logs.lines._BYTES_A_ROW", 0)
    rows = [f'{i % 2},"note {i},\nof ""two"" lines",{i}\n' for i in range(40_000)]
    text = ("click,note,number\n" + "".join(rows)).encode()
    path = tmp_path / "log"
    path.write_bytes(gzip.compress(text) if packed else text)
    sample = take_sample(find_files([path])[0], 1_000)
    numbers = sample.frame["column_2"].cast(pl.Int64)
    assert sample.names == ["click", "note", "number"]
    assert 300 < len(numbers) <= 1_200
    assert (sample.frame["column_1"] == pl.select(pl.format('note {},\nof "two" lines', numbers)).to_series()).all()
    assert numbers.is_sorted()
    assert numbers[0] < 100
    assert numbers[-1] > 36_000
    assert numbers.diff().max() < 40_000 / 7
    assert not sample.is_whole
    assert "places of its" in sample.origin


def test_quotes_that_come_late_are_seen(tmp_path):
    rows = [f"{i % 2},note {i % 7},{i % 90}\n" for i in range(20_000)]
    (tmp_path / "log").write_text("click,note,number\n" + "".join(rows) + '1,"a, b",5\n' * 20)
    proposal = propose_schema(tmp_path / "log")
    assert proposal.schema["quote"] == '"'
    assert proposal.warnings == []
    assert proposal.origin.startswith("20,000 rows from")


def test_a_sample_of_parquet_comes_from_several_row_groups(tmp_path):
    table = pa.table({"click": [i % 2 for i in range(50_000)], "number": range(50_000)})
    for group_rows, words in ((1_000, "16 of its 50 row groups"), (50_000, "1 of its 1 row groups")):
        pq.write_table(table, tmp_path / "log", row_group_size=group_rows)
        sample = take_sample(find_files([tmp_path / "log"])[0], 1_000)
        numbers = sample.frame["column_1"].cast(pl.Int64)
        assert 400 < len(numbers) <= 1_000
        assert numbers[0] < 100
        assert numbers[-1] > 45_000
        assert sample.origin.endswith(words)


def test_parquet_keeps_numbers_with_nan_and_leaves_out_what_is_no_cell(tmp_path):
    table = pa.table(
        {
            "clicked": [i % 3 == 0 for i in range(400)],
            "price": [float("nan") if i % 7 == 0 else i % 50 + 0.5 for i in range(400)],
            "user_id": [None if i % 9 == 0 else float(i % 40) for i in range(400)],
            "tags": [[], ["a"], ["b", "c"], None] * 100,
            "spent_time": pa.array(range(400), pa.duration("s")),
            "blob": [b"\xff\xfe"] * 400,
            "at": pa.array([1_700_000_000 + i for i in range(400)], pa.timestamp("s")),
        }
    )
    pq.write_table(table, tmp_path / "log")
    proposal = propose_schema(tmp_path / "log")
    columns = {column["name"]: (column["role"], column.get("kind")) for column in proposal.schema["columns"]}
    assert columns == {
        "clicked": ("label", None),
        "price": ("dense", "float"),
        "user_id": ("sparse", "int"),
        "tags": ("sparse", "string"),
        "spent_time": ("ignore", None),
        "blob": ("ignore", None),
        "at": ("time", "datetime"),
    }
    assert "58 missing" in proposal.text
    preprocessed(proposal, tmp_path / "log", tmp_path)


@pytest.mark.parametrize("label", ["0", "1"])
def test_a_label_that_is_the_same_in_all_rows_is_told_of_the_preset_and_of_ones_own_log(label, small_log, tmp_path):
    same = [f"{label}\t{line.partition(chr(9))[2]}" for line in small_log.read_text().splitlines()]
    (tmp_path / "log.tsv").write_text("\n".join(same) + "\n")
    names = ["label", *(f"column_{i}" for i in range(1, 40))]
    (tmp_path / "own.tsv").write_text("\n".join(["\t".join(names), *same]) + "\n")
    for name in ("log.tsv", "own.tsv"):
        warnings = propose_schema(tmp_path / name).warnings
        assert f'every row read has the same label, "{label}": nothing can be learnt from it' in warnings
    assert not [warning for warning in propose_schema(small_log).warnings if "same label" in warning]


def test_a_log_in_criteos_layout_is_told_to_be_the_preset(small_log, tmp_path):
    proposal = propose_schema(small_log)
    assert proposal.preset == "criteo"
    assert "dlrm preprocess" in proposal.warnings[0]
    assert FeatureSchema.model_validate(proposal.schema) == criteo_schema()
    header = "\t".join(f"c{i}" for i in range(40)) + "\n"
    (tmp_path / "named.tsv").write_text(header + small_log.read_text())
    assert propose_schema(tmp_path / "named.tsv").preset is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("click,price,price\n0,1,2\n1,2,3\n", "columns 2 and 3 are both named 'price'"),
        ("# made by hand\nclick,price\n0,1\n1,2\n", "not on line 1, where a header must be"),
        ("click\n0\n1\n", "no separator cuts its lines into columns"),
        ("click,price\n", "found 2 columns and 0 rows"),
        ("click,price\r0,1\r1,2\r", "its lines end with a carriage return alone"),
    ],
)
def test_a_log_that_cannot_be_proposed_for_is_told_in_one_line(tmp_path, text, message):
    (tmp_path / "log").write_text(text)
    with pytest.raises(LogError) as error:
        propose_schema(tmp_path / "log")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_long_cells_quoted_line_ends_blank_lines_and_comments_are_read_or_told(tmp_path):
    rows = [f'{i % 2},"two\nlines",{i % 97}\n' for i in range(300)]
    (tmp_path / "log").write_text("click,note,price\n\n# a comment\n" + f"1,{'x' * 200_000},5\n" + "".join(rows))
    proposal = propose_schema(tmp_path / "log")
    assert roles_of(proposal) == {"click": "label", "note": "sparse", "price": "dense"}
    assert "lines that are no rows" in proposal.text
    assert "line 2: the line has the wrong number of columns (an empty line)" in proposal.text


def test_a_header_that_stands_between_the_rows_is_told(tmp_path, seed):
    path = write(tmp_path / "log", clicks(200, random.Random(seed)))
    path.write_text(path.read_text() * 3)
    proposal = propose_schema(path)
    assert roles_of(proposal) == {"click": "label", "price": "dense", "city": "sparse"}
    assert "null_values" not in proposal.schema
    assert proposal.warnings == ["lines that are no rows, at which preprocess stops: 2 are the header once more"]


NAME = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\0"), min_size=1)


@settings(max_examples=50, deadline=None)
@given(st.lists(NAME, min_size=3, max_size=3, unique=True).filter(lambda names: "click" not in names))
def test_columns_of_any_name_go_to_the_schema_and_back(tmp_path_factory, names):
    path = tmp_path_factory.mktemp("log") / "log"
    header = ",".join('"{}"'.format(name.replace('"', '""')) for name in ["click", *names])
    rows = "".join(f'{i % 2},"a{i % 7}","{i % 30}.5","{names[0][:1]}"\n'.replace('"""', '""""') for i in range(60))
    path.write_text(f"{header}\n{rows}", newline="")
    proposal = propose_schema(path)
    found = [column.get("header_name", column["name"]) for column in proposal.schema["columns"]]
    assert found == ["click", *names]


CELLS = [
    "0",
    "1",
    "1.5",
    "NULL",
    "nan",
    "-",
    "",
    "abc",
    "yes",
    "no",
    "2024-01-01",
    "1700000000",
    "9" * 20,
    "007",
    "a|b",
]
CELLS += ['"a,b"', '"a"\r', '"un', "1e400", "é", "\ufeff", "#x", "\0", "click", "id", "time"]


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from(CELLS), min_size=1, max_size=4), max_size=8),
    repeats=st.sampled_from([1, 20]),
    separator=st.sampled_from([",", "\t", "|"]),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_whatever_a_log_is_it_gets_a_proposal_or_a_reason_why_not(tmp_path_factory, rows, repeats, separator, line_end):
    path = tmp_path_factory.mktemp("log") / "log"
    path.write_text(line_end.join(map(separator.join, rows * repeats)), newline="")
    with contextlib.suppress(LogError):
        proposal = propose_schema(path)
        assert len(proposal.schema["columns"]) == len(proposal.reasons)
        try:
            FeatureSchema.model_validate(proposal.schema)
        except ValidationError:
            assert proposal.warnings


@pytest.mark.parametrize("written", ["%d/%m/%Y %H:%M", "%m-%d-%y", "%d.%m.%Y", "%Y/%m/%d", "%m/%d/%Y %I:%M:%S %p"])
def test_a_date_that_is_not_written_as_iso_8601_has_it_is_named_with_what_to_do(tmp_path, seed, written):
    start = datetime(2024, 11, 2, 7, 5, tzinfo=UTC)
    rows = [
        ([*header, "time"], [*row, (start + timedelta(minutes=90 * i)).strftime(written)])
        for i, (header, row) in enumerate(clicks(300, random.Random(seed)))
    ]
    proposal = propose_schema(write(tmp_path / "log.csv", rows))
    assert roles_of(proposal)["time"] == "ignore"
    assert proposal.reasons["time"].startswith("a time, but not as ISO 8601 writes it, as in 2024-12-31T23:55")
    (warning,) = [line for line in proposal.warnings if line.startswith("time ")]
    assert f"looks like a time, but is written as {start.strftime(written)}: write it as 2024-12-31T23:55" in warning


@pytest.mark.parametrize("cell", ["10.0.0.{}", "1.2.{}", "3/4/{}/x", "12-{}"])
def test_versions_and_addresses_are_no_dates(tmp_path, seed, cell):
    rows = [
        ([*header, "other"], [*row, cell.format(i % 40)])
        for i, (header, row) in enumerate(clicks(300, random.Random(seed)))
    ]
    proposal = propose_schema(write(tmp_path / "log.csv", rows))
    assert "ISO" not in proposal.reasons["other"]


@pytest.mark.parametrize(
    ("cell", "told"),
    [
        ("7.216,{:02} €", "numbers written as 7.216,00 €: write it as 1234.5"),
        ("$1,0{:02}.50", "numbers written as $1,000.50: write it as 1234.5"),
        ("{},5", "numbers written as 0,5: write it as 1234.5"),
        ("{}%", "numbers written as 0%: write it as 1234.5"),
        ("EUR -{}", "numbers written as EUR -0: write it as 1234.5"),
        ('["SQL", {}]', 'lists written as ["SQL", 0]: write 1|2 and give it a value_separator'),
        ("[0.5, -1.{}]", None),
        ("1.2.{}", None),
        ("10.0.0.{}", None),
        ("12 {} Main St", None),
    ],
)
def test_numbers_and_lists_as_people_write_them_are_named_with_what_to_do(tmp_path, seed, cell, told):
    rows = [
        ([*header, "other"], [*row, cell.format(i % 40)])
        for i, (header, row) in enumerate(clicks(300, random.Random(seed)))
    ]
    lines = [rows[0][0], *(row for _, row in rows)]
    path = tmp_path / "log.csv"
    path.write_text("".join(";".join(map(str, line)) + "\n" for line in lines))
    proposal = propose_schema(path)
    assert roles_of(proposal)["other"] == ("dense" if cell.startswith("[0") else "sparse")  # a vector
    lines = [line for line in proposal.warnings if line.startswith("other")]
    assert len(lines) == (told is not None)
    assert told is None or lines[0].startswith(f"other holds {told}")
    assert proposal.reasons["other"].endswith("read as text") == (told is not None)


@pytest.mark.parametrize("unit", [1, 1_000, 1_000_000])
def test_unix_times_are_the_time_by_any_name_where_rows_stand_in_their_order(tmp_path, seed, unit):
    rng = random.Random(seed)
    rows = [
        ([*header, "gesehen", "user_id"], [*row, (1_771_545_660 + 60 * i) * unit, 1_700_000_000 + 7 * i])
        for i, (header, row) in enumerate(clicks(300, rng))
    ]
    proposal = propose_schema(write(tmp_path / "log.csv", rows))
    assert roles_of(proposal)["gesehen"] == "time"
    assert proposal.schema["split"]["rule"] == "time"
    rng.shuffle(rows)
    proposal = propose_schema(write(tmp_path / "log.csv", rows))
    (line,) = [line for line in proposal.warnings if "Unix" in line]
    assert line.startswith("gesehen may hold Unix times, such as 17")


@pytest.mark.parametrize(("name", "unpack"), [("log.csv", "iconv {}"), ("log.csv.gz", "zcat {} | iconv")])
def test_a_log_in_latin_1_is_refused_with_what_converts_it(tmp_path, name, unpack):
    text = "click;Stadt;Größe\n" + "".join(f"{i % 2};München;{i}\n" for i in range(100))
    path = tmp_path / name
    path.write_bytes(text.encode("cp1252") if name.endswith("csv") else gzip.compress(text.encode("cp1252")))
    columns = [{"role": role, "name": column} for role, column in (("label", "click"), ("sparse", "Stadt"))]
    schema = FeatureSchema.model_validate({"name": "own", "separator": ";", "header": True, "columns": columns})
    for read in (propose_schema, lambda path: preprocess([path], tmp_path / "dataset", schema)):
        with pytest.raises(LogError, match="line 1: is not UTF-8") as error:
            read(path)
        assert unpack.format(path if name.endswith("gz") else "-f WINDOWS-1252") in str(error.value)
        assert f"> {path}.utf8" in str(error.value)
        assert "\\x" not in str(error.value)


def test_one_damaged_line_of_many_is_no_reason_to_refuse_a_log(tmp_path):
    rows = [f"{i % 2},a{i % 7},{i % 97}".encode() for i in range(300)]
    (tmp_path / "log").write_bytes(b"click,note,price\n" + b"\n".join([*rows, b"1,\xff,3", *rows]) + b"\n")
    (line,) = propose_schema(tmp_path / "log").warnings
    assert "line 302, column note: the cell is not UTF-8: '\ufffd'" in line
