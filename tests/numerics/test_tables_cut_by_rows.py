"""Tables that are cut by rows, over gloo: they train as on one process, by the same exchange as between GPUs."""

import json
import shutil

import pytest
import torch

from helpers.days import last_state
from helpers.trainings import losses, two_nodes
from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group

CONFIG = "criteo-small"
STEPS, HALF_WAY, LATER = 20, 10, 15
SETTINGS = {
    # Few hidden units: two processes round sums otherwise than one, and where that puts the input of a unit on the
    # other side of 0, for one row of a batch, ReLU's gradient is another one.
    "model.dense_arch_layer_sizes": "32,16",
    "model.over_arch_layer_sizes": "32,1",
    "train.batch_size_global": "252",  # of 4,286 rows: the 18th batch has two, and of four processes two have none
    "train.epochs": "2",
    "train.max_steps": str(STEPS),
    "train.precision": "float32",
    "checkpoint.every_steps": "5",
    "checkpoint.keep_last": "4",
    "logging.every_steps": "1",
    "logging.tensorboard": "false",
}
# Each batch is uneven. Then gradients are rounded otherwise than on one process, and Adagrad, whose first steps have
# the size of the rate however small a gradient is, makes much of that: only as many processes compute the same.
UNEVEN = {"train.batch_size_global": "357"}
ADAGRAD = {"table_optimizer.name": "adagrad"}  # grid cuts columns, and row-wise Adagrad has a state for each cut
# All three kinds at once; of each, tables with fewer rows than processes.
MIXED = ("cat_*=table_row_wise", "cat_1*=grid_shard", "cat_2*=row_wise")

pytestmark = pytest.mark.slow


def rules(*texts):
    return {"sharding.constraints": json.dumps(texts)}


def on_one(dataset, run, **settings):
    """Train in this process."""
    train(load_config(CONFIG, SETTINGS | settings), dataset, run)
    return run


def train_in_turn(path, runs):
    """What each of two processes does: one training after the other."""
    with join_process_group():
        for run, settings in runs.items():
            train(load_config(CONFIG, SETTINGS | settings), Dataset.open(path), run)


def on_two_nodes(dataset, run, **settings):
    """Train by the command on two machines, which are both this one, with two processes each."""
    flags = [word for name, value in (SETTINGS | settings).items() for word in (f"--{name.replace('_', '-')}", value)]
    arguments = ("--dataset", dataset.path, "--run", run, "--nproc-per-node", 2, *flags)
    told = [node.wait(timeout_s=400) for node in two_nodes(*arguments, verb=("train", CONFIG))]
    assert [code for code, _ in told] == [0, 0], "\n".join(output for _, output in told)
    return run


def cut_back(run, copy, step):
    """A copy of a run as it was after a step."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder)
    return copy


def kinds(run):
    return {table["sharding_type"] for table in json.loads((run / "plan.json").read_text())["tables"].values()}


def assert_same_training(run, expected, tmp_path):
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(expected), abs=1e-6)
    found, wanted = last_state(run, tmp_path), last_state(expected, tmp_path)
    assert found.keys() == wanted.keys()
    assert sum("momentum1" in name for name in found) == 26
    for name, value in wanted.items():
        # Adagrad's steps have the size of the rate however small a gradient is: where it is nearly 0, rounding shows.
        atol = 1e-7 if name.startswith("optimizer/") else 1e-3
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-3, msg=lambda text, n=name: f"{n}: {text}")


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
def two(small_dataset, folder):
    """Runs of two processes, by name."""
    settings = {"row-wise": rules("cat_*=row_wise"), "uneven": UNEVEN | rules("cat_*=row_wise"), "uneven-whole": UNEVEN}
    runs = {folder / name: of_run for name, of_run in settings.items()}
    launch(train_in_turn, small_dataset.path, runs, processes=Processes(2))
    return {run.name: run for run in runs}


@pytest.fixture(scope="module")
def four(small_dataset, folder):
    """A run of two processes on each of two machines, with tables of all kinds that are cut by rows."""
    return on_two_nodes(small_dataset, folder / "four", **rules(*MIXED), **ADAGRAD)


def test_tables_cut_by_rows_over_two_processes_train_as_on_one(two, one, tmp_path):
    assert kinds(two["row-wise"]) == {"row_wise"}
    assert_same_training(two["row-wise"], one, tmp_path)


def test_uneven_batches_train_as_with_whole_tables(two, tmp_path):
    assert (kinds(two["uneven"]), kinds(two["uneven-whole"])) == ({"row_wise"}, {"table_wise"})
    assert losses(two["uneven"]) == losses(two["uneven-whole"])
    found, wanted = last_state(two["uneven"], tmp_path), last_state(two["uneven-whole"], tmp_path)
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_tables_cut_within_and_across_two_machines_train_as_on_one_process(four, one_adagrad, tmp_path):
    assert kinds(four) == {"table_row_wise", "grid_shard", "row_wise"}
    assert_same_training(four, one_adagrad, tmp_path)


def test_a_run_cut_by_rows_resumes_on_one_process(two, one, small_dataset, tmp_path):
    run = cut_back(two["row-wise"], tmp_path / "run", HALF_WAY)
    on_one(small_dataset, run)
    assert kinds(run) == {"table_wise"}
    assert_same_training(run, one, tmp_path)


def test_a_run_resumes_across_kinds_and_numbers_of_processes(four, one_adagrad, small_dataset, tmp_path):
    run = cut_back(four, tmp_path / "run", HALF_WAY)
    on_one(small_dataset, run, **ADAGRAD)
    shorter = cut_back(run, tmp_path / "shorter", LATER)
    on_two_nodes(small_dataset, shorter, **rules("cat_*=grid_shard"), **ADAGRAD)
    assert kinds(shorter) == {"grid_shard"}
    assert_same_training(shorter, one_adagrad, tmp_path)
