"""The benchmarks of the command run, on as little as they take; what they find is for a quiet machine."""

import json
import os
from pathlib import Path

import psutil
import pytest
import torch

from torchdlrm.bench.interleaved import busy_processes

STEP = ("bench", "step", "criteo-small", "--rounds", 1, "--num-tables", 2, "--rows-per-table", 100, "--json")


@pytest.mark.thorough
def test_the_step_is_timed_beside_others_and_by_part_while_the_machine_is_busy(dlrm):
    done = dlrm(*STEP, "--steps-per-round", 2, "--busy", 1, "--parts", timeout_s=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["num_processes"], found["num_busy_processes"]) == (1, 1)
    assert "beside 1 busy process(es)" in done.stderr
    assert found["rows_per_s"] == pytest.approx(found["ratio_to_torchrec"] * found["torchrec_rows_per_s"])
    assert found["rows_per_s"] == pytest.approx(found["ratio_to_plain_torch"] * found["plain_torch_rows_per_s"])
    assert found["floor_rows_per_s"] > 0
    assert found["host_ms"] > 0
    assert f"host: {found['host_ms']:.2f} ms a step" in done.stderr
    assert f"processor: {found['processor']}" in done.stderr
    assert torch.backends.cpu.get_cpu_capability() in found["instructions"]
    assert found["num_threads"]["ours"] == 1  # what `dlrm train` gives steps of so little work
    parts = found["parts_ms"]
    whole = parts.pop("whole step")
    assert {"matrix products", "tables: look up", "tables: update", "interaction", "dense optimizer"} <= parts.keys()
    assert sum(parts.values()) - parts.pop("whole step while profiled") >= whole * 0.999
    assert all(ms > 0 for name, ms in parts.items() if name != "the rest")


@pytest.mark.slow
def test_the_step_of_two_processes_is_timed_with_a_model_class(dlrm):
    own = ("--model-class", f"{Path(__file__).parents[2]}/examples/own_interaction.py:FieldAttention")
    done = dlrm(*STEP, *own, "--steps-per-round", 1, "--nproc-per-node", 2, timeout_s=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["num_processes"] == 2
    assert found["plain_torch_rows_per_s"] is None
    assert found["ratio_to_torchrec"] > 0


def test_busy_processes_compute_until_they_are_no_longer_needed():
    before = set(psutil.Process().children())  # another test may have started a server
    with busy_processes(1):
        (spinning,) = set(psutil.Process().children()) - before
        while spinning.cpu_times().user < 0.05:  # it is given the core some time
            os.sched_yield()
    assert not spinning.is_running()


def test_the_loader_is_timed(small_dataset, dlrm):
    done = dlrm("bench", "loader", small_dataset.path, "--rounds", 1, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["rows_per_s"] > 0
    assert "torch/fx" not in done.stderr  # what torch logs for its developers
