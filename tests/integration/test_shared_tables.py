"""Columns that share a vocabulary and a table: an item that is shown, and those that were seen before, newest last.

From raw rows to predictions: what preprocessing counts, what a bundle and its deltas hold.  What a model learns of
shared tables, on one process and two, is in tests/numerics/test_smaller_tables.py.
"""

import json
import random

import duckdb
import numpy as np
import polars as pl
import pytest

from helpers.days import config, last_state
from helpers.live_models import CONFIG, WIDE, files_of
from helpers.predicted import rows_of_request
from helpers.raw_logs import checksums
from torchdlrm import ExportOptions, Feature, LiveModel, LiveSettings, Predictor, Table, advance, export, train
from torchdlrm.bundle.apply import apply_delta, write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.data.judgements import judge_dataset
from torchdlrm.data.page import dataset_page
from torchdlrm.data.summary import summarize
from torchdlrm.errors import BundleError, ConfigError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.encode import encode
from torchdlrm.features.schema import FeatureSchema, SplitRule
from torchdlrm.features.tables import check_features, feature_tables
from torchdlrm.insight.tables import table_uses
from torchdlrm.prediction.fast_path import PlainRowEncoder
from torchdlrm.prediction.json_rows import RowReader
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.progress import SILENT
from torchdlrm.serving.front.open_inference.tensors import Tensor
from torchdlrm.training.run import Run

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


def rows_of(seed, first=0, num_rows=NUM_ROWS):
    """Rows of items from `first` on; what was seen before is weighted, and may be the same item again."""
    rng = random.Random(seed)
    for _ in range(num_rows):
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


