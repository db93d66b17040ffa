"""Deltas: a bundle made of another one has the bytes of the whole export, however tables and vocabularies grew.

Whatever a delta holds, and however right its checksums are: it is refused with one error, and nothing is left.
"""

import json
import random
import shutil
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from helpers.crafted import change_manifest, copy, seal, write
from helpers.crafted_deltas import CRAFTED, TABLE, WELL_FORMED, seal_delta
from helpers.days import config
from helpers.live_models import SCHEMA as DAYS
from helpers.live_models import files_of
from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bundle import apply as applying
from torchdlrm.bundle.apply import apply_delta, write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.bundle.weights_file import MappedWeights
from torchdlrm.cli.main import app
from torchdlrm.config import ModelConfig
from torchdlrm.errors import BundleError, TorchDLRMError
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.value_index import ValueIndex
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.training.job import train

PRECISIONS = ["float32", "float16", "int8", "int4", "auto"]
SCHEMA = DAYS.model_copy(update={"columns": (*DAYS.columns, SparseColumn(name="shop", kind="int"))})
SMALL = config({"train.max_steps": "3"})


def write_log(path, seed, first, last, cities):
    rng = random.Random(seed)
    rows = [
        (rng.choice("01"), rng.gauss(5, 1), rng.randrange(first, last), rng.choice(cities), rng.randrange(9))
        for _ in range(1_000)
    ]
    lines = [f"{label}\t{cost:.4f}\t{item:x}\t{city}\t{item}\t{shop}\n" for label, cost, item, city, shop in rows]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """A folder with a run on Monday's rows, and one that continues it on Tuesday's: more items and cities."""
    folder = tmp_path_factory.mktemp("days")
    log = write_log(folder / "monday.tsv", 1, 0, 150, ["Ulm", "Bonn"])
    monday = preprocess([log], folder / "monday", SCHEMA, PreprocessOptions(min_count=1))
    train(SMALL, monday, folder / "run-1")
    log = write_log(folder / "tuesday.tsv", 2, 100, 300, ["Ulm", "Bonn", "Köln", "Jena"])
    options = PreprocessOptions(min_count=1, vocabulary=monday.path, extend_vocabulary=True)
    tuesday = preprocess([log], folder / "tuesday", SCHEMA, options)
    train(SMALL, tuesday, folder / "run-2", from_run=folder / "run-1")
    return folder


@pytest.fixture(scope="module")
def made(days):
    """For each precision, by its name: Monday's bundle, Tuesday's, and the delta between them."""
    paths = {}
    for precision in PRECISIONS:
        options = ExportOptions(precision=precision, name="days", max_logloss_increase=1.0)
        base, full, delta = (days / f"{name}-{precision}" for name in ("base", "full", "delta"))
        export(days / "run-1", base, options=options)
        export(days / "run-2", full, options=options)
        exported = export(
            days / "run-2", delta, options=ExportOptions(precision=precision, max_logloss_increase=1.0), delta_to=base
        )
        assert exported.delta.path == delta
        paths[precision] = base, full, delta
    return paths


