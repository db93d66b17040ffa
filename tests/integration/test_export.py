"""`dlrm export` as a user runs it, on logs of one's own, and when it is interrupted."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
from test_preprocess_own_log import SCHEMA_TEXT, rows
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from helpers.command_server import shared_server
from helpers.predicted import evaluated
from torchdlrm.bundle import write
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.check import Tolerance, compare, tolerance
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.write import require_space
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.errors import BundleError, RunError
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.exporting.verify import verify
from torchdlrm.features.encode import encode
from torchdlrm.features.schema_file import load_schema
from torchdlrm.model import table_weight
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.progress import SILENT
from torchdlrm.training.checkpoint import checkpoint_path, list_checkpoints
from torchdlrm.training.checkpoint_reader import CheckpointReader
from torchdlrm.training.job import train
from torchdlrm.training.run import Run


@pytest.fixture(scope="module")
def shop(dlrm, tmp_path_factory):
    """A run by two processes on a log with text, lists of values and hashed users: (run, dataset)."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "schema.toml").write_text(SCHEMA_TEXT, encoding="utf-8")
    pl.DataFrame(list(rows(3000))).write_csv(folder / "log.csv")
    schema = load_schema(str(folder / "schema.toml"))
    dataset = preprocess([folder / "log.csv"], folder / "dataset", schema, PreprocessOptions(min_count=2))
    config = folder / "config.toml"
    config.write_text(
        "[model]\nembedding_dim = 8\ndense_arch_layer_sizes = [16, 8]\nover_arch_layer_sizes = [16, 1]\n"
        "[train]\nbatch_size_global = 128\nepochs = 3\n[logging]\ntensorboard = false\n"
        # A table in pieces: columns on both ranks.
        '[sharding]\nconstraints = ["city=column_wise"]\n'
    )
    done = dlrm("train", config, "--dataset", dataset.path, "--run", folder / "run", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    return folder / "run", dataset


def test_a_run_of_two_processes_with_lists_text_and_hashes_is_exported_by_one(shop, tmp_path):
    run, dataset = shop
    assert json.loads((run / "environment.json").read_text())["world_size"] == 2
    bundle = export(run, tmp_path / "bundle", options=ExportOptions(name="shop"), dataset=dataset).bundle
    expected = evaluated(run, dataset, "test")
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits["test"].files])
    rows = EncodedRows.from_frame(frame, dataset.schema)
    assert isinstance(rows.sparse, tuple)
    model = ServedModel(bundle)
    np.testing.assert_allclose(model.predict(rows), expected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(model.predict(rows.part(11, 40)), expected[11:40], rtol=0, atol=1e-6)
    raw, predictions = bundle.sample()
    assert raw.height > 100
    assert raw.schema["tags"] == pl.List(pl.String)
    encoded = encode(raw, bundle.schema, bundle.dense, bundle.vocabularies)
    again = model.predict(EncodedRows.from_frame(encoded, bundle.schema))
    np.testing.assert_allclose(again, predictions, rtol=0, atol=1e-6)


def test_the_command_tells_people_and_programs(dlrm, small_run, tmp_path):
    done = dlrm("export", small_run, "--out", tmp_path / "b", "--precision", "auto", "--name", "clicks", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (result["name"], result["check"]["split"]) == ("clicks", "test")
    assert set(result["precision_search"]["tables"]) == {f"cat_{i}" for i in range(26)}
    assert "allowed" in done.stderr
    assert "largest difference" in done.stderr
    shown = dlrm("inspect", tmp_path / "b", "--json")
    assert json.loads(shown.stdout)["version"] == result["version"]


def exported(run, out, **options):
    """The folder, its bytes, and whether it was complete before."""
    overwrite = options.pop("overwrite", False)
    done = export(run, out, options=ExportOptions(name="small", **options), overwrite=overwrite)
    return done.was_complete, {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_of_a_complete_bundle_with_searched_precisions_nothing_is_left_to_do(small_run, tmp_path):
    was_complete, before = exported(small_run, tmp_path / "b", precision="auto")
    assert not was_complete
    assert exported(small_run, tmp_path / "b", precision="auto") == (True, before)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "int8"}, "tables.cat_0: was 'float32', is 'int8'"),
        ({"dense_precision": "bfloat16"}, "dense_precision: was 'float32', is 'bfloat16'"),
        ({"checkpoint": "last"}, "source.checkpoint: was 'best', is 'last'"),
        ({"check_rows": 7}, "check_rows: was 357, is 7"),
        ({}, "the checkpoint has others"),
    ],
)
def test_another_bundle_is_refused_and_replaced_where_asked_and_a_complete_one_is_left(
    small_run, small_dataset, tmp_path, change, words
):
    run, out = small_run, tmp_path / "b"
    was_complete, before = exported(run, out)
    assert not was_complete
    if not change:  # trained again in the same folder, to the same step, from another seed
        config = Run.open(run).config.model_copy(update={"seed": 5})
        run = tmp_path / run.name
        train(config, small_dataset, run)
    with pytest.raises(BundleError, match=words):
        exported(run, out, **change)
    assert {path: path.read_bytes() for path in before} == before
    was_complete, after = exported(run, out, overwrite=True, **change)
    assert not was_complete
    assert after != before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    inode = out.stat().st_ino
    assert exported(run, out, **change) == (True, after)
    assert out.stat().st_ino == inode


