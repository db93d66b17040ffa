"""A host with the CUDA builds and no driver (a login node, a build of an image): what needs no GPU works there."""

import numpy as np


def succeeded(done):
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def test_a_plan_for_gpus_is_made(without_driver, small_dataset):
    done = succeeded(without_driver("plan", "--dataset", small_dataset.path, "--device", "h100-80gb", "--devices", 8))
    assert "h100-80gb" in done.stdout


def test_a_run_of_gpus_is_exported_and_predicts(without_driver, gpu_runs, small_log, tmp_path):
    path, _, _ = gpu_runs(1)
    bundle, scores = tmp_path / "bundle", tmp_path / "scores.csv"
    succeeded(without_driver("export", path, "--out", bundle))
    succeeded(without_driver("predict", bundle, small_log, "--out", scores))
    assert np.isfinite(np.loadtxt(scores, delimiter=",", skiprows=1, usecols=-1)).all()
