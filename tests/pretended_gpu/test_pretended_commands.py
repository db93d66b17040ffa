"""Every command that touches a GPU, on one and on two pretended ones. No number in here counts."""

import json

import numpy as np
import pytest

pytestmark = pytest.mark.parametrize("num_gpus", [1, 2])


def succeeded(done):
    assert done.returncode == 0, done.stderr
    return done


def test_a_run_trains_on_gpus_and_saves_itself_meanwhile(num_gpus, gpu_runs):
    path, summary, _ = gpu_runs(num_gpus)
    plan = json.loads((path / "plan.json").read_text())
    assert summary["step"] == 20
    assert plan["machine"]["device"] == "h100-80gb"
    saved = {int(folder.name.rpartition("-")[2]) for folder in (path / "checkpoints").iterdir()}
    assert {16, 20} <= saved  # 16 was written while it trained


def test_libraries_say_nothing_to_users(num_gpus, gpu_runs):
    _, _, done = gpu_runs(num_gpus)
    noise = [line for line in done.stderr.splitlines() if "Warning" in line or "WARNING" in line or "[rank" in line]
    assert noise == []


def test_a_run_resumes(num_gpus, gpu_runs, on_gpus, train_args, small_dataset, tmp_path):
    path = tmp_path / "run"
    succeeded(on_gpus(num_gpus, *train_args(small_dataset, path, num_gpus, max_steps=10)))
    done = succeeded(on_gpus(num_gpus, *train_args(small_dataset, path, num_gpus, max_steps=14), "--json"))
    told = json.loads(done.stdout.splitlines()[-1])
    assert (told["resumed_from_step"], told["step"]) == (10, 14)


def test_a_run_is_evaluated(num_gpus, gpu_runs, on_gpus):
    path, _, _ = gpu_runs(num_gpus)
    done = succeeded(on_gpus(num_gpus, "evaluate", path, "--nproc-per-node", num_gpus, "--json"))
    assert json.loads(done.stdout.splitlines()[-1])["rows"] > 0


def test_a_run_is_evaluated_on_fewer_gpus_than_trained(num_gpus, gpu_runs, on_gpus):
    path, _, _ = gpu_runs(num_gpus)
    other = 3 - num_gpus
    succeeded(on_gpus(other, "evaluate", path, "--nproc-per-node", other))


def test_a_run_is_profiled(num_gpus, on_gpus, train_args, small_dataset, tmp_path):
    path = tmp_path / "run"
    args = train_args(small_dataset, path, num_gpus, max_steps=40)
    succeeded(on_gpus(num_gpus, *args, "--profile"))
    traces = {trace.name for trace in (path / "profile").glob("rank-*.json")}
    assert traces == {f"rank-{rank}.json" for rank in range(num_gpus)}
    assert json.loads((path / "profile" / "summary.json").read_text())


def test_steps_are_benchmarked(num_gpus, on_gpus):
    rounds = ("--rounds", 1, "--steps-per-round", 2, "--rows-per-table", 1000)
    done = succeeded(on_gpus(num_gpus, "bench", "step", *rounds, "--nproc-per-node", num_gpus, "--json"))
    assert json.loads(done.stdout)["num_processes"] == num_gpus


def test_a_plan_measures_the_machine(num_gpus, on_gpus, small_dataset):
    what = ("--dataset", small_dataset.path, "--device", "here", "--devices", num_gpus)
    done = succeeded(on_gpus(num_gpus, "plan", "criteo-small", *what, "--measure", "--json"))
    assert json.loads(done.stdout)["machine"]["source"] == "measured on this machine"


def test_a_run_becomes_a_bundle_that_predicts(num_gpus, gpu_runs, on_gpus, small_log, tmp_path):
    path, _, _ = gpu_runs(num_gpus)
    bundle, scores = tmp_path / "bundle", tmp_path / "scores.csv"
    succeeded(on_gpus(num_gpus, "export", path, "--out", bundle))
    succeeded(on_gpus(num_gpus, "predict", bundle, small_log, "--out", scores))
    assert np.isfinite(np.loadtxt(scores, delimiter=",", skiprows=1, usecols=-1)).all()
