"""A model of the user's: a class in a file that trains, exports, predicts and is served like the DLRM itself.

First an interaction arch in a file of some twenty lines, then a whole model: FinalNet of `examples/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
import torch

from helpers.trainings import state
from torchdlrm import ExportOptions, PlanRequest, compare, evaluate, export, plan, verify
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.served_model import ServedModel, _eager_forward
from torchdlrm.config import load_config
from torchdlrm.errors import BundleError, ConfigError, RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.features.encode import encode
from torchdlrm.files import sha256_of
from torchdlrm.model.precision import Precision
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

CODE = '''
import torch
from torch import nn


class GatedSum(nn.Module):
    """[B, D] and [B, F, D] -> [B, 2 D]: the dense vector, and the embeddings added up, each behind a gate."""

    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__()
        self.output_size = 2 * embedding_dim
        self.gate = nn.Linear(embedding_dim, num_sparse_features)

    def forward(self, dense_features, sparse_features):
        gates_BF1 = torch.sigmoid(self.gate(dense_features)).unsqueeze(2)
        return torch.cat([dense_features, (gates_BF1 * sparse_features).sum(dim=1)], dim=1)
'''
BY_NAME = """
import torch
from torchdlrm import DLRM


class ByName(DLRM):
    settings = {{"largest": 10.0, "feature": "cat_1"}}

    def __init__(self, features, feature, largest, **arguments):
        super().__init__(**arguments)
        self.largest, self.features = largest, {{one.name: one for one in features}}
        assert self.features[feature].num_ids == {ids}
        configs = arguments["embedding_bag_collection"].embedding_bag_configs()
        assert {{config.name: config.num_embeddings for config in configs}}["t_cat_2"] == {ids}
        assert self.sparse_arch.sparse_feature_names.index("cat_2") == 2

    def forward(self, dense_features, sparse_features):
        logits = super().forward(dense_features, sparse_features)
        logits = logits + super().forward(dense_features, sparse_features)
        if logits.abs().max() > self.largest:  # neither this nor the next line could be traced
            logits = logits / 2
        return logits + torch.zeros(dense_features.shape[0], 1)
"""
ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "criteo-small.toml"
FINALNET = f"{ROOT / 'examples' / 'finalnet.py'}:FinalNet"
FAST = {"logging.tensorboard": "false", "train.max_steps": "8"}


@dataclass
class Trained:
    """What the tests of this file share: the file of the class, a run and its bundle."""

    file: Path
    run: Path
    bundle: Path

    @property
    def model_class(self):
        return f"{self.file}:GatedSum"


@pytest.fixture(scope="module")
def trained(small_dataset, dlrm, tmp_path_factory):
    """Two processes train it, so that every process has the class."""
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


@pytest.fixture
def changed(trained, tmp_path):
    """The class in a file that is another one, and computes the same."""
    other = tmp_path / "my_models.py"
    other.write_text(CODE + "# a remark\n")
    return f"{other}:GatedSum"


@pytest.fixture(scope="module")
def expected(trained, small_dataset):
    """Raw rows of the bundle's sample, and what the checkpoint predicts for them."""
    run = Run.open(trained.run)
    bundle = Bundle.open(trained.bundle)
    frame = bundle.sample()[0].head(50)
    rows = EncodedRows.from_frame(encode(frame, bundle.schema, bundle.dense, bundle.vocabularies), bundle.schema)
    shape = run.shape(small_dataset, trained.model_class)
    model = CheckpointModel(open_checkpoint(run, "best")[1], shape)
    return frame, 1 / (1 + np.exp(-model.logits(rows).astype(np.float64)))


def test_the_server_predicts_as_the_checkpoint(trained, expected, serve):
    frame, probabilities = expected
    server = serve(trained.bundle, "--model-class", trained.model_class)
    rows = as_json_rows(frame, Bundle.open(trained.bundle).schema)
    answer = httpx.post(f"{server.url}/predict", json=rows).json()
    np.testing.assert_allclose(answer["predictions"], probabilities, rtol=0, atol=1e-6)


