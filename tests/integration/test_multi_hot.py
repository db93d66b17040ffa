"""From `dlrm synthesize --multi-hot` to a trained DCN with the shape of MLPerf's, in two processes."""

import json

import pyarrow.parquet as pq
import pytest

from torchdlrm.data.dataset import Dataset
from torchdlrm.synthetic.log import schema_path, truth_path
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, PRESETS

NUM_ROWS, MAX_EMBEDDINGS = 1_400, 500
# Everything else is as the config has it, but for sizes that would take a minute and not a second.
SMALL = (
    *("--model.embedding-dim", 8, "--model.dense-arch-layer-sizes", "16,8"),
    *("--model.over-arch-layer-sizes", "16,1", "--model.dcn.low-rank-dim", 8),
    *("--train.batch-size-global", 256, "--train.device", "cpu", "--logging.tensorboard", "false"),
)


@pytest.fixture(scope="module")
def log(dlrm, tmp_path_factory):
    path = tmp_path_factory.mktemp("multi-hot") / "log.tsv"
    cut = ("--max-embeddings", MAX_EMBEDDINGS)
    done = dlrm("synthesize", "--multi-hot", "--rows", NUM_ROWS, *cut, "--out", path, "--json")
    assert done.returncode == 0, done.stderr
    assert f"dlrm preprocess {path} --schema {schema_path(path)} --out dataset" in done.stderr
    assert json.loads(done.stdout) == {
        "log": str(path),
        "truth": str(truth_path(path)),
        "schema": str(schema_path(path)),
        **json.loads(truth_path(path).read_text()),
    }
    assert (json.loads(done.stdout)["preset"], json.loads(done.stdout)["multi_hot"]) == ("criteo-1tb", "uniform")
    return path


@pytest.fixture(scope="module")
def dataset(log, dlrm):
    path = log.with_name("dataset")
    done = dlrm("preprocess", log, "--schema", schema_path(log), "--out", path)
    assert done.returncode == 0, done.stderr
    return Dataset.open(path)


def test_the_dataset_has_the_benchmarks_tables_and_numbers_of_ids(dataset):
    cardinalities = [column.cardinality for column in PRESETS["criteo-1tb"].sparse]
    assert list(dataset.num_embeddings.values()) == [min(rows, MAX_EMBEDDINGS) for rows in cardinalities]
    for split in ("train", "val", "test"):
        for file in dataset.splits[split].files:
            table = pq.read_table(file.path)
            for name, size in zip(dataset.sparse_names, MULTI_HOT_SIZES, strict=True):
                ids = table[name].to_pylist()
                assert {len(cell) if isinstance(cell, list) else 1 for cell in ids} == {size}


def test_the_preset_trains_on_it_in_two_processes_as_in_one(dataset, dlrm, tmp_path):
    losses = []
    for nproc in (1, 2):
        run = tmp_path / f"run-{nproc}"
        arguments = ("--dataset", dataset.path, "--run", run, "--nproc-per-node", nproc, "--json")
        done = dlrm("train", "criteo-1tb-dcn", *arguments, *SMALL)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["rows"] == dataset.splits["train"].rows
        text = (run / "config.toml").read_text()
        assert all(setting in text for setting in ('interaction = "dcn"', 'name = "adagrad"', "learning_rate = 0.004"))
        losses.append([line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
