"""What a bundle lets be found out about itself before it is used."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from torchdlrm.bundle import verification, weights_file
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, BundleManifest, oldest_version
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.weights_file import MappedWeights, TensorRecord, WeightsWriter
from torchdlrm.errors import BundleError, UserError
from torchdlrm.model import table_weight


@pytest.fixture
def copied(small_bundle, tmp_path):
    return shutil.copytree(small_bundle, tmp_path / "bundle")


def flip(path, position, bit=3):
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


def rows_of(bundle, ids):
    sparse = np.zeros((len(bundle.schema.sparse), len(ids)), np.int32)
    sparse[-1] = ids  # of the table at the end of the file
    return EncodedRows(np.zeros((len(ids), len(bundle.schema.dense)), np.float32), sparse)


def test_a_flipped_bit_in_any_file_is_found(copied, seed):
    rng = np.random.default_rng(seed)
    files = [path for path in copied.rglob("*") if path.is_file()]
    assert {path.name for path in files} > {MANIFEST_NAME, WEIGHTS_NAME, "sample.parquet", "cat_25.index"}
    for path in files:
        size_bytes = path.stat().st_size
        ends = {0, size_bytes - 1} if path.stem in {"bundle", "weights", "sample", "cat_25"} else set()
        for position in {*ends, int(rng.integers(size_bytes))}:
            bit = int(rng.integers(8))
            flip(path, position, bit)
            with pytest.raises(BundleError, match=path.name):
                Bundle.open(copied)
            flip(path, position, bit)
    Bundle.open(copied)


def test_every_bit_of_the_manifest_counts(copied, seed):
    path = copied / MANIFEST_NAME
    for position in np.random.default_rng(seed).integers(path.stat().st_size, size=150):
        flip(path, int(position))
        with pytest.raises(BundleError):
            BundleManifest.read(copied)
        flip(path, int(position))


def test_a_file_of_another_length_is_found(copied):
    path = copied / "vocabulary" / "cat_3.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"cat_3\.parquet: .* bytes long"):
        Bundle.open(copied)
    path.unlink()
    with pytest.raises(BundleError, match=r"cat_3\.parquet: missing"):
        Bundle.open(copied)


def test_a_newer_format_is_refused_by_name(copied):
    path = copied / MANIFEST_NAME
    content = json.loads(path.read_text())
    content |= {"format_version": 99, "something_new": 1}
    path.write_text(json.dumps(content))
    with pytest.raises(BundleError, match=r"format_version is 99, and this version of torchdlrm reads up to \d+"):
        Bundle.open(copied)


def test_what_is_no_bundle_is_told_so(tmp_path, small_run, small_bundle):
    (tmp_path / "live.toml").touch()
    with pytest.raises(BundleError, match=r"is a live model, not a bundle; that of a live model is .*/current$"):
        Bundle.open(tmp_path)
    with pytest.raises(BundleError, match="is not a folder"):
        Bundle.open(tmp_path / "nowhere")
    with pytest.raises(
        BundleError, match=r"is a run, not a bundle; `dlrm export .* --out BUNDLE` makes a bundle of it"
    ):
        Bundle.open(small_run)


def test_files_without_a_checksum_or_outside_are_not_opened(copied):
    manifest = BundleManifest.read(copied)
    for name, files in (
        ("vocabulary/cat_0.index", {k: v for k, v in manifest.files.items() if k != "vocabulary/cat_0.index"}),
        ("../other", manifest.files | {"../other": manifest.files[WEIGHTS_NAME]}),
    ):
        changed = manifest.model_copy(update={"files": files}).sealed()
        (copied / MANIFEST_NAME).write_text(changed.to_json(), encoding="utf-8")
        with pytest.raises(BundleError, match=f"names {name}, without a checksum or outside"):
            Bundle.open(copied)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 1 KiB, so that a small bundle has many."""
    monkeypatch.setattr(weights_file, "BLOCK_BYTES", 1024)
    monkeypatch.setattr(verification, "BLOCK_BYTES", 1024)
    monkeypatch.setattr("torchdlrm.bundle.bundle.BLOCK_BYTES", 1024)
    monkeypatch.setattr("torchdlrm.exporting.export.BLOCK_BYTES", 1024)


@pytest.fixture
def many_blocks(small_blocks, small_run, small_dataset, tmp_path):
    from torchdlrm.exporting.export import export
    from torchdlrm.exporting.options import ExportOptions

    export(small_run, tmp_path / "many", options=ExportOptions(name="many"), dataset=small_dataset)
    return tmp_path / "many"


def test_lazily_a_damaged_row_is_found_before_it_is_used_and_others_are_served(many_blocks, monkeypatch):
    monkeypatch.setattr(verification.BlockVerifier, "check_all_in_background", lambda _: None)
    whole = Bundle.open(many_blocks)
    start, end = whole.weights.span(table_weight("cat_25"))
    num_rows, length = whole.manifest.sparse["cat_25"].num_embeddings, 4 * whole.manifest.model.embedding_dim
    assert end - start == num_rows * length
    last = num_rows - 1
    assert (start + last * length) // 1024 > (start + 2 * length) // 1024, "rows 0 and last are in different blocks"
    expected = ServedModel(whole).predict(rows_of(whole, [1, 0]))
    flip(many_blocks / WEIGHTS_NAME, start + last * length)
    lazy = Bundle.open(many_blocks, verify="lazy")
    model = ServedModel(lazy)
    assert np.array_equal(model.predict(rows_of(lazy, [1, 0])), expected)
    assert not lazy.verifier.is_done
    with pytest.raises(BundleError, match="damaged: the sha256 of block"):
        model.predict(rows_of(lazy, [1, last]))
    with pytest.raises(BundleError, match="damaged"):  # and from then on nothing is served
        model.predict(rows_of(lazy, [1, 0]))


