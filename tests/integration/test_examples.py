"""The examples run as they stand, in processes of their own, and do what they say."""

import json
import re
from pathlib import Path

import polars as pl
import pytest

from helpers.command_server import shared_server
from torchdlrm import compare, evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "content": ["."],
    "evaluate_and_compare": ["DATASET", "runs"],
    "finalnet": ["DATASET", "run"],
    "own_interaction": ["DATASET", "run"],
    "own_loss": ["DATASET", "run"],
    "own_loop": ["DATASET"],
    "own_sequence": ["HISTORIES", "run"],
    "predict_from_pandas": ["BUNDLE", "LOG"],
    "several_labels": ["TWO LABELS", "run"],
    "train_with_callback": ["DATASET", "run"],
}


def run_example(name, folder, request):
    given = {
        "DATASET": "small_dataset",
        "TWO LABELS": "two_labels",
        "HISTORIES": "histories",
        "BUNDLE": "small_bundle",
        "LOG": "small_log",
    }
    arguments = [request.getfixturevalue(given[one]) if one in given else one for one in ARGUMENTS[name]]
    arguments = [getattr(value, "path", value) for value in arguments]
    done = shared_server().run([EXAMPLES / f"{name}.py", *arguments], cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


def test_a_loop_of_ones_own_learns(request, tmp_path):
    auc = float(re.search(r"auc=([\d.]+)", run_example("own_loop", tmp_path, request))[1])
    assert auc > 0.6


@pytest.mark.parametrize("name", ["finalnet", "own_interaction", "own_loss"])
def test_a_model_of_ones_own_learns(request, tmp_path, name):
    auc = float(re.search(r"'auc': ([\d.]+)", run_example(name, tmp_path, request))[1])
    assert auc > 0.6


def test_an_interaction_of_ones_own_reads_what_a_user_did_last(request, tmp_path):
    auc = float(re.search(r"'auc': ([\d.]+)", run_example("own_sequence", tmp_path, request))[1])
    assert auc > 0.6


def test_both_labels_of_one_model_are_learnt(request, tmp_path):
    output = run_example("several_labels", tmp_path, request)
    found = {label: float(auc) for label, auc in re.findall(r"(click|purchase) ([\d.]+)", output)}
    assert found.keys() == {"click", "purchase"}
    assert min(found.values()) > 0.55


@pytest.mark.slow
def test_items_without_a_row_are_known_by_their_content(request, tmp_path):
    output = run_example("content", tmp_path, request)
    assert float(re.search(r"AUC ([\d.]+) of", output)[1]) > 0.65
    assert re.search(r"unknown content: \[ *0\.\d+ +0\.\d+ +0\.\d+ *\]", output)


def test_a_callback_is_told_of_every_interval_validation_and_checkpoint(request, tmp_path):
    output = run_example("train_with_callback", tmp_path, request)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for split, found in (("train", r"step (\d+): loss"), ("val", r"step (\d+): validation AUC")):
        assert list(map(int, re.findall(found, output))) == [line["step"] for line in lines if line["split"] == split]
    assert "saved to run/checkpoints/step-" in output


def test_a_pandas_frame_is_scored_as_the_log_is(request, tmp_path, dlrm, small_bundle, small_log):
    output = run_example("predict_from_pandas", tmp_path, request)
    log = tmp_path / "log.tsv"
    log.write_text("".join(small_log.read_text().splitlines(keepends=True)[:1000]))
    done = dlrm("predict", small_bundle, log, "--out", "scores.parquet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    scores = pl.read_parquet(tmp_path / "scores.parquet")["prediction"]
    assert re.findall(r"^\d+ +[01] +(\S+)$", output, re.MULTILINE) == [f"{score:.6f}" for score in scores.head(5)]
    assert f"mean probability {scores.mean():.3f}" in output


@pytest.mark.slow
def test_two_runs_are_measured_and_compared(request, tmp_path):
    output = run_example("evaluate_and_compare", tmp_path, request)
    metrics = [evaluate(tmp_path / "runs" / f"dim-{dim}", split="test") for dim in (4, 16)]
    assert [f"{one['auc']:.4f}" for one in metrics] == re.findall(r"AUC (0\.\d+),", output)
    found = compare(f"dim-4={tmp_path}/runs/dim-4", f"dim-16={tmp_path}/runs/dim-16")
    for name in ("auc", "logloss"):
        difference = found.differences["dim-16"][name].difference
        assert difference == pytest.approx(metrics[1][name] - metrics[0][name], abs=1e-9)
    assert str(found) in output
