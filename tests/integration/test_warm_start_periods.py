"""Where values came and went: ids of other values start like those of a fresh model, and are served as such."""

import json
import shutil

import polars as pl
import pytest
import torch

from helpers.days import FROZEN, ITEM_CUT, SCHEMA, TABLE, last_state, write_log
from helpers.days import config as small_config
from torchdlrm.bundle.apply import apply_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, RunError
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.training import checkpoint_state
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group

SMALLER_TABLES = {
    "model.features": '{item = {embedding_dim = 4}, city = {quotient_remainder = "add", num_collisions = 2}}'
}


def config(*changes):
    return small_config({"warm_start.checkpoint": "last"}, *changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three days, each of which extends the one before, and a run on the first."""
    folder, known = tmp_path_factory.mktemp("periods"), {"period": 1}
    for day, (first, last, cities) in enumerate(((0, 150, "abcdefg"), (100, 220, "fghi"), (150, 400, "ixyz")), start=1):
        log = write_log(folder / f"day-{day}.tsv", day, first, last, cities)
        rules = PreprocessOptions(min_count=1, expire_after=1, **known)
        known = {"vocabulary": folder / f"day-{day}", "extend_vocabulary": True}
        preprocess([log], known["vocabulary"], SCHEMA, rules)
    train(config(), folder / "day-1", folder / "run-1")
    return folder


@pytest.fixture(scope="module")
def second(folder):
    """A run on the second day that starts from that on the first, and does not change its tables."""
    train(config(FROZEN), folder / "day-2", folder / "run-2", from_run=folder / "run-1")
    return folder / "run-2"


@pytest.fixture(scope="module")
def source(folder):
    """All tensors of the first run."""
    return last_state(folder / "run-1", folder / "source")


@pytest.fixture(scope="module")
def fresh(folder):
    """Those of a run on the second day that starts from nothing."""
    train(config(FROZEN), folder / "day-2", folder / "fresh")
    return last_state(folder / "fresh", folder / "fresh-state")


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    monkeypatch.setattr(checkpoint_state, "_BLOCK_ROWS", 16)


def ids(dataset, name):
    table = dataset.vocabulary(name).table
    return dict(zip(table["id"], table["value"], strict=True))


def other_ids(folder, name, day=2):
    """By the vocabularies alone: the ids that stand for another value, or for one that is new."""
    before, now = (Dataset.open(folder / f"day-{number}") for number in (day - 1, day))
    theirs, ours = ids(before, name), ids(now, name)
    reset = [number for number, value in ours.items() if number not in theirs or theirs[number] != value]
    old_rows = before.num_embeddings[name]
    assert now.reset_ids(name).tolist() == [number for number in reset if number < old_rows]
    assert len(now.reset_ids(name)) > 1
    assert set(theirs) - set(ours) or name == "item", "some ids are free"
    return sorted({*reset, *range(old_rows, now.num_embeddings[name])})


def assert_tables_are(folder, found, source, fresh, pieces=1, factor=1.0, features=("item", "city")):
    names = [name for name in found if TABLE in name and any(f"t_{feature}." in name for feature in features)]
    assert names
    for name in names:
        feature = name.split(TABLE)[1].split(".")[0]
        reset = torch.tensor(other_ids(folder, feature))
        parts = pieces if found[name].dim() == 1 and feature == "item" else 1
        for new, old, other in zip(*(values[name].chunk(parts) for values in (found, source, fresh)), strict=True):
            expected = other.clone()
            expected[: len(old)] = old * (factor if "momentum" in name else 1)
            expected[reset] = other[reset]
            assert torch.equal(new, expected), name
            assert not torch.equal(expected[reset[reset < len(old)]], old[reset[reset < len(old)]]), name


def several_trainings(folder):
    """What two processes do, in one process group."""
    with join_process_group():
        today = folder / "day-2"
        train(config(FROZEN), today, folder / "on-2", from_run=folder / "run-1")
        train(config(ITEM_CUT), folder / "day-1", folder / "first-cut")
        train(config(ITEM_CUT, FROZEN), today, folder / "cut", from_run=folder / "first-cut")
        train(config(ITEM_CUT, FROZEN), today, folder / "cut-fresh")


def test_ids_of_other_values_start_fresh_and_all_others_keep_their_bytes(folder, second, source, fresh, tmp_path):
    """Also where tables are cut by columns, and on two processes."""
    launch(several_trainings, folder, processes=Processes(2))
    for run in (second, folder / "on-2"):
        assert_tables_are(folder, last_state(run, tmp_path / "a"), source, fresh)
    cut, first, other = (last_state(folder / name, tmp_path / name) for name in ("cut", "first-cut", "cut-fresh"))
    assert_tables_are(folder, cut, first, other, pieces=2)


def test_rows_that_ids_share_are_not_reset(folder, dlrm, tmp_path):
    runs = [tmp_path / name for name in ("first", "second", "fresh")]
    train(config(SMALLER_TABLES), folder / "day-1", runs[0])
    train(config(SMALLER_TABLES, FROZEN), folder / "day-2", runs[1], from_run=runs[0])
    train(config(SMALLER_TABLES, FROZEN), folder / "day-2", runs[2])
    first, second, fresh = (last_state(run, tmp_path / f"{run.name}-state") for run in runs)
    assert_tables_are(folder, second, first, fresh, features=("item",))
    shared = [name for name in second if "t_city_" in name]
    assert shared
    assert all(torch.equal(second[name][: len(first[name])], first[name]) for name in shared)
    shutil.copy(runs[0] / "config.toml", tmp_path / "small.toml")
    arguments = ("--dataset", folder / "day-2", "--run", tmp_path / "next", "--from", runs[0], "--dry-run")
    told = " ".join(dlrm("train", tmp_path / "small.toml", *arguments).stderr.split())
    num_reset = len(Dataset.open(folder / "day-2").reset_ids("item"))
    assert f"; {num_reset} ids of other values start with fresh rows; not those of city, which share rows" in told


def test_sums_of_squared_gradients_decay(folder, source, fresh, tmp_path):
    half = {"warm_start.accumulator_decay": "0.5"}
    train(config(FROZEN, half), folder / "day-2", tmp_path / "tables", from_run=folder / "run-1")
    dense = {"train.freeze": "dense", "train.max_steps": "1"}
    train(config(half, dense), folder / "day-2", tmp_path / "dense", from_run=folder / "run-1")
    assert_tables_are(folder, last_state(tmp_path / "tables", tmp_path / "a"), source, fresh, factor=0.5)
    found = last_state(tmp_path / "dense", tmp_path / "b")
    sums = [name for name in found if TABLE not in name and name.endswith("/sum")]
    assert sums
    assert all(torch.equal(found[name], source[name] * 0.5) for name in sums)
    others = [name for name in found if TABLE not in name and name not in sums]
    assert all(torch.equal(found[name], source[name]) for name in others)
    with pytest.raises(ConfigError, match=r"warm_start.accumulator_decay: no optimizer is adagrad.*, got 0.5"):
        config(
            half,
            {
                "table_optimizer.name": "sgd",
                "table_optimizer.initial_accumulator": "0",
                "dense_optimizer.name": "adamw",
            },
        )


def test_an_older_log_is_learnt_with_todays_ids_before_todays(folder, source, fresh, tmp_path):
    """What is reset by the older log's run is not reset again."""
    rules = PreprocessOptions(vocabulary=folder / "day-2")
    preprocess([folder / "day-1.tsv"], tmp_path / "again", SCHEMA, rules)
    train(config(FROZEN), tmp_path / "again", tmp_path / "first", from_run=folder / "run-1")
    train(config(FROZEN), folder / "day-2", tmp_path / "second", from_run=tmp_path / "first")
    first, second = last_state(tmp_path / "first", tmp_path / "a"), last_state(tmp_path / "second", tmp_path / "b")
    assert_tables_are(folder, first, source, fresh)
    assert all(torch.equal(first[name], second[name]) for name in first if TABLE in name)


def test_other_lineages_and_ids_that_moved_without_a_word_are_refused(folder, tmp_path):
    with pytest.raises(RunError, match=r"feature item: id \d+ stands for another value than in .*day-1"):
        train(config(), folder / "day-3", tmp_path / "run", from_run=folder / "run-1")
    shutil.copytree(folder / "day-2", tmp_path / "day-2")
    manifest = json.loads((tmp_path / "day-2" / "dataset.json").read_text())
    manifest["sparse"]["city"]["turnover"]["reset"] = None
    (tmp_path / "day-2" / "dataset.json").write_text(json.dumps(manifest))
    first = Dataset.open(folder / "day-2").reset_ids("city")[0]
    with pytest.raises(RunError, match=f"feature city: id {first} stands for another value"):
        train(config(), tmp_path / "day-2", tmp_path / "run", from_run=folder / "run-1")
    assert not (tmp_path / "run").exists()


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundles_and_deltas_hold_vocabularies_with_gaps(folder, second, tmp_path):
    """Of a value only its id is served: that it was seen once more is no change."""
    base, full, delta = (tmp_path / name for name in ("base", "full", "delta"))
    export(folder / "run-1", base, options=ExportOptions(name="days"))
    export(second, full, options=ExportOptions(name="days"))
    export(second, delta, options=ExportOptions(), delta_to=base)
    apply_delta(base, delta, tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(full)
    before, now, bundle = Dataset.open(folder / "day-1"), Dataset.open(folder / "day-2"), Bundle.open(full)
    for name in ("item", "city"):
        old, new = before.vocabulary(name).table.select("value", "id"), now.vocabulary(name).table.select("value", "id")
        assert new["id"][-1] > new.height or name == "item", "some ids are free"
        values = pl.concat([old["value"], new["value"]])
        assert bundle.vocabularies[name].lookup(values).to_list() == now.vocabulary(name).lookup(values).to_list()
        changed = pl.read_parquet(delta / "files" / "vocabulary" / f"{name}.parquet")
        assert changed.columns == ["value", "id"]
        assert changed.height == new.join(old, on=["value", "id"], how="anti").height
