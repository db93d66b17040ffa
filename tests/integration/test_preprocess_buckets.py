"""Datasets with numbers as categories equal what plain Python makes of the same rows."""

import json
import math
import random
from bisect import bisect_right
from collections import Counter

import polars as pl
import pytest

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.features.encode import encode
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

COLUMNS = [
    {"role": "label", "name": "label"},
    {"role": "dense", "name": "count", "kind": "int", "buckets": "log_square"},
    {"role": "dense", "name": "price", "kind": "float", "buckets": {"quantiles": 6}, "min_count": 1},
    {"role": "sparse", "name": "size", "kind": "float", "buckets": [0.5, 2, 30]},
    {"role": "sparse", "name": "scores", "kind": "int", "buckets": 4, "value_separator": "|"},
]
SPLIT = {"rule": "order", "val": 0.0, "test": 0.25}
SCHEMA = FeatureSchema.model_validate({"name": "numbers", "split": SPLIT, "columns": COLUMNS})
MIN_COUNT = 5


def rows_of(num_rows, seed, scale=1.0):
    draw = random.Random(seed)
    return [
        {
            "count": draw.choice([None, -2, 0, 1, 2, 3, int(draw.paretovariate(0.4))]),
            "price": draw.choice([None, -0.0, 0.0, draw.gauss(0, 9) * scale, draw.gauss(0, 9) * scale]),
            "size": draw.choice([None, 0.5, 0.25, 2.0, 1e9, draw.expovariate(0.1)]),
            "scores": [draw.randrange(60) for _ in range(draw.randrange(4))],
        }
        for _ in range(num_rows)
    ]


def write(path, rows):
    def text(cell):
        return "" if cell is None else "|".join(map(str, cell)) if isinstance(cell, list) else repr(cell)

    draw = random.Random(1)
    path.write_text("".join("\t".join([draw.choice("01"), *map(text, row.values())]) + "\n" for row in rows))
    return path


def log_square(x):
    return math.floor(math.log(x) ** 2) if x > 2 else int(x)


def quantiles_of(numbers, how_many):
    ascending = sorted(numbers)
    found = {ascending[k * len(ascending) // how_many] for k in range(1, how_many)}
    return sorted(found - {ascending[0]})


def categories_of(rows, num_train):
    """The lists of categories of each feature and row; a missing number is None, but there is none in a list."""
    train = rows[:num_train]
    prices = quantiles_of([row["price"] for row in train if row["price"] is not None], 6)
    scores = quantiles_of([score for row in train for score in row["scores"]], 4)

    def one(number, bucket):
        return [None if number is None else bucket(number)]

    return {
        "size": [one(row["size"], lambda x: bisect_right([0.5, 2, 30], x)) for row in rows],
        "scores": [[bisect_right(scores, score) for score in row["scores"]] for row in rows],
        "count_bucket": [one(row["count"], log_square) for row in rows],
        "price_bucket": [one(row["price"], lambda x: bisect_right(prices, x)) for row in rows],
    }


def ids_of(categories, num_train, min_count):
    counts = Counter(value for values in categories[:num_train] for value in values)
    kept = [value for value, count in counts.items() if count >= min_count]
    kept.sort(key=lambda value: (-counts[value], value is not None, value or 0))
    return {value: i for i, value in enumerate(kept, 1)}


def encoded(dataset, split, name):
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits[split].files])
    column = frame[name]
    return column.to_list() if column.dtype == pl.List else [[value] for value in column.to_list()]


def test_ids_are_those_of_plain_python_and_another_log_keeps_them(dlrm, tmp_path):
    rows, num_train = rows_of(2_000, seed=3), 1_500
    log = write(tmp_path / "log.tsv", rows)
    dataset = preprocess([log], tmp_path / "dataset", SCHEMA, PreprocessOptions(min_count=MIN_COUNT))
    assert json.loads((tmp_path / "dataset" / "dataset.json").read_text())["format_version"] == 2
    categories = categories_of(rows, num_train)
    assert list(dataset.num_embeddings) == list(categories)
    ids = {
        name: ids_of(values, num_train, 1 if name == "price_bucket" else MIN_COUNT)
        for name, values in categories.items()
    }
    assert min(map(len, ids.values())) > 3
    for name, values in categories.items():
        expected = [[ids[name].get(value, 0) for value in one] for one in values]
        assert encoded(dataset, "test", name) == expected[num_train:]
        assert sorted(encoded(dataset, "train", name)) == sorted(expected[:num_train])
        vocabulary = dataset.vocabulary(name).table
        assert dict(zip(vocabulary["value"], vocabulary["id"], strict=True)) == ids[name]

    # As rows to predict are encoded.
    types = {column.name: column.dtype for column in SCHEMA.features}
    frame = pl.DataFrame(rows[num_train:], schema=types)
    vocabularies = {name: dataset.vocabulary(name) for name in categories}
    found = encode(frame, dataset.schema, dataset.manifest.dense, vocabularies)
    for name in categories:
        assert found[name].to_list() == pl.read_parquet(dataset.splits["test"].files[0].path)[name].to_list()

    prices = quantiles_of([row["price"] for row in rows[:num_train] if row["price"] is not None], 6)
    told = json.loads(dlrm("inspect", dataset.path, "--json").stdout)["buckets"]
    assert (told["count_bucket"], told["size"]) == ("log_square", [0.5, 2, 30])
    assert told["price_bucket"] == {"quantiles": 6, "boundaries": prices}
    assert "buckets by 6 quantiles: price_bucket" in dlrm("inspect", dataset.path).stderr

    # Of another log, whose quantiles would be others, numbers fall in the buckets of the first.
    others = rows_of(800, seed=4, scale=50.0)
    options = PreprocessOptions(vocabulary=dataset.path)
    later = preprocess([write(tmp_path / "later.tsv", others)], tmp_path / "later", SCHEMA, options)
    assert later.schema.columns == dataset.schema.columns
    together = categories_of([*rows[:num_train], *others], num_train)
    for name, values in together.items():
        expected = [[ids[name].get(value, 0) for value in one] for one in values[num_train:]]
        assert encoded(later, "test", name) == expected[600:]
    # And where new values get ids, buckets that were too rare are counted.
    options = PreprocessOptions(vocabulary=dataset.path, extend_vocabulary=True, min_count=1)
    extended = preprocess([tmp_path / "later.tsv"], tmp_path / "extended", SCHEMA, options)
    found = extended.vocabulary("count_bucket").table
    assert dict(zip(found["value"], found["id"], strict=True)).items() > ids["count_bucket"].items()

    columns = [column | ({"buckets": [1.0]} if column["name"] == "price" else {}) for column in COLUMNS]
    other = FeatureSchema.model_validate({"name": "other", "split": SPLIT, "columns": columns})
    with pytest.raises(DatasetError, match=r"column price_bucket: there .* 6 quantiles; here .* \[1.0\]"):
        preprocess([tmp_path / "later.tsv"], tmp_path / "no", other, PreprocessOptions(vocabulary=dataset.path))


def test_a_dataset_without_buckets_is_written_as_older_versions_read_it(small_dataset):
    assert Dataset.open(small_dataset.path).manifest.format_version == 1