def test_the_commands_take_the_class(trained, small_dataset, small_log, dlrm, tmp_path):
    own = ("--model-class", trained.model_class)
    done = dlrm("plan", "--run", trained.run, "--devices", 2, *own, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tables"] == json.loads((trained.run / "plan.json").read_text())["tables"]
    done = dlrm("evaluate", trained.run, *own, "--json")
    assert done.returncode == 0, done.stderr
    done = dlrm("predict", trained.bundle, small_log, *own, "--out", tmp_path / "scores.csv")
    assert done.returncode == 0, done.stderr
    done = dlrm("verify", trained.bundle, small_log, "--dataset", small_dataset.path, "--rows", 500, *own, "--json")
    assert done.returncode == 0, done.stderr
    assert max(way["largest_difference"] or 0 for way in json.loads(done.stdout)["ways"]) <= 1e-6


def test_a_class_may_pick_a_feature_by_name_and_be_written_in_any_python(small_dataset, dlrm, tmp_path):
    """It checks how many ids there are, as one does that reads vectors of a feature from a file; on two processes."""
    file = tmp_path / "by_name.py"
    file.write_text(BY_NAME.format(ids=small_dataset.num_embeddings["cat_2"]))
    own = {"model_class": f"{file}:ByName"}
    divided = {"model.features.cat_9.quotient_remainder": "add", "model.features.cat_2.embedding_dim": "4"}
    divided |= {"model.settings.feature": "cat_2", "model.settings.largest": "30"}
    config = load_config(CONFIG, FAST | divided)
    asked = PlanRequest(dataset=small_dataset.path, **own)
    assert plan(asked, config, measure=True).problem.measured.compute_ms > 0
    flags = [word for name, value in (FAST | divided).items() for word in (f"--{name}", value)]
    command = (
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", tmp_path / "run", *flags),
        *("--nproc-per-node", 2, "--train.batch-size-global", 63, "--model-class", own["model_class"]),
    )
    done = dlrm(*command)
    assert done.returncode == 0, done.stderr
    other = dlrm(*command, "--model.settings.largest", "31")  # the last one counts
    assert other.returncode == 2, other.stderr
    assert "model.settings.largest" in other.stderr, other.stderr
    features = plan(PlanRequest(run=tmp_path / "run", **own)).problem.shape.features
    assert next(feature for feature in features if feature.name == "cat_2").num_ids > 1
    bundle = export(tmp_path / "run", tmp_path / "bundle", **own).bundle
    assert bundle.manifest.check.largest_difference <= 1e-6
    assert bundle.manifest.model.settings == {"feature": "cat_2", "largest": 30}


def test_a_class_that_padding_breaks_is_refused_before_anything_is_trained(small_dataset, dlrm, tmp_path):
    file = tmp_path / "cosine.py"
    divided = "gates_BF1 * sparse_features / sparse_features.norm(dim=2, keepdim=True)"
    file.write_text(CODE.replace("gates_BF1 * sparse_features", divided))
    own = f"{file}:GatedSum"
    with pytest.raises(ConfigError, match="a row of padding"):
        plan(PlanRequest(dataset=small_dataset.path, devices=8, device="a100-80gb", model_class=own))
    done = dlrm("train", CONFIG, "--dataset", small_dataset.path, "--run", tmp_path / "run", "--model-class", own)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --model-class: cosine.py:GatedSum fails (line 16)")
    assert not (tmp_path / "run").exists()


def test_its_run_is_compared_with_one_of_the_dlrm(trained, small_run):
    found = compare(small_run, f"own={trained.run}", model_class=f"zoo/fcn.py:FCN,{trained.model_class}")
    metrics = [evaluate(small_run), evaluate(trained.run, model_class=trained.model_class)]
    difference = found.differences["own"]["auc"].difference
    assert difference == pytest.approx(metrics[1]["auc"] - metrics[0]["auc"], abs=1e-9)


def test_run_and_bundle_say_whose_they_are_without_the_class_and_hold_no_code(trained, dlrm):
    done = dlrm("inspect", trained.bundle)
    assert done.returncode == 0, done.stderr
    assert "my_models.py:GatedSum" in done.stderr
    for record in (
        json.loads((trained.run / "environment.json").read_text())["model_class"],
        json.loads((trained.bundle / "bundle.json").read_text())["model_class"],
    ):
        assert record["name"] == "my_models.py:GatedSum"
        assert len(record["sha256"]) == 64
    for path in (path for folder in (trained.run, trained.bundle) for path in folder.rglob("*") if path.is_file()):
        assert b"nn.Linear" not in path.read_bytes()


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
    assert "give --model-class my_models.py:GatedSum with the same file" in done.stderr
    assert "Traceback" not in done.stderr


def test_another_file_is_not_the_same_class(trained, small_dataset, changed):
    with pytest.raises(BundleError, match=r"my_models\.py:GatedSum has changed since the bundle was written"):
        Predictor.open(trained.bundle, model_class=changed)
    with pytest.raises(RunError, match="has changed since the run was written"):
        Run.open(trained.run).shape(small_dataset, changed)


def test_another_file_is_taken_where_that_is_allowed(trained, expected, small_dataset, small_log, changed, tmp_path):
    allowed = {"model_class": changed, "allow_changed_model_class": True}
    frame, probabilities = expected
    predictor = Predictor.open(trained.bundle, **allowed)
    np.testing.assert_allclose(predictor.predict(frame), probabilities, rtol=0, atol=1e-6)
    evaluate(trained.run, **allowed)
    verify(trained.bundle, small_dataset, [small_log], run=trained.run, max_rows=100, **allowed)
    plan(PlanRequest(run=trained.run, **allowed), load_config(CONFIG))
    exported = export(trained.run, tmp_path / "bundle", **allowed).bundle
    assert exported.manifest.model_class.sha256 == sha256_of(Path(changed.partition(":")[0]))


def test_the_commands_allow_another_file(trained, small_log, changed, dlrm, tmp_path):
    own = ("--model-class", changed)
    done = dlrm("predict", trained.bundle, small_log, *own, "--out", tmp_path / "scores.csv")
    assert done.returncode == 2
    assert "give the file as it was, or --allow-changed-model-class where" in done.stderr
    for command in (
        ("predict", trained.bundle, small_log, "--out", tmp_path / "scores.csv"),
        ("evaluate", trained.run),
        ("train", CONFIG, "--dataset", Run.open(trained.run).open_dataset().path, "--run", trained.run, "--dry-run"),
    ):
        done = dlrm(*command, *own, "--allow-changed-model-class")
        assert done.returncode == 0, done.stderr
    assert "changed since the run was started: the file of my_models.py:GatedSum: was sha256" in done.stderr


def test_what_is_served_in_bfloat16_is_what_autocast_computes_but_for_the_last_layer(trained, expected, small_dataset):
    bundle = Bundle.open(trained.bundle, model_class=trained.model_class)
    encoded = encode(expected[0], bundle.schema, bundle.dense, bundle.vocabularies)
    rows = EncodedRows.from_frame(encoded, bundle.schema)
    shape = Run.open(trained.run).shape(small_dataset, trained.model_class)
    model = CheckpointModel(open_checkpoint(Run.open(trained.run), "best")[1], shape)
    inputs = []
    last = model._model.module.over_arch.model[1]
    last.register_forward_hook(lambda _, given, __: inputs.append(given[0].float()))
    forward, precision = _eager_forward(bundle, Precision(torch.bfloat16, "asked"))
    with torch.inference_mode():
        served = forward(rows)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            pooled = torch.cat([model.pooled(rows, i, "float32") for i in range(26)], dim=1)
            ids, lengths = map(torch.from_numpy, rows.flat()[:2])
            model._model.logits(torch.from_numpy(rows.dense), ids, lengths, pooled)
        expected_logits = torch.nn.functional.linear(inputs[0], last.weight, last.bias).squeeze(1)
    assert precision.dtype == torch.bfloat16
    assert served.dtype == torch.float32
    assert torch.equal(served, expected_logits)


FORMS = """
import torch
from torch import nn

from torchdlrm import DLRM


class Ended(DLRM):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.heads, self.scale = nn.Linear(128, 8), nn.Linear(16, 16)
        self.vector = nn.Parameter(torch.randn(128, 1) / 10)

    def forward(self, dense_features, sparse_features):
        dense = self.dense_arch(dense_features)
        sparse = self.sparse_arch(sparse_features)
        hidden = self.over_arch.model[0](self.inter_arch(dense_features=dense, sparse_features=sparse))
        return self.end(dense, hidden)


class Heads(Ended):
    def end(self, dense, hidden):
        return self.heads(hidden).mean(dim=1, keepdim=True)


class Summed(Ended):
    def end(self, dense, hidden):
        return (hidden * self.vector[:, 0]).sum(dim=1, keepdim=True)


class Product(Ended):
    def end(self, dense, hidden):
        return hidden @ self.vector


class Island(Ended):
    def end(self, dense, hidden):
        with torch.autocast("cpu", enabled=False):
            scale = self.scale(dense.float()) @ torch.eye(16)
        return self.over_arch.model[1](hidden) * torch.sigmoid(scale.mean(dim=1, keepdim=True))


class Mistaken(Ended):
    def end(self, dense, hidden):
        return self.scale(hidden) if torch.is_autocast_enabled("cpu") else self.heads(hidden)[:, :1]
"""


@pytest.fixture(scope="module")
def train_form(small_dataset, tmp_path_factory):
    """Trains a model of FORMS for some steps: its class and its run."""
    folder = tmp_path_factory.mktemp("forms")
    (folder / "forms.py").write_text(FORMS)

    def trained_form(name):
        model_class, run = f"{folder / 'forms.py'}:{name}", folder / name
        train(load_config(CONFIG, FAST | {"train.precision": "float32"}), small_dataset, run, model_class=model_class)
        return model_class, run

    return trained_form


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *(("Heads", "bfloat16"), ("Summed", "bfloat16"), ("Island", "bfloat16")),
        ("Product", "float32"),  # autocast would round what it gives
    ],
)
def test_bfloat16_rounds_no_logit_in_whatever_form_it_comes(name, precision, train_form, small_dataset, tmp_path):
    model_class, run = train_form(name)
    options = ExportOptions(precision="int8", dense_precision="bfloat16")
    bundle = export(run, tmp_path / "bundle", options=options, model_class=model_class).bundle
    frame = pl.concat([pl.read_parquet(file.path) for file in small_dataset.splits["train"].files])
    rows = EncodedRows.from_frame(frame, bundle.schema)
    exact, served = ServedModel(bundle, "float32"), ServedModel(bundle)
    assert served.dense_precision == precision
    expected, got = exact.predict(rows), served.predict(rows)
    assert len(np.unique(got)) >= 0.99 * len(np.unique(expected)) >= 0.9 * len(expected)
    assert np.median(np.abs(got / expected - 1)) < 0.005
    np.testing.assert_allclose(got, expected, rtol=0.05)