def write_text(path, rows):
    path.write_text("\n".join(["\t".join(rows[0]), *map(as_text, rows)]) + "\n")
    return path


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The same rows as text, JSON Lines and Parquet."""
    folder, rows = tmp_path_factory.mktemp("logs"), list(rows_of(1))
    write_text(folder / "log.tsv", rows)
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


@pytest.fixture(scope="module")
def run(dataset, logs):
    train(config(), dataset, logs / "run")
    return logs / "run"


def test_text_json_parquet_and_tensors_are_predicted_as_the_checkpoint_predicts_encoded_rows(run, dataset, logs):
    bundle = export(run, logs / "bundle", options=ExportOptions(precision="float32")).bundle
    assert (bundle.manifest.format_version, bundle.manifest.sparse["seen"]) == (10, bundle.manifest.sparse["item"])
    vocabularies = [name for name in bundle.manifest.files if name.startswith("vocabulary/")]
    assert vocabularies == ["vocabulary/item.parquet", "vocabulary/item.index"]
    assert bundle.vocabularies["seen"] is bundle.vocabularies["item"]
    assert [use["table"] for use in table_uses(bundle, SILENT)] == ["item", "shop", "page"]
    model = CheckpointModel(open_checkpoint(Run.open(run), "last")[1], Run.open(run).shape(dataset))
    encoded = pl.concat(rows_of_split(dataset, "test"))
    expected = 1 / (1 + np.exp(-model.logits(EncodedRows.from_frame(encoded, dataset.schema)).astype(np.float64)))
    first, predictor = NUM_ROWS - encoded.height, Predictor.open(logs / "bundle")
    lines = [json.loads(line) for line in (logs / "log.jsonl").read_text().splitlines()[first:]]
    cells = list(zip(*(line.split("\t") for line in (logs / "log.tsv").read_text().splitlines()), strict=True))
    tensors = [
        Tensor(name, "FP64", (encoded.height,), pl.Series(map(float, column[first:])))
        if name == "price"
        else Tensor(name, "BYTES", (encoded.height,), pl.Series([cell or None for cell in column[first:]]))
        for name, *column in cells
        if name != "click"
    ]
    of_tensors = predictor.encode(rows_of_request(tensors, predictor.schema, encoded.height))
    for found in (
        predictor.predict(pl.read_parquet(logs / "log.parquet")[first:]),
        predictor.predict(lines),
        predictor.predict_encoded(of_tensors).probabilities,
        [predictor.predict([line])[0] for line in lines[:30]],
    ):
        np.testing.assert_allclose(found, expected[: len(found)], rtol=0, atol=1e-6)
    # Rows without lists have a path of their own.
    single = [column for column in SCHEMA.columns if getattr(column, "value_separator", None) is None]
    alone = SCHEMA.with_columns([*single, SparseColumn(name="last", kind="int", table="item")])
    vocabularies = bundle.vocabularies | {"last": bundle.vocabularies["item"]}
    rows = [{name: line[name] for name in line if name not in ("click", "seen", "shops")} for line in lines]
    rows = [{**row, "last": row["item"]} for row in rows]
    fast = PlainRowEncoder(alone, bundle.dense, vocabularies).encode(rows)
    slow = EncodedRows.from_frame(encode(RowReader(alone).read(rows), alone, bundle.dense, vocabularies), alone)
    assert np.array_equal(fast.sparse, slow.sparse)
    assert np.array_equal(fast.sparse[0], fast.sparse[-1])


@pytest.mark.parametrize("precision", ["auto", "int8"])
def test_a_shared_table_has_one_precision_and_an_export_is_known_again(run, logs, precision):
    options = ExportOptions(precision=precision, max_logloss_increase=1.0)
    done = [export(run, logs / precision, options=options) for _ in range(2)]
    assert [each.was_complete for each in done] == [False, True]
    assert done[0].search is None or [*done[0].search.tables] == ["item", "shop", "page"]
    manifest = done[0].bundle.manifest
    wrong = manifest.sparse["item"].model_copy(update={"num_embeddings": 1 << 20})
    wrong = manifest.model_copy(update={"sparse": manifest.sparse | {"seen": wrong}})
    (logs / f"{precision}-wrong").mkdir()
    wrong.write(logs / f"{precision}-wrong")
    with pytest.raises(BundleError, match=r"sparse\.seen: has another table or vocabulary than item, which it shares"):
        BundleManifest.read(logs / f"{precision}-wrong")


def test_a_table_that_a_class_asks_for_twice_is_one():
    features = [Feature("item", 9), Feature("seen", 9, table="item")]
    alike = [Table("item", 1, "wide"), Table("seen", 1, "wide")]
    check_features(CONFIG.model, features, alike)
    keys = feature_tables(CONFIG.model, features, alike)
    assert [key.table_key for key in keys] == ["item", "item@wide", "item", "item@wide"]
    with pytest.raises(ConfigError, match="is also that of item, with the same init and frozen"):
        check_features(CONFIG.model, features, [alike[0], Table("seen", 1, "wide", frozen=True)])


def test_values_stay_while_a_column_has_them_and_deltas_give_the_bytes_of_the_whole_export(tmp_path):
    schema = SCHEMA.model_copy(update={"split": SplitRule(rule="order", val=0.0, test=0.0)})
    for period in (1, 2, 3):
        rows = list(rows_of(period, first=60 * period, num_rows=500))
        for row in rows[:3] if period == 2 else ():
            row["seen"] = [{"value": 61, "weight": 1.0}]  # of the first period; no row shows it any more
        log = write_text(tmp_path / f"{period}.tsv", rows)
        settings = LiveSettings(min_count=3, expire_after=1, gate=WIDE)
        advance(tmp_path / "live", log, config=CONFIG, schema=schema, settings=settings)
    live = LiveModel.open(tmp_path / "live")
    first, second, third = (Dataset.open(live.day(period) / "dataset").vocabulary("item").table for period in (1, 2, 3))
    number = dict(first.select("value", "id").iter_rows())[61]
    assert dict(second.select("value", "id").iter_rows())[61] == number
    assert 61 not in third["value"]
    today = Dataset.open(live.day(2) / "dataset")
    assert len(today.reset_ids("item")) > 10
    assert (live.periods[1].features["item"].expired, live.periods[1].features["seen"].expired) > (10, 0)
    # Rows of ids that another value has now begin as those of a fresh run.
    frozen = CONFIG.model_copy(
        update={
            "train": CONFIG.train.model_copy(update={"freeze": ("tables",), "max_steps": 1}),
            "warm_start": CONFIG.warm_start.model_copy(update={"checkpoint": "last"}),
        }
    )
    train(frozen, today, tmp_path / "later", from_run=live.day(1) / "run")
    train(frozen, today, tmp_path / "fresh")
    folders = (live.day(1) / "run", tmp_path / "later", tmp_path / "fresh")
    weights = [last_state(run, tmp_path / f"state-{i}") for i, run in enumerate(folders)]
    before, later, expected = (next(of[name] for name in of if name.endswith("t_item.weight")) for of in weights)
    kept = np.setdiff1d(np.arange(len(before)), today.reset_ids("item"))
    expected[kept] = before[kept]
    assert np.array_equal(later, expected)
    for before in (1, 2):
        base, full, delta = live.bundle(before), live.bundle(before + 1), tmp_path / f"delta-{before}"
        delta.mkdir()
        write_delta(base, full, delta)
        assert {name for name in Delta.open(delta).manifest.files if "vocabulary" in name} == {
            "vocabulary/item.parquet",
            "vocabulary/item.index",
        }
        apply_delta(base, delta, tmp_path / f"applied-{before}")
        assert files_of(tmp_path / f"applied-{before}") == files_of(full)
        patched = PatchedBundle(Bundle.open(base), Delta.open(delta))
        assert patched.vocabularies["seen"] is patched.vocabularies["item"]
        lines = pl.read_csv(tmp_path / "3.tsv", separator="\t", infer_schema=False).drop("click")
        assert np.array_equal(Predictor(patched).predict(lines), Predictor.open(full).predict(lines))
