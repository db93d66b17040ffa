"""A dataset's vocabularies used again, and extended."""

import random

import polars as pl
import pytest

from helpers.days import SCHEMA
from torchdlrm.data.summary import summarize
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import with_split
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

OPTIONS = PreprocessOptions(min_count=2)


def lines(seed, first, last, price):
    rng = random.Random(seed)
    return [
        f"{rng.choice('01')}\t{rng.gauss(price, 1):.4f}\t{rng.randrange(first, last):x}\t{rng.choice(['', 'a', 'b'])}\n"
        for _ in range(1400)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("days")
    (folder / "monday").write_text("".join(lines(1, 0, 200, 5)))
    (folder / "tuesday").write_text("".join(lines(2, 100, 300, 50)))
    return folder


@pytest.fixture(scope="module")
def monday(folder):
    return preprocess([folder / "monday"], folder / "dataset", SCHEMA, OPTIONS)


def read(dataset, split):
    return pl.concat(pl.read_parquet(file.path) for file in dataset.splits[split].files)


def ids(dataset, name="item"):
    table = dataset.vocabulary(name).table
    return dict(zip(table["value"], table["id"], strict=True))


def test_new_days_are_encoded_with_the_ids_and_statistics_of_another_dataset(folder, monday):
    options = PreprocessOptions(min_count=2, vocabulary=monday.path)
    tuesday = preprocess(
        [folder / "tuesday"], folder / "tuesday-encoded", with_split(SCHEMA, "order", 0.0, 0.5), options
    )
    assert tuesday.manifest.sparse == monday.manifest.sparse
    assert tuesday.manifest.dense == monday.manifest.dense
    assert ids(tuesday) == ids(monday)
    raw = [line.rstrip("\n").split("\t") for line in (folder / "tuesday").read_text().splitlines()][700:]
    found = read(tuesday, "test")
    assert found["item"].to_list() == [ids(monday).get(int(cells[2], 16), 0) for cells in raw]
    fitted = monday.manifest.dense["price"]
    expected = [(float(cells[1]) + fitted.shift) / fitted.deviation for cells in raw]
    assert found["price"].to_list() == pytest.approx(expected, rel=1e-6)


def test_inspect_tells_unknown_values_and_drift(folder, monday):
    (folder / "both").write_text((folder / "monday").read_text() + "".join(lines(3, 150, 350, 50)[:200]))
    summary = summarize(preprocess([folder / "both"], folder / "drifted", with_split(SCHEMA, "order", 0.1, 0.125)), 3)
    unknown = summary.sparse["item"].unknown_share
    assert unknown["test"] > 0.5
    assert unknown["val"] < 0.1
    for column in (summary.sparse["item"], summary.dense["price"]):
        assert column.drift["train"] == 0
        assert column.drift["test"] > 0.3
        assert column.drift["val"] < 0.15
    assert summary.sparse["city"].drift["test"] < 0.01


def test_a_dataset_of_other_columns_is_refused_with_all_differences(folder, monday):
    other = FeatureSchema(
        name="other",
        columns=(
            LabelColumn(name="label"),
            DenseColumn(name="price", kind="float", transform="log1p"),
            SparseColumn(name="item", kind="int"),
            SparseColumn(name="town", kind="string"),
        ),
    )
    with pytest.raises(DatasetError) as caught:
        preprocess([folder / "tuesday"], folder / "no", other, PreprocessOptions(vocabulary=monday.path))
    for part in ("no sparse column town", "column item: there kind hex", "dense column price: there standardize"):
        assert part in str(caught.value)
    with pytest.raises(ConfigError, match="`extend_vocabulary`: needs `vocabulary`"):
        PreprocessOptions(extend_vocabulary=True)
