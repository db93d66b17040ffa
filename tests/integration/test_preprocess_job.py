"""The preprocessing job: splits, shuffle, same bytes, and what happens when something is wrong."""

import gzip
import os
import random
import shutil
import time

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest

from helpers.raw_logs import checksums
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, DatasetError, LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.progress import SilentProgress

# `position` tells where in the log a row stood.
SCHEMA = FeatureSchema(
    name="small",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="position", kind="int", transform="none"),
        DenseColumn(name="price", kind="float", transform="standardize"),
        DenseColumn(name="clicks", kind="int", transform="log1p"),
        SparseColumn(name="city", kind="string"),
        SparseColumn(name="shop", kind="int"),
        SparseColumn(name="item", kind="hex"),
    ),
)
SPLITS = ("train", "val", "test")


def log_lines(num_rows: int, first: int = 0) -> list[str]:
    rng = random.Random(first)
    cities = ["Köln", "Zürich", "Oslo", "", "東京", 'a "quoted" name']
    shops = ["", -1, 2**40, *range(300)]
    return [
        f"{rng.choice('0001')}\t{first + i}\t{rng.choice(['', round(rng.gauss(1e6, 3), 2)])}"
        f"\t{rng.choice(['', -5, 0, 7])}\t{rng.choice(cities)}\t{rng.choice(shops)}\t{rng.randrange(500):x}\n"
        for i in range(num_rows)
    ]


def write_log(path, lines):
    data = "".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read_split(dataset: Dataset, name: str) -> pl.DataFrame:
    return pl.concat(pl.read_parquet(file.path) for file in dataset.splits[name].files)


def positions(dataset: Dataset, name: str) -> list[int]:
    return read_split(dataset, name)["position"].cast(pl.Int64).to_list()


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    return write_log(tmp_path_factory.mktemp("log") / "log.tsv", log_lines(7005))


@pytest.fixture(scope="module")
def dataset(log, tmp_path_factory):
    return preprocess([log], tmp_path_factory.mktemp("job") / "dataset", SCHEMA, PreprocessOptions(part_rows=1000))


def test_every_row_is_in_exactly_one_split_and_the_last_seventh_is_held_out(dataset):
    assert sorted(positions(dataset, "train")) == list(range(6005))
    assert positions(dataset, "val") == list(range(6005, 6505))
    assert positions(dataset, "test") == list(range(6505, 7005))
    assert {name: split.rows for name, split in dataset.splits.items()} == {"train": 6005, "val": 500, "test": 500}
    assert "last seventh" in dataset.manifest.split_rule


def test_training_rows_are_shuffled_across_the_whole_split(dataset):
    order = np.array(positions(dataset, "train"))
    assert abs(np.corrcoef(order, np.arange(len(order)))[0, 1]) < 0.05
    parts = dataset.splits["train"].files
    assert len(parts) == 7
    for part in parts:
        found = pl.read_parquet(part.path)["position"]
        assert part.rows == len(found) == pytest.approx(6005 / 7, rel=0.15)
        # Each part is a sample of the whole split, and no part is in order.
        assert found.mean() == pytest.approx(3002, rel=0.1)
        assert abs(np.corrcoef(found, np.arange(len(found)))[0, 1]) < 0.15


def test_another_seed_orders_the_training_rows_otherwise_and_changes_nothing_else(log, dataset, tmp_path):
    other = preprocess([log], tmp_path / "dataset", SCHEMA, PreprocessOptions(part_rows=1000, seed=1))
    assert positions(other, "train") != positions(dataset, "train")
    assert sorted(positions(other, "train")) == sorted(positions(dataset, "train"))
    for name in ("val", "test"):
        assert [file.sha256 for file in other.splits[name].files] == [
            file.sha256 for file in dataset.splits[name].files
        ]


def test_the_last_day_is_held_out_where_files_are_named_by_day(tmp_path):
    lines = log_lines(301)
    files = [
        write_log(tmp_path / "day_10.gz", lines[200:]),
        write_log(tmp_path / "day_2", lines[120:200]),
        write_log(tmp_path / "day_0", lines[:120]),
    ]
    dataset = preprocess(files, tmp_path / "dataset", SCHEMA)
    assert sorted(positions(dataset, "train")) == list(range(200))
    assert positions(dataset, "val") == list(range(200, 251))
    assert positions(dataset, "test") == list(range(251, 301))
    assert "day_10" in dataset.manifest.split_rule


