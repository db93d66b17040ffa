"""A model of somebody's own: a class in a file that trains, exports, predicts and is served like the DLRM itself."""

import json
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.config import load_config
from torchdlrm.errors import BundleError, RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.features.encode import encode
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

CODE = '''
import torch
from torch import nn
from torchdlrm import DLRM


class GatedSum(nn.Module):
    """[B, D] and [B, F, D] -> [B, 2 D]: the dense vector, and the embeddings added up, each behind a gate."""

    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__()
        self.gate = nn.Linear(embedding_dim, num_sparse_features)

    def forward(self, dense_features, sparse_features):
        gates_BF1 = torch.sigmoid(self.gate(dense_features)).unsqueeze(2)
        return torch.cat([dense_features, (gates_BF1 * sparse_features).sum(dim=1)], dim=1)


class GatedDLRM(DLRM):
    def make_interaction(self, num_sparse_features, embedding_dim):
        return GatedSum(num_sparse_features, embedding_dim), 2 * embedding_dim
'''
CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"
FAST = {"logging.tensorboard": "false", "train.max_steps": "8"}


@dataclass
class Trained:
    """What the tests of this file share: the file of the class, a run and its bundle."""

    file: Path
    run: Path
    bundle: Path

    @property
    def model_class(self):
        return f"{self.file}:GatedDLRM"


@pytest.fixture(scope="module")
def trained(small_dataset, dlrm, tmp_path_factory):
    """Two processes train it, so that what every process does is told of the class too."""
    folder = tmp_path_factory.mktemp("own")
    mine = Trained(folder / "my_models.py", folder / "run", folder / "bundle")
    mine.file.write_text(CODE)
    flags = [word for name, value in FAST.items() for word in (f"--{name}", value)]
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", mine.run, "--nproc-per-node", 2, *flags),
        *("--model-class", mine.model_class),
    )
    assert done.returncode == 0, done.stderr
    done = dlrm("export", mine.run, "--out", mine.bundle, "--model-class", mine.model_class, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["check"]["largest_difference"] <= 1e-6
    return mine


@pytest.fixture(scope="module")
def expected(trained, small_dataset):
    """Raw rows of the bundle's sample, and what the checkpoint predicts for them."""
    run = Run.open(trained.run)
    bundle = Bundle.open(trained.bundle)
    frame = bundle.sample()[0].head(50)
    rows = EncodedRows.from_frame(encode(frame, bundle.schema, bundle.dense, bundle.vocabularies), bundle.schema)
    shape = run.shape(small_dataset, trained.model_class)
    model = CheckpointModel(open_checkpoint(run, "best")[1], shape, small_dataset.num_embeddings)
    return frame, 1 / (1 + np.exp(-model.logits(rows).astype(np.float64)))


def test_its_parameters_are_trained(trained, small_dataset):
    reader = open_checkpoint(Run.open(trained.run), "best")[1]
    assert reader.shapes["inter_arch.gate.weight"] == (26, 16)
    dim = load_config(CONFIG).model.embedding_dim
    assert reader.shapes["over_arch.model.0._mlp.0._linear.weight"][1] == 2 * dim


def test_the_bundle_predicts_as_the_checkpoint(trained, expected):
    frame, probabilities = expected
    predictor = Predictor.open(trained.bundle, model_class=trained.model_class)
    np.testing.assert_allclose(predictor.predict(frame), probabilities, rtol=0, atol=1e-6)
    np.testing.assert_allclose(predictor.predict(frame.head(1)), probabilities[:1], rtol=0, atol=1e-6)


def test_the_server_predicts_as_the_checkpoint(trained, expected, serve):
    frame, probabilities = expected
    server = serve(trained.bundle, "--model-class", trained.model_class)
    rows = as_json_rows(frame, Bundle.open(trained.bundle).schema)
    answer = httpx.post(f"{server.url}/predict", json=rows).json()
    np.testing.assert_allclose(answer["predictions"], probabilities, rtol=0, atol=1e-6)


def test_the_commands_take_the_class(trained, small_dataset, small_log, dlrm, tmp_path):
    own = ("--model-class", trained.model_class)
    done = dlrm("evaluate", trained.run, *own, "--json")
    assert done.returncode == 0, done.stderr
    done = dlrm("predict", trained.bundle, small_log, *own, "--out", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    done = dlrm("verify", trained.bundle, small_log, "--dataset", small_dataset.path, "--rows", 500, *own, "--json")
    assert done.returncode == 0, done.stderr
    assert max(way["largest_difference"] or 0 for way in json.loads(done.stdout)["ways"]) <= 1e-6


def test_run_and_bundle_say_whose_they_are_and_hold_no_code(trained):
    for record in (
        json.loads((trained.run / "environment.json").read_text())["model_class"],
        json.loads((trained.bundle / "bundle.json").read_text())["model_class"],
    ):
        assert record["name"] == "my_models.py:GatedDLRM"
        assert len(record["sha256"]) == 64
    for path in (path for folder in (trained.run, trained.bundle) for path in folder.rglob("*") if path.is_file()):
        assert b"GatedSum" not in path.read_bytes()


@pytest.mark.parametrize("command", ["evaluate", "export", "predict", "serve"])
def test_without_the_class_one_sentence_says_what_to_give(trained, small_log, dlrm, tmp_path, command):
    arguments = {
        "evaluate": [trained.run],
        "export": [trained.run, "--out", tmp_path / "b"],
        "predict": [trained.bundle, small_log, "--out", tmp_path / "s.csv"],
        "serve": [trained.bundle, "--port", 0],
    }[command]
    done = dlrm(command, *arguments)
    assert done.returncode == 2
    assert "give --model-class my_models.py:GatedDLRM with the same file" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_bundle_can_be_inspected_without_the_class(trained, dlrm):
    done = dlrm("inspect", trained.bundle)
    assert done.returncode == 0, done.stderr
    assert "my_models.py:GatedDLRM" in done.stderr


def test_another_file_is_not_the_same_class(trained, small_dataset, tmp_path):
    other = tmp_path / "my_models.py"
    other.write_text(CODE.replace("torch.sigmoid", "torch.tanh"))
    with pytest.raises(BundleError, match=r"my_models\.py:GatedDLRM has changed since the bundle was written"):
        Predictor.open(trained.bundle, model_class=f"{other}:GatedDLRM")
    with pytest.raises(RunError, match="has changed since the run was written"):
        Run.open(trained.run).shape(small_dataset, f"{other}:GatedDLRM")


def test_the_dlrms_own_bundle_takes_no_class(small_bundle, trained):
    assert BundleManifest.read(small_bundle).format_version == 2
    with pytest.raises(BundleError, match=r"of the DLRM itself, got my_models\.py:GatedDLRM; leave it out"):
        Predictor.open(small_bundle, model_class=trained.model_class)


def test_a_run_is_resumed_with_its_class_alone(trained, small_dataset, tmp_path):
    config = load_config(CONFIG, FAST | {"train.max_steps": "2"})
    history = train(config, small_dataset, tmp_path / "run", model_class=trained.model_class)
    assert history.summary.step == 2
    more = load_config(CONFIG, FAST | {"train.max_steps": "4"})
    with pytest.raises(RunError, match=r"give `model_class` my_models\.py:GatedDLRM"):
        train(more, small_dataset, tmp_path / "run")
    assert train(more, small_dataset, tmp_path / "run", model_class=trained.model_class).summary.step == 4
