"""Tables that are cut by rows, over gloo: they train as on one process, by the same exchange as between GPUs."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchdlrm.config import load_config
from torchdlrm.training.job import train

CONFIG = "criteo-small"
STEPS, HALF_WAY, LATER = 20, 10, 15
# Of 4,286 rows: every batch of 357 is uneven on two and on four processes, and the 13th has rows for only two of four.
SETTINGS = {
    "train.batch_size_global": "250",
    "train.epochs": "2",
    "train.max_steps": str(STEPS),
    "train.precision": "float32",
    "checkpoint.every_steps": "5",
    "checkpoint.keep_last": "4",
    "logging.every_steps": "1",
    "logging.tensorboard": "false",
}
ADAGRAD = {"table_optimizer.name": "adagrad"}  # grid cuts columns, and row-wise Adagrad has a state for each cut
# All three kinds at once; of each, tables with fewer rows than processes and of thousands.
MIXED = ("cat_*=table_row_wise", "cat_1*=grid_shard", "cat_2*=row_wise")

pytestmark = pytest.mark.slow


def on_one(dataset, run, **settings):
    """Train in this process."""
    train(load_config(CONFIG, SETTINGS | settings), dataset, run)
    return run


def on_several(dataset, run, *, constraints, nodes=1, **settings):
    """Train by the command, with two processes on each of so many machines."""
    settings = SETTINGS | settings | {"sharding.constraints": json.dumps(constraints)}
    command = [Path(sys.executable).with_name("dlrm"), "train", CONFIG, "--dataset", dataset.path, "--run", run]
    command += ["--nproc-per-node", 2]
    for name, value in settings.items():
        command += [f"--{name.replace('_', '-')}", value]
    if nodes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command += ["--nnodes", nodes, "--rdzv-endpoint", f"127.0.0.1:{probe.getsockname()[1]}"]
    started = [
        subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(nodes)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0] * nodes, "\n".join(outputs)
    return run


def cut_back(run, copy, step):
    """A copy of a run as it was after a step."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


def kinds(run):
    return {table["sharding_type"] for table in json.loads((run / "plan.json").read_text())["tables"].values()}


def state(run, folder):
    """Every tensor of the last checkpoint, of model and optimizer, by name."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{STEPS:08d}", folder / "state.pt")
    flat = {}

    def walk(prefix, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        elif isinstance(value, torch.Tensor):
            flat[prefix] = value

    walk("", torch.load(folder / "state.pt", weights_only=True))
    return flat


def assert_same_training(run, expected, tmp_path):
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(expected), abs=1e-6)
    found, wanted = state(run, tmp_path), state(expected, tmp_path)
    assert found.keys() == wanted.keys()
    assert sum("momentum1" in name for name in found) == 26
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cut-by-rows")


@pytest.fixture(scope="module")
def one(small_dataset, folder):
    return on_one(small_dataset, folder / "one")


@pytest.fixture(scope="module")
def one_adagrad(small_dataset, folder):
    return on_one(small_dataset, folder / "one-adagrad", **ADAGRAD)


@pytest.fixture(scope="module")
def row_wise(small_dataset, folder):
    return on_several(small_dataset, folder / "row-wise", constraints=["cat_*=row_wise"])


@pytest.fixture(scope="module")
def mixed(small_dataset, folder):
    return on_several(small_dataset, folder / "mixed", constraints=MIXED, nodes=2, **ADAGRAD)


def test_tables_cut_by_rows_over_two_processes_train_as_on_one(row_wise, one, tmp_path):
    assert kinds(row_wise) == {"row_wise"}
    assert_same_training(row_wise, one, tmp_path)


def test_tables_cut_within_and_across_two_machines_train_as_on_one_process(mixed, one_adagrad, tmp_path):
    assert kinds(mixed) == {"table_row_wise", "grid_shard", "row_wise"}
    assert_same_training(mixed, one_adagrad, tmp_path)


def test_a_run_cut_by_rows_resumes_on_one_process(row_wise, one, small_dataset, tmp_path):
    run = cut_back(row_wise, tmp_path / "run", HALF_WAY)
    on_one(small_dataset, run)
    assert kinds(run) == {"table_wise"}
    assert_same_training(run, one, tmp_path)


def test_a_run_resumes_across_kinds_and_numbers_of_processes(mixed, one_adagrad, small_dataset, tmp_path):
    run = cut_back(mixed, tmp_path / "run", HALF_WAY)
    on_one(small_dataset, run, **ADAGRAD)
    shorter = cut_back(run, tmp_path / "shorter", LATER)
    on_several(small_dataset, shorter, constraints=("cat_*=grid_shard",), nodes=2, **ADAGRAD)
    assert kinds(shorter) == {"grid_shard"}
    assert_same_training(shorter, one_adagrad, tmp_path)