def test_nothing_that_is_no_bundle_is_written_over(small_run, small_bundle, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "current").symlink_to(small_bundle)
    (tmp_path / "dangling").symlink_to("nowhere")
    there = "is there already"
    for name, words in (("mine", "is no folder of a bundle or a delta"), ("current", there), ("dangling", there)):
        with pytest.raises(BundleError, match=words):
            export(small_run, tmp_path / name, options=ExportOptions(name="small"), overwrite=True)
    with pytest.raises(BundleError, match="name: was 'small', is 'other'"):
        export(small_run, small_bundle, options=ExportOptions(name="other"))
    assert Bundle.open(small_bundle).name == "small"


class Interrupting:
    """Stops a job in one of its phases: a listener of progress."""

    def __init__(self, phase, error):
        self.phase, self.error, self.now = phase, error, ""

    def start_phase(self, name, *_, **__):
        self.now = name

    def advance(self, *_, **__):
        if self.now == self.phase:
            raise self.error


@pytest.mark.parametrize("phase", ["write weights", "check"])
def test_an_interrupted_export_leaves_nothing(small_run, tmp_path, phase):
    options = ExportOptions(name="small")
    with pytest.raises(KeyboardInterrupt):
        export(small_run, tmp_path / "bundle", options=options, progress=Interrupting(phase, KeyboardInterrupt()))
    assert list(tmp_path.iterdir()) == []


def test_a_link_in_the_place_of_unfinished_work_is_not_followed(small_run, small_dataset, tmp_path, dlrm):
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    (tmp_path / ".bundle.partial").symlink_to("victim")
    done = dlrm("export", small_run, "--dataset", small_dataset.path, "--out", tmp_path / "bundle")
    assert done.returncode == 2
    assert "is not what an interrupted job leaves there: it is not a folder" in " ".join(done.stderr.split())
    assert [path.name for path in (tmp_path / "victim").iterdir()] == ["file"]
    assert not (tmp_path / "bundle").exists()