def test_what_fails_in_an_export_alone_is_reported_with_its_line(train_form, dlrm, tmp_path):
    model_class, run = train_form("Mistaken")
    line = next(number for number, text in enumerate(FORMS.splitlines(), start=1) if "is_autocast_enabled" in text)
    done = dlrm("export", run, "--out", tmp_path / "b", "--model-class", model_class, "--dense-precision", "bfloat16")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: --model-class: forms.py:Mistaken fails (line {line}): ")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "b").exists()


def test_the_dlrms_own_bundle_takes_no_class(small_bundle, trained):
    assert BundleManifest.read(small_bundle).format_version == 2
    with pytest.raises(BundleError, match=r"of the DLRM itself, got my_models\.py:GatedSum; leave it out"):
        Predictor.open(small_bundle, model_class=trained.model_class)


def test_a_run_is_resumed_with_its_class_alone_and_with_another_file_it_is_of_that_one(
    trained, small_dataset, changed, tmp_path
):
    """With the same file: below, to the byte."""
    first, more = (load_config(CONFIG, FAST | {"train.max_steps": str(number)}) for number in (1, 2))
    run = tmp_path / "run"
    assert train(first, small_dataset, run, model_class=trained.model_class).summary.step == 1
    with pytest.raises(RunError, match=r"give `model_class` my_models\.py:GatedSum"):
        train(more, small_dataset, run)
    allowed = train(more, small_dataset, run, model_class=changed, allow_changed_model_class=True)
    assert allowed.summary.step == 2
    Run.open(run).shape(small_dataset, changed)
    with pytest.raises(RunError, match="has changed since the run was written"):
        Run.open(run).shape(small_dataset, trained.model_class)