@pytest.mark.parametrize(("old", "new"), [("float16", "float16"), ("int4", "float32")])
def test_a_delta_back_to_where_values_were_fewer_or_to_another_precision(made, old, new, tmp_path):
    """Rows are removed and tables get shorter, or are held as a whole."""
    base, full = made[old][1], made[new][0]
    (tmp_path / "delta").mkdir()
    write_delta(base, full, tmp_path / "delta")
    apply_delta(base, tmp_path / "delta", tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(full)
    assert Delta.open(tmp_path / "delta").manifest.files["vocabulary/item.parquet"].how == "rows"


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_applied_delta_gives_the_bytes_of_the_whole_export(made, precision, tmp_path):
    base, full, delta = made[precision]
    before = files_of(base)
    bundle = apply_delta(base, delta, tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(full)
    assert files_of(base) == before
    assert bundle.version == BundleManifest.read(full).version
    assert names_in(tmp_path) == ["new"]
    assert {path.name for path in delta.iterdir()} == {"delta.json", "weights.delta", "files"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_delta_in_memory_predicts_as_the_whole_export(made, days, precision, tmp_path):
    """There and back: tables and vocabularies grow, and get smaller, and only what changed is in memory."""
    base, full, delta = made[precision]
    (tmp_path / "back").mkdir()
    write_delta(full, base, tmp_path / "back")
    lines = (days / "tuesday.tsv").read_text().splitlines()[:400]
    rows = [dict(zip(["price", "item", "city", "page", "shop"], line.split("\t")[1:], strict=True)) for line in lines]
    bundle = Bundle.open(base)
    for whole, step in ((full, delta), (base, tmp_path / "back"), (full, delta)):
        bundle = PatchedBundle(bundle, Delta.open(step))
        ours, theirs = Predictor(bundle), Predictor.open(whole)
        assert np.array_equal(ours.predict(rows), theirs.predict(rows))
        assert [ours.predict([row])[0] for row in rows[:40]] == [theirs.predict([row])[0] for row in rows[:40]]
        unknown, expected = (one.unknown(one.encode_rows(rows)) for one in (ours, theirs))
        assert all(np.array_equal(unknown[name], expected[name]) for name in expected)
        ours.check_sample()
    assert isinstance(bundle.vocabularies["shop"], ValueIndex), "which did not change"
    tables = Delta.open(delta).manifest.weights.tables
    assert bundle.weights.num_rows >= sum(sum(table.changed_rows) for table in tables)
    assert bundle.num_values == sum(
        pq.read_table(full / "vocabulary" / name).num_rows - pq.read_table(base / "vocabulary" / name).num_rows
        for name in ("item.parquet", "city.parquet")
    )


def test_a_delta_in_memory_needs_the_bundle_that_it_is_to_and_its_schema(made, tmp_path):
    with pytest.raises(BundleError, match=r"a delta to the bundle of version .*, and not of"):
        PatchedBundle(Bundle.open(made["int4"][0]), Delta.open(made["int8"][2]))
    other = copy(made["int8"][1], tmp_path / "other")
    change_manifest(other, lambda content: content["schema"].update(name="another"))
    (tmp_path / "delta").mkdir()
    write_delta(made["int8"][0], other, tmp_path / "delta")
    with pytest.raises(BundleError, match="its schema or its model's shape is another one"):
        PatchedBundle(Bundle.open(made["int8"][0]), Delta.open(tmp_path / "delta"))


def test_grown_vocabularies_are_their_new_rows_and_their_indexes_are_built(made):
    base, full, delta = made["int8"]
    files = Delta.open(delta).manifest.files
    assert {name: recipe.how for name, recipe in files.items()} == {
        "vocabulary/item.parquet": "rows",
        "vocabulary/item.index": "index",
        "vocabulary/city.parquet": "rows",
        "vocabulary/city.index": "index",
        "vocabulary/shop.parquet": "base",
        "vocabulary/shop.index": "base",
        "sample.parquet": "whole",
    }
    new = pq.read_table(delta / "files/vocabulary/item.parquet")["id"].to_pylist()
    known = pq.read_table(base / "vocabulary/item.parquet").num_rows
    assert new == list(range(known + 1, pq.read_table(full / "vocabulary/item.parquet").num_rows + 1))


def test_vocabularies_with_other_columns_and_changed_rows(made, tmp_path):
    """Whatever a vocabulary's file says of a value, and which values went."""
    base, full, delta = tmp_path / "base", tmp_path / "full", tmp_path / "delta"
    for folder, day, gone in ((base, 1, ()), (full, 2, (5, 7))):
        copy(made["int8"][0], folder)
        path = folder / "vocabulary" / "item.parquet"
        table = pq.read_table(path)
        days = pa.array([day if i % 9 == 0 else 1 for i in range(table.num_rows)], pa.int32())
        table = table.append_column(pa.field("last_period", pa.int32(), nullable=False), days)
        table = table.filter([i not in gone for i in table["id"].to_pylist()])
        path.unlink()
        pq.write_table(
            table, path, store_schema=False, compression="zstd", use_dictionary=False, write_page_checksum=True
        )
        if gone:
            (folder / "vocabulary" / "item.index").unlink()
            manifest = BundleManifest.read(folder)
            applying._build_index(manifest, "vocabulary/item.index", folder, folder / "vocabulary/item.index")
        seal(folder)
    delta.mkdir()
    write_delta(base, full, delta)
    recipe = Delta.open(delta).manifest.files["vocabulary/item.parquet"]
    assert (recipe.how, recipe.removed_ids) == ("rows", (5, 7))
    apply_delta(base, delta, tmp_path / "new")
    assert files_of(tmp_path / "new") == files_of(full)


@pytest.mark.parametrize(("precision", "num_rows"), [("int8", 1_000_000), ("float32", 200_000)])
def test_two_percent_of_many_rows_are_at_most_three_percent_of_the_bundle(precision, num_rows, tmp_path):
    config = ModelConfig(embedding_dim=64, dense_arch_layer_sizes=(64,), over_arch_layer_sizes=(16, 1))
    base = write_random_bundle(tmp_path / "base", {"a": num_rows}, precision, config)
    full = tmp_path / "full"
    shutil.copytree(base, full)
    start, end = MappedWeights(full / "weights.safetensors").span(TABLE.format("a"))
    changed = np.sort(np.random.default_rng(0).choice(num_rows, num_rows // 50, replace=False))
    weights = np.memmap(full / "weights.safetensors", np.uint8, "r+")
    weights[start:end].reshape(num_rows, -1)[changed, 8:] ^= 1
    weights.flush()
    seal(full)
    (tmp_path / "delta").mkdir()
    write_delta(base, full, tmp_path / "delta")
    delta = Delta.open(tmp_path / "delta")
    assert sum(delta.manifest.weights.tables[0].changed_rows) == num_rows // 50
    assert delta.size_bytes == sum(len(data) for data in files_of(delta.path).values())
    assert delta.size_bytes < 0.03 * delta.manifest.result.size_bytes
    served, before_bytes = Bundle.open(base), anonymous_bytes()
    patched = PatchedBundle(served, delta)
    changed_bytes = num_rows // 50 * delta.manifest.weights.tables[0].row_bytes
    assert anonymous_bytes() - before_bytes < 3 * changed_bytes
    assert changed_bytes < patched.memory_bytes < 1.2 * changed_bytes
    apply_delta(base, delta.path, tmp_path / "new")
    for name in ("weights.safetensors", "bundle.json"):
        assert (tmp_path / "new" / name).read_bytes() == (full / name).read_bytes()


def anonymous_bytes():
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_commands_export_inspect_and_apply_a_delta(made, days, tmp_path, capsys):
    base, full, _ = made["int8"]
    options = ["--precision", "int8", "--max-logloss-increase", "1", "--json"]
    app(["export", str(days / "run-2"), "--out", str(tmp_path / "d"), "--delta-to", str(base), *options])
    exported = json.loads(capsys.readouterr().out)
    app(["inspect", str(tmp_path / "d"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert shown == {"kind": "delta", **exported["delta"]}
    old, new = (MappedWeights(folder / "weights.safetensors") for folder in (base, full))
    for name, table in shown["tables"].items():
        before, after = (weights.tensor(TABLE.format(name)).numpy() for weights in (old, new))
        assert (table["rows"], table["new_rows"]) == (len(after), len(after) - len(before))
        assert table["changed_rows"] == (before != after[: len(before)]).any(axis=1).sum()
    assert shown["size_bytes"] == sum(len(data) for data in files_of(tmp_path / "d").values())
    app(["inspect", str(tmp_path / "d")])
    assert "complete and undamaged" in capsys.readouterr().err
    app(["apply", str(base), str(tmp_path / "d"), "--out", str(tmp_path / "new"), "--json"])
    assert json.loads(capsys.readouterr().out)["version"] == shown["result"]["version"]
    assert files_of(tmp_path / "new") == files_of(full)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


def refused(base, delta, tmp_path, match):
    left = names_in(tmp_path)
    with pytest.raises(BundleError, match=match) as caught:
        apply_delta(base, delta, tmp_path / "new")
    assert names_in(tmp_path) == left
    return str(caught.value)


def test_a_delta_to_another_bundle_is_refused(made, tmp_path):
    message = refused(made["int4"][0], made["int8"][2], tmp_path, "a delta to the bundle of version")
    assert BundleManifest.read(made["int4"][0]).version in message
    refused(made["int8"][0], made["int8"][1], tmp_path, "is a bundle, not a delta")
    refused(
        made["int8"][0],
        tmp_path / "none",
        tmp_path,
        "is not a folder; make one with `dlrm export RUN --delta-to",
    )
    refused(
        made["int8"][2], made["int8"][2], tmp_path, "is a delta, not a bundle; `dlrm apply BASE .* makes the one that"
    )
    (tmp_path / "new").mkdir()
    refused(made["int8"][0], made["int8"][2], tmp_path, "is there already")


def kept_byte(base, full, _):
    """Where in the base's weights a row is that the result has too: of an item that only Monday had."""
    before, after = (MappedWeights(folder / "weights.safetensors") for folder in (base, full))
    ours, theirs = (weights.tensor(TABLE.format("item")).numpy() for weights in (before, after))
    kept = int(np.flatnonzero((ours == theirs[: len(ours)]).all(axis=1))[-1])
    return before.span(TABLE.format("item"))[0] + kept * ours.shape[1]


@pytest.mark.parametrize("name", ["weights.safetensors", "vocabulary/item.parquet", "vocabulary/shop.index"])
@pytest.mark.parametrize("how", ["a bit", "shorter", "missing"])
def test_a_damaged_base_is_refused(made, tmp_path, name, how):
    base = copy(made["int8"][0], tmp_path / "base")
    data = bytearray((base / name).read_bytes())
    data[kept_byte(*made["int8"]) if name.startswith("weights") else len(data) // 3] ^= 4
    write(base / name, bytes(data) if how == "a bit" else bytes(data[: len(data) // 2]))
    if how == "missing":
        (base / name).unlink()
    refused(
        base, made["int8"][2], tmp_path, r"damaged|cannot be read|cannot be applied|not a vocabulary|not a safetensors"
    )


def test_every_flipped_bit_of_a_delta_is_found(made, tmp_path):
    rng = random.Random(0)
    names = sorted(files_of(made["int8"][2]))
    for case in range(60):
        delta = copy(made["int8"][2], tmp_path / "delta")
        path = delta / names[case % len(names)]
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        write(path, bytes(data))
        refused(made["int8"][0], delta, tmp_path, None)
        shutil.rmtree(delta)


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_delta_is_refused(made, tmp_path, name):
    delta = copy(made["int8"][2], tmp_path / "delta")
    CRAFTED[name](delta)
    message = refused(made["int8"][0], delta, tmp_path, str(delta))
    assert "dlrm export" not in message  # would not help
    # In memory no bytes are made that could be compared: what is well formed predicts, if only something else.
    with suppress(TorchDLRMError):
        bundle = PatchedBundle(Bundle.open(made["int8"][0]), Delta.open(delta))
        assert name in WELL_FORMED
        rows = [{"item": f"{i:x}", "city": "Ulm", "shop": i % 9} for i in range(400)]
        assert np.isfinite(Predictor(bundle).predict(rows)).all()


def test_a_delta_with_its_checksums_made_again_is_none_of_them(made, tmp_path):
    delta = copy(made["int8"][2], tmp_path / "delta")
    seal_delta(delta)
    assert files_of(apply_delta(made["int8"][0], delta, tmp_path / "new").path) == files_of(made["int8"][1])


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_apply_leaves_nothing(made, tmp_path, monkeypatch, stop):
    def interrupted(base, delta, path, progress):
        path.write_bytes(b"half")
        raise stop

    base, _, delta = made["int8"]
    with monkeypatch.context() as patch:
        patch.setattr(applying, "apply_changes", interrupted)
        with pytest.raises(stop if isinstance(stop, type) else OSError):
            apply_delta(base, delta, tmp_path / "new")
    assert not names_in(tmp_path)
    (tmp_path / ".new.partial" / "vocabulary").mkdir(parents=True)  # of one that was killed
    (tmp_path / ".new.partial" / "weights.safetensors").write_bytes(b"half")
    apply_delta(base, delta, tmp_path / "new")
    assert names_in(tmp_path) == ["new"]


def test_a_refused_export_leaves_no_delta(made, days, tmp_path):
    base = copy(made["int8"][0], tmp_path / "base")
    data = (base / "weights.safetensors").read_bytes()
    write(base / "weights.safetensors", data[:-1] + b"\1")
    with pytest.raises(BundleError, match="damaged"):
        export(days / "run-2", tmp_path / "delta", delta_to=base)
    with pytest.raises(BundleError, match="is there already"):
        export(days / "run-2", tmp_path / "base", delta_to=made["int8"][0])
    assert names_in(tmp_path) == ["base"]