# The real command, which then waits to be interrupted in the midst of its work.
UNTIL_INTERRUPTED = """
import importlib, threading
from torchdlrm.cli.main import main
export = importlib.import_module("torchdlrm.exporting.export")
write = export.write_weights
def write_and_wait(*args):
    write(*args)
    threading.Event().wait(60)
export.write_weights = write_and_wait
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_export_that_a_signal_ends_leaves_nothing_behind(number, small_run, small_dataset, tmp_path):
    script, out = tmp_path / "export.py", tmp_path / "out"
    script.write_text(UNTIL_INTERRUPTED)
    out.mkdir()
    command = [script, "export", small_run, "--out", out / "bundle", "--dataset", small_dataset.path]
    process = shared_server().start([*command, "--precision", "auto"], stderr=subprocess.PIPE)
    while not list(out.glob("*/weights.safetensors")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors.splitlines()[-1]) == (130, "interrupted")
    assert list(out.iterdir()) == []


def test_a_bundle_that_predicts_other_than_the_checkpoint_is_not_left(small_run, small_dataset, tmp_path, monkeypatch):
    right = ServedModel.logits
    monkeypatch.setattr(ServedModel, "logits", lambda self, rows: right(self, rows) + np.float32(1e-3))
    with pytest.raises(BundleError, match=r"on 357 rows of test: a probability differs by 0\.0002"):
        export(small_run, tmp_path / "bundle", options=ExportOptions(name="small"), dataset=small_dataset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dense_precision", ["float32", "bfloat16"])
def test_rows_of_coarse_tables_in_each_other_s_place_are_found(
    dense_precision, small_run, small_dataset, tmp_path, monkeypatch
):
    """Rounding and bfloat16 may move a probability by as much as the wrong row of a table does; they do not hide it."""
    right = write.quantize_rows
    monkeypatch.setattr(write, "quantize_rows", lambda rows, precision: right(rows, precision).roll(1, dims=0))
    options = ExportOptions(name="small", precision="int4", dense_precision=dense_precision)
    with pytest.raises(BundleError, match=r"with the same embeddings on 357 rows.*: a probability differs by 0\.\d+"):
        export(small_run, tmp_path / "bundle", options=options, dataset=small_dataset)
    assert list(tmp_path.iterdir()) == []


def test_a_logloss_that_rises_beyond_what_is_allowed_is_refused(small_dataset):
    def shifted(rows):  # to the same side for all rows, and by no more than 4 bits may move one
        return np.full(rows.num_rows, 1.0, np.float32)

    with pytest.raises(BundleError, match=r"logloss on 357 rows of test is 0\.\d+ higher"):
        compare(
            rows_of_split(small_dataset, "test", 1_000),
            small_dataset.schema,
            split="test",
            checkpoint=lambda rows: np.zeros(rows.num_rows, np.float32),
            rounded=shifted,
            in_float32=None,
            bundle=shifted,
            allowed=Tolerance(0.4, 2.0, 0.0),
            progress=SILENT,
        )


def rounded(logits):
    return torch.from_numpy(logits).bfloat16().float().numpy()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (rounded, r"there are \d+ different probabilities in place of 357"),
        # Where clicks are rare, and no probability differs by much.
        (lambda logits: logits - np.float32(0.3), r"a probability differs by 0\.26 times itself, and 0\.2 is allowed"),
    ],
)
def test_what_costs_ties_or_moves_small_probabilities_is_refused(change, problem, small_dataset, seed):
    logits = np.random.default_rng(seed).normal(-4.5, 0.3, 357).astype(np.float32)
    with pytest.raises(BundleError, match=problem):
        compare(
            rows_of_split(small_dataset, "test", 1_000),
            small_dataset.schema,
            split="test",
            checkpoint=lambda _: logits,
            rounded=None,
            in_float32=lambda _: logits,
            bundle=lambda _: change(logits),
            allowed=tolerance(["float32"], "bfloat16"),
            progress=SILENT,
        )


def round_logits(monkeypatch):
    """What is served in bfloat16 has logits of bfloat16, too."""
    right = ServedModel.logits

    def logits(self, rows):
        return rounded(right(self, rows)) if self.dense_precision == "bfloat16" else right(self, rows)

    monkeypatch.setattr(ServedModel, "logits", logits)


def test_where_bfloat16_would_make_ties_auto_takes_float32(small_run, small_dataset, tmp_path, monkeypatch):
    round_logits(monkeypatch)
    monkeypatch.setattr(sys.modules[export.__module__], "MIN_BFLOAT16_MULTIPLY_ADDS", 0)
    options = ExportOptions(name="small", precision="int8")
    exported = export(small_run, tmp_path / "auto", options=options, dataset=small_dataset)
    assert exported.bundle.manifest.dense_precision == "float32"
    assert "bfloat16 costs more than it may on 357 rows of test: there are" in exported.dense_reason
    assert exported.agreement.distinct == exported.agreement.distinct_before == 357
    Predictor(exported.bundle).check_sample()
    asked = dataclasses.replace(options, dense_precision="bfloat16")
    with pytest.raises(BundleError, match="different probabilities in place of 357; nothing was left behind"):
        export(small_run, tmp_path / "asked", options=asked, dataset=small_dataset)
    assert [path.name for path in tmp_path.iterdir()] == ["auto"]


def test_verify_finds_rows_that_are_ranked_alike(small_run, small_dataset, small_log, tmp_path, monkeypatch):
    options = ExportOptions(name="small", precision="int8", dense_precision="bfloat16")
    bundle = export(small_run, tmp_path / "bundle", options=options, dataset=small_dataset).bundle
    arguments = {"run": small_run, "max_rows": 2_000}
    found = verify(bundle.path, small_dataset, [small_log], **arguments)
    assert found.agrees
    assert {path.agreement.distinct > 1_950 for path in found.paths} == {True}
    round_logits(monkeypatch)
    found = verify(bundle.path, small_dataset, [small_log], **arguments)
    assert [path.name for path in found.paths if path.problem] == ["bundle"]
    assert "different probabilities in place of" in found.paths[-1].problem
    assert found.as_dict()["ways"][-1]["agrees"] is False


def test_a_damaged_checkpoint_is_not_exported(small_run, small_dataset, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    checkpoints = Run.open(run).checkpoints
    data = next(checkpoint_path(checkpoints, list_checkpoints(checkpoints)[-1]).glob("*.distcp"))
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(RunError, match="damaged"):
        export(run, tmp_path / "bundle", options=ExportOptions(name="small"), dataset=small_dataset)


def test_a_full_disk_is_reported_before_it_is_full(tmp_path):
    with pytest.raises(BundleError, match=r"the bundle needs 4,611,686 TB, and .* are free"):
        require_space(tmp_path, 2**62)


WATCHED_WRITE = """
import sys
from pathlib import Path
from torchdlrm.bundle.write import write_weights
from torchdlrm.training.checkpoint_reader import CheckpointReader