def test_weights_that_a_changed_class_does_not_have_are_not_left_out(trained, small_dataset, tmp_path):
    other = tmp_path / "my_models.py"
    other.write_text(CODE.replace("num_sparse_features)\n\n", "num_sparse_features, bias=False)\n\n"))
    allowed = {"model_class": f"{other}:GatedSum", "allow_changed_model_class": True}
    with pytest.raises(BundleError, match=r"the model has no inter_arch\.gate\.bias"):
        Predictor.open(trained.bundle, **allowed)
    environment = (trained.run / "environment.json").read_text()
    with pytest.raises(RunError, match=r"cannot be loaded: .*the model has no model\.inter_arch\.gate\.bias"):
        train(load_config(trained.run / "config.toml"), small_dataset, trained.run, **allowed)
    assert (trained.run / "environment.json").read_text() == environment
    with pytest.raises(RunError, match=r"cannot be loaded: .*the model has no model\.inter_arch\.gate\.bias"):
        evaluate(trained.run, **allowed)


@pytest.fixture(scope="module")
def finalnets(small_dataset, dlrm, tmp_path_factory):
    """FinalNet by one process and by two, on batches that cannot be halved: half of them end with padding."""
    folder = tmp_path_factory.mktemp("finalnet")
    for nproc in (1, 2):
        done = dlrm(
            *("train", CONFIG, "--dataset", small_dataset.path, "--run", folder / str(nproc)),
            *("--nproc-per-node", nproc, "--train.batch-size-global", 301, "--train.max-steps", 6),
            *("--train.precision", "float32"),
            *("--dense-optimizer.name", "sgd"),  # whose steps are as small as the gradients that rounding makes
            *("--logging.every-steps", 1, "--logging.tensorboard", "false", "--model-class", FINALNET),
        )
        assert done.returncode == 0, done.stderr
    return folder


