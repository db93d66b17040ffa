"""Raw rows by file, by JSON and over HTTP are predicted as the checkpoint does after the preprocessing job."""

import itertools
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest

from conftest import real_log
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.preprocess import PreprocessOptions, preprocess
from torchdlrm.export.checkpoint_model import CheckpointModel
from torchdlrm.export.encoded_rows import EncodedRows
from torchdlrm.export.export import ExportOptions, export, open_checkpoint
from torchdlrm.predict.cells_out import as_json_rows
from torchdlrm.predict.files import predict_file
from torchdlrm.predict.predictor import Predictor
from torchdlrm.predict.rows_in import RowsIn
from torchdlrm.schema import criteo_schema, with_split
from torchdlrm.training.run import Run

CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"


def by_checkpoint(run, dataset, log, folder):
    """Of all rows in the order of the log, but for a few first ones, the training rows; and how many these are."""
    schema = with_split(criteo_schema(), "order", val=0.0, test=0.9997)
    options = PreprocessOptions(vocabulary=dataset.path)
    ordered = Dataset.open(preprocess([log], folder / "ordered", schema, options).path)
    files = (file.path for split in ("train", "test") for file in ordered.splits[split].files)
    frame = pl.concat(pl.read_parquet(path) for path in files)
    _, checkpoint = open_checkpoint(Run.open(run), "last")
    model = CheckpointModel(checkpoint, Run.open(run).config.model, dataset)
    rows = EncodedRows.from_frame(frame, dataset.schema)
    logits = np.concatenate([model.logits(rows.part(i, i + 2_048)) for i in range(0, rows.num_rows, 2_048)])
    return 1 / (1 + np.exp(-logits.astype(np.float64))), ordered.splits["train"].rows


def by_file(bundle, log, folder):
    predictor = Predictor.open(bundle)
    rows = RowsIn([log], predictor.schema, chunk_bytes=300_000)
    assert predict_file(predictor, rows, folder / "scores.parquet").bad_rows == 0
    return pl.read_parquet(folder / "scores.parquet")["prediction"].to_numpy()


def by_json(bundle, log, folder):
    predictor = Predictor.open(bundle)
    found = []
    for chunk in RowsIn([log], predictor.schema):
        rows = as_json_rows(chunk.frame, predictor.schema)
        parts = (predictor.parse_rows(rows[start : start + 997]) for start in range(0, len(rows), 997))
        found += [predictor.predict(part).probabilities for part in parts]
    return np.concatenate(found)


def by_http(server, bundle, log):
    """Requests of 1 to 40 rows: few and many take different ways through the server."""
    predictor = Predictor.open(bundle)
    found, size = [], itertools.cycle(range(1, 41))
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for chunk in RowsIn([log], predictor.schema):
            rows = as_json_rows(chunk.frame, predictor.schema)
            while rows:
                taken = next(size)
                answer = client.post("/predict", json=rows[:taken])
                assert answer.status_code == 200, answer.text
                found += answer.json()["predictions"]
                rows = rows[taken:]
    return np.array(found)


def assert_no_skew(serve, bundle, run, dataset, log, folder):
    expected, few = by_checkpoint(run, dataset, log, folder)
    assert expected.std() > 0.01
    assert few < 8
    server = serve(bundle, "--log-level", "warning")
    ways = (by_file(bundle, log, folder), by_json(bundle, log, folder), by_http(server, bundle, log))
    server.stop()
    for found in ways:
        np.testing.assert_allclose(found[few:], expected[few:], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.sort(found[:few]), np.sort(expected[:few]), rtol=0, atol=1e-6)


def test_every_row_of_a_synthetic_log(serve, small_bundle, small_run, small_dataset, small_log, tmp_path):
    assert_no_skew(serve, small_bundle, small_run, small_dataset, small_log, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["criteo_kaggle_sample.tsv.gz", "criteo_1tb_day_0_sample.tsv.gz"])
def test_every_row_of_the_real_samples(name, serve, dlrm, tmp_path):
    log = real_log(name)
    dataset = preprocess([log], tmp_path / "dataset", criteo_schema(), PreprocessOptions(min_count=2))
    run = tmp_path / "run"
    options = ["--train.batch-size-global", 512, "--logging.tensorboard", "false"]
    done = dlrm("train", CONFIG, "--dataset", dataset.path, "--run", run, *options)
    assert done.returncode == 0, done.stderr
    export(Run.open(run), dataset, tmp_path / "bundle", ExportOptions("real"))
    assert_no_skew(serve, tmp_path / "bundle", run, dataset, log, tmp_path)
