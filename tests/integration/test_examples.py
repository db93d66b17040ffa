"""The examples run as they stand, in processes of their own, and do what they say."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from torchdlrm import Run, compare, evaluate

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "evaluate_and_compare": ["DATASET", "runs"],
    "own_loop": ["DATASET"],
    "predict_from_pandas": ["BUNDLE"],
    "train_with_callback": ["DATASET", "run"],
}


def run_example(name, folder, request):
    given = {"DATASET": "small_dataset", "BUNDLE": "small_bundle"}
    arguments = [request.getfixturevalue(given[one]) if one in given else one for one in ARGUMENTS[name]]
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *(str(getattr(value, "path", value)) for value in arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


def test_a_loop_of_ones_own_learns(request, tmp_path):
    auc = float(re.search(r"auc=([\d.]+)", run_example("own_loop", tmp_path, request))[1])
    assert auc > 0.6


def test_a_callback_is_told_of_every_interval_validation_and_checkpoint(request, tmp_path):
    output = run_example("train_with_callback", tmp_path, request)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for split, found in (("train", r"step (\d+): loss"), ("val", r"step (\d+): validation AUC")):
        assert list(map(int, re.findall(found, output))) == [line["step"] for line in lines if line["split"] == split]
    assert "saved to run/checkpoints/step-" in output


def test_a_pandas_frame_is_scored(request, tmp_path):
    output = run_example("predict_from_pandas", tmp_path, request)
    probabilities = [float(line.split()[-1]) for line in output.splitlines()[1:]]
    assert len(probabilities) == 2
    assert all(0 < value < 1 for value in probabilities)


@pytest.mark.slow
def test_two_runs_are_measured_and_compared(request, tmp_path):
    output = run_example("evaluate_and_compare", tmp_path, request)
    metrics = [evaluate(tmp_path / "runs" / f"dim-{dim}", split="test") for dim in (4, 16)]
    assert [f"{one['auc']:.4f}" for one in metrics] == re.findall(r"AUC (0\.\d+),", output)
    found = compare(Run.open(tmp_path / "runs" / "dim-4"), tmp_path / "runs" / "dim-16")
    for name in ("auc", "logloss"):
        assert getattr(found, name) == pytest.approx(metrics[1][name] - metrics[0][name], abs=1e-9)
    assert f"AUC {found.auc:+.4f} (standard error {found.auc_standard_error:.4f})" in output