def test_vocabularies_and_statistics_are_fitted_on_training_rows_alone(tmp_path):
    lines = [f"0\t{i}\t{10 if i % 2 else 20}\t0\tknown\t1\ta\n" for i in range(12)]
    lines += [f"1\t{12 + i}\t1000000\t0\tnew\t1\ta\n" for i in range(2)]
    dataset = preprocess([write_log(tmp_path / "log", lines)], tmp_path / "dataset", SCHEMA)
    assert dataset.vocabulary("city").table.rows() == [("known", 12, 1)]
    for name in ("val", "test"):
        assert read_split(dataset, name)["city"].to_list() == [0]
        assert read_split(dataset, name)["price"].to_list() == [(1000000 - 15) / 5]
    assert sorted(read_split(dataset, "train")["price"].to_list()) == [-1.0] * 6 + [1.0] * 6


def test_parts_are_parquet_files_with_equal_row_groups_and_page_checksums(log, tmp_path):
    big = preprocess([write_log(tmp_path / "log", log_lines(50_000))], tmp_path / "dataset", SCHEMA)
    (part,) = big.splits["train"].files
    file = pq.ParquetFile(part.path, page_checksum_verification=True)
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    assert set(sizes[:-1]) == {big.manifest.row_group_rows}
    assert sum(sizes) == part.rows == big.splits["train"].rows
    types = {field.name: (str(field.type), field.nullable) for field in file.schema_arrow}
    assert types == {
        "label": ("int8", False),
        **dict.fromkeys(big.dense_names, ("float", False)),
        **dict.fromkeys(big.sparse_names, ("int32", False)),
    }
    assert {file.metadata.row_group(0).column(i).compression for i in range(7)} == {"ZSTD"}
    data = bytearray(part.path.read_bytes())
    data[len(data) // 2] ^= 1
    part.path.write_bytes(data)
    with pytest.raises(OSError, match="CRC checksum"):
        pq.read_table(part.path, page_checksum_verification=True)


BAD_LINES = {
    "columns": "1\t2\t3\t4\t5\t6\n",
    "label": "2\t0\t\t\t\t\t\n",
    "int": "0\t1.5\t\t\t\t\t\n",
    "float": "0\t0\tinf\t\t\t\t\n",
    "hex": "0\t0\t\t\t\t\t123456789\n",
    "nul_byte": "0\t0\t\t\ta\0\t\t\n",
}


def test_bad_rows_that_are_allowed_are_skipped_counted_and_recorded(tmp_path):
    lines = log_lines(300)
    for i, line in enumerate(BAD_LINES.values()):
        lines.insert(10 + 40 * i, line)
    lines.insert(200, "\n")
    log = write_log(tmp_path / "my.tsv", lines)
    with pytest.raises(LogError, match=r"6 allowed"):
        preprocess([log], tmp_path / "dataset", SCHEMA, PreprocessOptions(max_bad_rows=6), chunk_bytes=1000)
    dataset = preprocess([log], tmp_path / "dataset", SCHEMA, PreprocessOptions(max_bad_rows=7), chunk_bytes=1000)
    assert sorted(positions(dataset, "train") + positions(dataset, "val") + positions(dataset, "test")) == list(
        range(300)
    )
    bad_rows = dataset.manifest.bad_rows
    assert bad_rows.total == 7
    assert bad_rows.counts == {"columns": 2, **{reason: 1 for reason in BAD_LINES if reason != "columns"}}
    found = sorted(row.line for rows in bad_rows.examples.values() for row in rows)
    assert found == sorted([11, 51, 91, 131, 171, 201, 212])
    assert {row.file for rows in bad_rows.examples.values() for row in rows} == {"my.tsv"}


def test_an_existing_output_folder_is_left_alone(log, tmp_path):
    (tmp_path / "dataset").mkdir()
    for overwrite in (False, True):
        with pytest.raises(DatasetError, match="exists and is no dataset; choose another `out`, or remove it first"):
            preprocess([log], tmp_path / "dataset", SCHEMA, overwrite=overwrite)
    assert list((tmp_path / "dataset").iterdir()) == []


@pytest.fixture
def complete(log, tmp_path):
    """A dataset with a log of its own, whose bucket boundaries were fitted, and what makes it."""
    own = tmp_path / "log.tsv"
    shutil.copyfile(log, own)
    columns = [*SCHEMA.columns]
    columns[2] = DenseColumn(name="price", kind="float", transform="standardize", buckets=4)
    inputs = {"logs": own, "schema": FeatureSchema(name="small", columns=tuple(columns))}
    return preprocess(out=tmp_path / "dataset", **inputs), inputs


def test_of_a_complete_dataset_nothing_is_left_to_do(complete):
    dataset, inputs = complete
    before = dataset.path.stat().st_ino
    for options in (None, PreprocessOptions(max_bad_rows=5)):
        assert preprocess(out=dataset.path, options=options, **inputs) == dataset
    assert dataset.path.stat().st_ino == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": PreprocessOptions(min_count=4)}, "min_count: was 3, is 4"),
        ({"options": PreprocessOptions(seed=1)}, "seed: was 0, is 1"),
        ({"options": PreprocessOptions(period=1)}, "period: was None, is 1"),
        ({"schema": SCHEMA}, "schema: was "),
        ({"logs": "another.tsv"}, r"log: was \[\('log.tsv', "),
        ({"logs": "touched"}, "log: .*log.tsv was written to since"),
        ({"vocabulary": False}, "vocabulary: was None, is '"),
        ({"vocabulary": True}, "extend_vocabulary: was False, is True"),
    ],
)
def test_a_dataset_of_something_else_is_refused_and_overwritten_where_that_is_asked(complete, tmp_path, change, words):
    dataset, inputs = complete
    change = dict(change)
    if change.get("logs") == "touched":
        os.utime(inputs["logs"], (time.time() + 5,) * 2)
        change = {}
    elif "logs" in change:
        change["logs"] = shutil.copyfile(inputs["logs"], tmp_path / change["logs"])
    if "vocabulary" in change:
        known = preprocess(out=tmp_path / "known", **inputs)
        extended = change.pop("vocabulary")
        change["options"] = PreprocessOptions(vocabulary=known.path, extend_vocabulary=extended)
    given = {"out": dataset.path, **inputs, **change}
    with pytest.raises(DatasetError, match=words) as error:
        preprocess(**given)
    assert "`overwrite`" in str(error.value)
    assert Dataset.open(dataset.path) == dataset
    new = preprocess(overwrite=True, **given)
    assert checksums(new.path) == checksums(preprocess(**{**given, "out": tmp_path / "fresh"}).path)
    assert {path.name for path in tmp_path.iterdir()} <= {"log.tsv", "another.tsv", "dataset", "known", "fresh"}
    if "options" in change and change["options"].vocabulary is not None:  # and it is known whose vocabulary it has
        assert preprocess(**given) == new
        with pytest.raises(DatasetError, match="vocabulary: was '"):
            preprocess(out=dataset.path, **inputs)


