"""Several labels in one model: the same on any number of processes and when it is resumed; each label is judged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from helpers.days import last_state
from helpers.trainings import logged, losses
from torchdlrm import compare, evaluate, load_config, plan, train
from torchdlrm.config import config_toml
from torchdlrm.errors import ConfigError, DatasetError, RunError, UserError
from torchdlrm.evaluation.predictions import PredictedRows, write_predictions
from torchdlrm.evaluation.report import report_page, runs_page
from torchdlrm.judged import Judged
from torchdlrm.planning.plan import PlanRequest
from torchdlrm.training.run import Run

OWN_LOSS = Path(__file__).parents[2] / "examples" / "own_loss.py"
# Odd batches, of which two processes have 51 and 50 rows, and the second a row of padding; float32 as in world_size.
STEPS = {"train.batch_size_global": "101", "train.max_steps": "12", "logging.every_steps": "1"}
STEPS |= {"train.precision": "float32", "logging.tensorboard": "false"}
SUMMARY = [("best val auc", "click"), ("last val ne", "click"), ("last val ne", "purchase")]
PLE = {"train.labels": "click,purchase", "train.loss_weights": "uncertainty", "model.heads.after.purchase": "click"}
PLE |= {"model.heads.kind": "ple", "model.heads.num_experts": "2", "model.heads.num_shared_experts": "2"}
PLE |= {"model.heads.expert_layer_sizes": "16,8"}
LOG_VARIANCES = "model/loss.of_labels.log_variances"


@pytest.fixture(scope="module")
def ple_run(two_labels, tmp_path_factory):
    """The folder of a run of PLE in which a purchase comes after a click, its weights by uncertainty."""
    path = tmp_path_factory.mktemp("run") / "run"
    train(load_config("criteo-small", STEPS | PLE), two_labels, path)
    return path


def test_two_processes_train_what_one_does(ple_run, two_labels, dlrm, tmp_path):
    (tmp_path / "config.toml").write_text(config_toml(Run.open(ple_run).config))
    two = tmp_path / "two"
    done = dlrm("train", tmp_path / "config.toml", "--dataset", two_labels.path, "--run", two, "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name}, {label} " in done.stderr for name, label in SUMMARY)
    found, expected = (
        [[line["loss"], line["labels"]["purchase"]["loss"]] for line in logged(run, "train")] for run in (two, ple_run)
    )
    assert len(found) == 12
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(ple_run, two_labels, tmp_path):
    short = load_config("criteo-small", STEPS | PLE | {"train.max_steps": "5"})
    assert train(short, two_labels, tmp_path / "run").summary.step == 5
    assert train(Run.open(ple_run).config, two_labels, tmp_path / "run").summary.step == 12
    found, expected = last_state(tmp_path / "run", tmp_path), last_state(ple_run, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in found)
    assert found[LOG_VARIANCES].abs().min() > 0  # they have been learnt, and are in checkpoints


def test_each_label_is_judged_by_its_own_rows(ple_run, tmp_path):
    found = evaluate(ple_run, predictions=tmp_path / "rows.parquet", columns=["purchase"])  # is there anyway
    rows = pl.read_parquet(tmp_path / "rows.parquet")
    assert rows.columns == ["row", "label", "prediction", "logit", "purchase", "prediction_purchase", "logit_purchase"]
    for metrics, label, of in ((found, "label", ""), (found["labels"]["purchase"], "purchase", "_purchase")):
        labels, predictions = rows[label].to_numpy(), rows[f"prediction{of}"].to_numpy().astype(np.float64)
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, predictions), abs=1e-9)
        assert metrics["logloss"] == pytest.approx(log_loss(labels, predictions), abs=1e-6)
        assert metrics["clicks"] == labels.sum()
    assert (rows["prediction_purchase"] <= rows["prediction"]).all()
    judged = Judged.of(np.array([0, 1], np.uint8), np.array([0.5, 1.0]))
    twice = replace(PredictedRows.of("", judged, pl.DataFrame(), {}), others={"label": judged})
    with pytest.raises(UserError, match="label is a label, and what a column of the file's own is called"):
        write_predictions(twice, tmp_path / "twice.parquet")
    other = evaluate(ple_run, label="purchase")
    assert (other["label"], other["auc"]) == ("purchase", found["labels"]["purchase"]["auc"])
    assert other["labels"]["click"]["auc"] == found["auc"]
    (ple_run / "evaluation").mkdir(exist_ok=True)
    (ple_run / "evaluation" / "test.json").write_text(json.dumps(found))
    (ple_run / "evaluation" / "test.purchase.json").write_text(json.dumps(other))
    page = report_page(Run.open(ple_run))
    assert all(page.count(f">{text}<") == 1 for text in ("test, click", "test, purchase"))
    assert all(page.count(f"Learning curves, {label}</h2>") == 1 for label in ("click", "purchase"))
    copy = Run.open(shutil.copytree(ple_run, tmp_path / "copy"))
    page = runs_page([Run.open(ple_run), copy])
    headings = [f"Learning curves, {split}, {label}" for split in ("val", "train") for label in ("click", "purchase")]
    assert all(f"<h2>{heading}</h2>" in page for heading in headings)


def test_a_label_or_an_order_that_means_something_else_is_refused(ple_run, two_labels, tmp_path):
    with pytest.raises(ConfigError, match="purchas was not learnt; there is click, purchase; did you mean purchase"):
        evaluate(ple_run, label="purchas")
    with pytest.raises(ConfigError, match="has no label 'buy'; it has click, purchase"):
        train(load_config("criteo-small", STEPS | {"train.labels": "click,buy"}), two_labels, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"several are `train\.labels` = click,purchase"):
        train(load_config("criteo-small", STEPS | {"train.label": "click purchase"}), two_labels, tmp_path / "run")
    with pytest.raises(ConfigError, match="has no label 'purchas'"):
        plan(PlanRequest(dataset=two_labels.path), load_config("criteo-small", {"train.labels": "click,purchas"}))
    other = load_config("criteo-small", STEPS | PLE | {"train.labels": "purchase,click"})
    with pytest.raises(RunError, match=r"train.labels: was \['click', 'purchase'\], is \['purchase', 'click'\]"):
        train(other, two_labels, ple_run)
    with pytest.raises(RunError, match=r"train.labels: is \['purchase', 'click'\], and was \['click', 'purchase'\]"):
        train(other, two_labels, tmp_path / "warm", from_run=ple_run)


def test_a_list_of_one_label_trains_what_the_label_does(ple_run, two_labels, tmp_path):
    states = []
    for key in ("train.label", "train.labels"):
        train(
            load_config("criteo-small", STEPS | {key: "purchase", "train.max_steps": "3"}), two_labels, tmp_path / key
        )
        states.append(last_state(tmp_path / key, tmp_path))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(torch.as_tensor(states[0][name]), torch.as_tensor(states[1][name])) for name in states[0])
    with pytest.raises(DatasetError, match="by the labels click and purchase; `label` names one that both have"):
        compare(ple_run, tmp_path / "train.label", progress=False)


def test_a_loss_of_means_over_the_global_batch_is_the_same_on_two_processes(two_labels, dlrm, tmp_path):
    given, own = [word for key, value in STEPS.items() for word in (f"--{key}", value)], f"{OWN_LOSS}:RankedDLRM"
    for name, model_class in (("one", own), ("plain", None)):
        train(load_config("criteo-small", STEPS), two_labels, tmp_path / name, model_class=model_class)
    command = ("train", "criteo-small", "--dataset", two_labels.path, "--run", tmp_path / "two", *given)
    done = dlrm(*command, "--model-class", own, "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert max(np.abs(np.subtract(losses(tmp_path / "plain"), losses(tmp_path / "one")))) > 1e-3