def test_lazily_the_background_finds_what_nobody_has_asked_for(many_blocks):
    start, _ = Bundle.open(many_blocks).weights.span(table_weight("cat_25"))
    flip(many_blocks / WEIGHTS_NAME, start)
    lazy = Bundle.open(many_blocks, verify="lazy")
    lazy.verifier.wait()
    with pytest.raises(BundleError, match="damaged"):
        ServedModel(lazy).predict(rows_of(lazy, [1]))
    assert not lazy.verifier.is_done


def test_lazily_a_damaged_layer_is_found_at_once(many_blocks):
    flip(many_blocks / WEIGHTS_NAME, Bundle.open(many_blocks).weights.span("over_arch.model.1.weight")[0])
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(many_blocks, verify="lazy")


def test_lazily_an_undamaged_bundle_is_checked_to_the_end(many_blocks):
    lazy = Bundle.open(many_blocks, verify="lazy")
    lazy.verifier.wait()
    assert lazy.verifier.is_done


def test_an_id_outside_its_table_is_an_error(small_bundle):
    bundle = Bundle.open(small_bundle)
    model, rows = ServedModel(bundle), bundle.manifest.sparse["cat_25"].num_embeddings
    for wrong in (rows, -1, 2**31 - 1):
        with pytest.raises(UserError, match=f"cat_25: id {wrong} is outside its table, which has {rows:,} rows"):
            model.predict(rows_of(bundle, [0, wrong]))


def test_the_weights_are_a_plain_safetensors_file(small_bundle):
    bundle = Bundle.open(small_bundle)
    tensors = load_file(small_bundle / WEIGHTS_NAME)
    assert set(tensors) == set(bundle.weights.shapes)
    assert tensors.pop("padding").sum() == 0
    for name, tensor in tensors.items():
        assert np.array_equal(tensor.numpy(), bundle.weights.tensor(name).numpy())


def test_the_version_follows_the_content(small_bundle, many_blocks):
    one, other = BundleManifest.read(small_bundle), BundleManifest.read(many_blocks)
    assert one.version != other.version
    assert len(one.version) == 12


def test_a_lookup_makes_no_more_resident_than_linux_maps_around_a_page(tmp_path):
    """The page cache maps what was written at once as a whole: written by 16 MiB, 100 bytes would bring 100 MB."""
    path, num_bytes = tmp_path / "weights", 128 << 20
    with WeightsWriter(path, [TensorRecord("table", "U8", (num_bytes,))]) as writer:
        for _ in range(8):
            writer.append(torch.zeros(num_bytes // 8, dtype=torch.uint8))
    table = MappedWeights(path).tensor("table")
    before = resident_file_bytes()
    assert sum(int(table[place]) for place in range(0, num_bytes, num_bytes // 100)) == 0
    assert resident_file_bytes() - before < 3 * 100 * 65_536


def resident_file_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))


def test_quantiles_without_boundaries_are_refused(small_bundle):
    content = json.loads((small_bundle / MANIFEST_NAME).read_text())
    column = content["schema"]["columns"][14]
    column |= {"kind": "int", "buckets": {"quantiles": 5, "boundaries": [1, 2, 3.5]}}
    assert BundleManifest.model_validate(content).feature_schema.sparse[0].buckets.boundaries == (1, 2, 3.5)
    column["buckets"] = 5
    with pytest.raises(ValidationError, match="cat_0: its buckets are quantiles without boundaries"):
        BundleManifest.model_validate(content)


def test_a_bundle_of_format_version_1_which_does_not_say_what_its_checkpoint_was_is_read(small_bundle, tmp_path):
    now = BundleManifest.read(small_bundle)
    then = now.model_copy(
        update={"format_version": 1, "source": now.source.model_copy(update={"checkpoint": None})}
    ).sealed()
    (tmp_path / MANIFEST_NAME).write_text(then.to_json(), encoding="utf-8")
    assert '"checkpoint": "' not in then.to_json()
    assert BundleManifest.read(tmp_path) == then


def test_a_bundle_tells_its_period_and_one_without_is_written_as_before(small_bundle, tmp_path):
    manifest = BundleManifest.read(small_bundle)
    assert manifest.period is None
    assert '"period"' not in (small_bundle / "bundle.json").read_text()
    version = oldest_version(manifest.feature_schema, manifest.model, None, period=7)
    manifest.model_copy(update={"period": 7, "format_version": version}).write(tmp_path)
    assert BundleManifest.read(tmp_path).period == 7
    assert version > oldest_version(manifest.feature_schema, manifest.model, None)