def anonymous_bytes():
    with Path("/proc/self/status").open() as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))

class Watching:
    peak = 0

    def start_phase(self, *_, **__):
        self.before = anonymous_bytes()

    def advance(self, *_, **__):
        self.peak = max(self.peak, anonymous_bytes() - self.before)

folder, watching = Path(sys.argv[1]), Watching()
write_weights(CheckpointReader(folder / "checkpoint"), {"big": "int8"}, folder / "weights.safetensors", watching)
print(watching.peak)
"""


def test_memory_is_for_a_block_of_rows_and_not_for_a_table(tmp_path):
    """A table of 256 MB in one shard becomes int8 in less than 150 MB."""
    rows, dim, name = 500_000, 128, table_weight("big")
    table = torch.arange(rows * dim, dtype=torch.float32).view(rows, dim).remainder_(1009)
    with pytest.warns(UserWarning, match="single process"):
        save({"model": {"model": {name: table}}}, storage_writer=FileSystemWriter(tmp_path / "checkpoint"))
    expected_row = table[rows - 1].clone()
    del table

    checkpoint = CheckpointReader(tmp_path / "checkpoint")
    assert torch.equal(checkpoint.gather(name, np.array([rows - 1]))[0], expected_row)
    # In a process of its own: one that has trained keeps the memory that it has freed, and would need no more.
    command = [sys.executable, "-c", WATCHED_WRITE, str(tmp_path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 150e6
