"""A host with the CUDA builds and no driver (a login node, a build of an image): what needs no GPU works there."""

import json
import urllib.request

import numpy as np


def succeeded(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_plan_for_gpus_is_made(without_driver, small_dataset):
    where = ("--dataset", small_dataset.path, "--device", "h100-80gb", "--devices", 8)
    plan = json.loads(succeeded(without_driver("plan", *where, "--json")).stdout)
    assert (plan["machine"]["device"], plan["world_size"]) == ("h100-80gb", 8)


def test_a_training_on_the_processor_is_looked_at(without_driver, small_dataset, tmp_path):
    where = ("--dataset", small_dataset.path, "--run", tmp_path / "run", "--train.device", "cpu")
    succeeded(without_driver("train", "criteo-small", *where, "--dry-run"))


def test_a_run_of_gpus_is_exported_predicts_and_serves(without_driver, gpu_runs, small_log, tmp_path, serve):
    path, _, _ = gpu_runs(1)
    bundle, scores = tmp_path / "bundle", tmp_path / "scores.csv"
    succeeded(without_driver("export", path, "--out", bundle))
    succeeded(without_driver("predict", bundle, small_log, "--out", scores))
    assert np.isfinite(np.loadtxt(scores, delimiter=",", skiprows=1, usecols=-1)).all()
    server = serve(bundle, **without_driver.environment)
    with urllib.request.urlopen(f"{server.url}/v2/health/ready", timeout=60) as answer:
        assert answer.status == 200
    assert server.stop()[0] == 0