def finalnet_state(run, tmp_path):
    return {name: value for name, value in state(run, tmp_path, step=6).items() if isinstance(value, torch.Tensor)}


@pytest.mark.slow
def test_batch_norm_and_auxiliary_losses_are_the_same_on_two_processes(finalnets, tmp_path):
    one, two = (finalnet_state(finalnets / nproc, tmp_path) for nproc in ("1", "2"))
    assert one.keys() == two.keys()
    statistics = [name for name in one if "running_" in name]
    assert len(statistics) == 8
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=2e-5, rtol=2e-4, msg=name)
    for name in statistics:
        assert not torch.equal(one[name], torch.full_like(one[name], float(name.endswith("var"))))


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_to_the_byte(finalnets, small_dataset, tmp_path):
    for steps in ("3", "6"):
        overrides = {"train.batch_size_global": "301", "train.max_steps": steps, "dense_optimizer.name": "sgd"}
        overrides["train.precision"] = "float32"
        config = load_config(CONFIG, overrides | {"logging.tensorboard": "false"})
        train(config, small_dataset, tmp_path / "run", model_class=FINALNET)
    resumed, uninterrupted = finalnet_state(tmp_path / "run", tmp_path), finalnet_state(finalnets / "1", tmp_path)
    assert resumed.keys() == uninterrupted.keys()
    assert all(torch.equal(resumed[name], uninterrupted[name]) for name in resumed)


@pytest.mark.slow
def test_what_is_logged_is_the_loss_of_the_logits_alone(finalnets):
    """The auxiliary losses of a fresh model are log 2 each."""
    first = json.loads((finalnets / "1" / "metrics.jsonl").read_text().splitlines()[0])
    assert 0.4 < first["loss"] < 1.0


@pytest.mark.slow
def test_a_whole_models_bundle_predicts_as_its_checkpoint(finalnets, tmp_path):
    bundle = export(finalnets / "2", tmp_path / "bundle", model_class=FINALNET).bundle
    assert bundle.manifest.check.largest_difference <= 1e-6
    assert bundle.weights.shapes["gated_block.1.running_var"] == (256,)
