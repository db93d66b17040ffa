"""The benchmarks of the command run, on as little as they take; what they find is for a quiet machine."""

import json

import pytest


@pytest.mark.slow
def test_the_step_is_timed_beside_torchrec_and_the_floor(dlrm):
    options = ("--rounds", 1, "--steps-per-round", 1, "--num-tables", 2, "--rows-per-table", 100, "--json")
    done = dlrm("bench", "step", "criteo-small", "--nproc-per-node", 2, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_processes"] == 2
    assert found["rows_per_s"] == pytest.approx(found["ratio_to_torchrec"] * found["torchrec_rows_per_s"])
    assert found["floor_rows_per_s"] > 0
    assert found["host_ms"] > 0
    assert f"host: {found['host_ms']:.1f} ms a step" in done.stderr


def test_the_loader_is_timed(small_dataset, dlrm):
    done = dlrm("bench", "loader", small_dataset.path, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_per_s"] > 0
