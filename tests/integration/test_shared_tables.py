"""Columns that share a vocabulary and a table: an item that is shown, and those that were seen before, newest last."""

import json
import random

import duckdb
import polars as pl
import pytest

from helpers.raw_logs import checksums
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.data.judgements import judge_dataset
from torchdlrm.data.page import dataset_page
from torchdlrm.data.summary import summarize
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, SplitRule
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

SCHEMA = FeatureSchema(
    name="shop",
    header=True,
    split=SplitRule(rule="order", val=0.0, test=0.2),
    columns=(
        LabelColumn(name="click"),
        DenseColumn(name="price", kind="float", transform="none"),
        SparseColumn(
            name="seen", kind="int", value_separator="|", weight_separator=":", max_values=3, keep="last", table="item"
        ),
        SparseColumn(name="item", kind="int", min_count=3),
        SparseColumn(name="shop", hash=9),
        SparseColumn(name="shops", value_separator="|", table="shop"),
        SparseColumn(name="page", kind="id"),
        SparseColumn(name="next_page", kind="id", table="page"),
    ),
)
NUM_ROWS = 1_500


def rows_of(seed, first=0):
    """Rows of items from `first` on; what was seen before is weighted, and may be the same item again."""
    rng = random.Random(seed)
    for _ in range(NUM_ROWS):
        seen = [(rng.randrange(first, first + 90), rng.choice((1.0, 0.5))) for _ in range(rng.randrange(7))]
        item, shop = rng.choice([None, first + min(99, int(rng.expovariate(0.04)))]), f"s{rng.randrange(30)}"
        yield {
            "click": int(rng.random() < (0.7 if (item or 0) % 3 == 0 else 0.2)),
            "price": round(rng.gauss(5, 1), 3),
            "seen": [{"value": value, "weight": weight} for value, weight in seen],
            "item": item,
            "shop": shop,
            "shops": [shop, f"s{rng.randrange(30)}"][: rng.randrange(3)],
            "page": rng.randrange(40),
            "next_page": rng.randrange(70),
        }


def as_text(row):
    cells = {
        name: "|".join(f"{each['value']}:{each['weight']}" if isinstance(each, dict) else each for each in cell)
        if isinstance(cell, list)
        else ""
        if cell is None
        else str(cell)
        for name, cell in row.items()
    }
    return "\t".join(cells.values())


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The same rows as text, JSON Lines and Parquet."""
    folder, rows = tmp_path_factory.mktemp("logs"), list(rows_of(1))
    (folder / "log.tsv").write_text("\n".join(["\t".join(rows[0]), *map(as_text, rows)]) + "\n")
    pl.DataFrame(rows).write_parquet(folder / "log.parquet", row_group_size=400)
    for row in rows:
        row["seen"] = [f"{each['value']}:{each['weight']}" for each in row["seen"]]  # an object has no value twice
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def dataset(logs):
    return preprocess([logs / "log.tsv"], logs / "dataset", SCHEMA, PreprocessOptions(part_rows=500))


def test_values_are_counted_over_all_columns_of_a_table_and_have_its_ids_in_each(dataset, logs):
    sql = duckdb.connect()
    sql.execute(f"""
        create table log as select *, row_number() over () as position, [v.value for v in seen[-3:]] as kept,
            [v.weight for v in seen[-3:]] as weights
        from '{logs}/log.parquet';
        create table vocabulary as
            select value, count(*) as count, row_number() over (order by count(*) desc, value nulls first) as id
            from (select item as value from log where position <= {NUM_ROWS * 4 // 5} union all
                  select unnest(kept) from log where position <= {NUM_ROWS * 4 // 5})
            group by value having count(*) >= 3;
    """)
    expected = sql.execute("select value, count, id from vocabulary order by id").fetchall()
    assert dataset.vocabulary("item").table.rows() == expected
    assert dataset.vocabulary("seen").table.equals(dataset.vocabulary("item").table)
    assert [path.name for path in (dataset.path / "vocabulary").iterdir()] == ["item.parquet"]
    alone = sql.execute(f"select count(distinct item) from log where position <= {NUM_ROWS * 4 // 5}").fetchone()[0]
    assert len(expected) > alone, "some are there by what the other column has"
    ids = dict(sql.execute("select coalesce(value, -1), id from vocabulary").fetchall())
    found = pl.concat(rows_of_split(dataset, "test")).rows(named=True)
    columns = "coalesce(item, -1), kept, weights, page, next_page, len(shops)"
    rows = sql.execute(f"select {columns} from log where position > {NUM_ROWS * 4 // 5} order by position")
    for row, (item, kept, weights, page, next_page, num_shops) in zip(found, rows.fetchall(), strict=True):
        assert row["item"] == ids.get(item, 0)
        assert (row["seen"], row["seen_weights"]) == ([ids.get(value, 0) for value in kept], weights)
        assert (row["page"], row["next_page"]) == (page, next_page)
        assert row["shops"][:1] == ([row["shop"]] if num_shops else [])


def test_text_json_and_parquet_give_the_same_bytes(dataset, logs, tmp_path):
    expected = {name: sum_ for name, sum_ in checksums(dataset.path).items() if name != "dataset.json"}
    for name in ("log.jsonl", "log.parquet"):
        other = preprocess([logs / name], tmp_path / name, SCHEMA, PreprocessOptions(part_rows=500))
        assert {name: sum_ for name, sum_ in checksums(other.path).items() if name != "dataset.json"} == expected


def test_the_manifest_says_a_table_once_and_older_programs_are_told(dataset):
    manifest = json.loads((dataset.path / "dataset.json").read_text())
    assert manifest["format_version"] == 7
    assert manifest["sparse"]["seen"] == manifest["sparse"]["item"]
    largest = max(frame[name].max() for frame in rows_of_split(dataset, "train") for name in ("page", "next_page"))
    sizes = dataset.table_rows
    assert sizes == {"item": dataset.num_embeddings["seen"], "shop": 9, "page": largest + 1}
    assert len({file.path for file in dataset.manifest.files}) == len(dataset.manifest.files)
    dataset.verify()
    summary = summarize(dataset, 2)
    assert (summary.sparse["seen"].table_size, summary.sparse["item"].table) == ("as item", None)
    assert list(summary.sparse["item"].coverage.values())[-1] <= 1
    assert f"{sum(sizes.values()):,}" in dataset_page(dataset)
    assert not any("item" in line for line in judge_dataset(dataset))
    assert Dataset.open(dataset.path).manifest == dataset.manifest