def test_a_dataset_is_kept_until_the_one_that_replaces_it_is_complete(complete):
    dataset, inputs = complete
    before = checksums(dataset.path)

    class Interrupted(SilentProgress):
        def start_phase(self, name, *_):
            if name == "write":
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        preprocess(out=dataset.path, **inputs, overwrite=True, progress=Interrupted())
    assert (checksums(dataset.path), Dataset.open(dataset.path)) == (before, dataset)


def test_numbers_out_of_range_are_all_reported_by_their_name():
    with pytest.raises(ConfigError) as caught:
        PreprocessOptions(min_count=0, max_embeddings=1, seed=-1, max_bad_rows=-1)
    for option in ("`min_count`", "`max_embeddings`", "`seed`", "`max_bad_rows`"):
        assert option in str(caught.value)


def test_progress_reaches_every_phases_total(log, tmp_path):
    class Recorder(SilentProgress):
        def __init__(self):
            self.phases = []

        def start_phase(self, name, total, *_):
            self.phases.append([name, total, 0])

        def advance(self, amount, **_):
            self.phases[-1][2] += amount

    recorder = Recorder()
    preprocess(
        [log], tmp_path / "dataset", SCHEMA, PreprocessOptions(part_rows=1000), progress=recorder, chunk_bytes=10_000
    )
    assert [name for name, _, _ in recorder.phases] == ["read", "count", "encode", "write"]
    assert all(total == done for _, total, done in recorder.phases)
