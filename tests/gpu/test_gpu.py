"""What needs a GPU: skipped where there is none. Nothing in here has been seen to pass yet.

`pytest tests/gpu` by itself sees the GPUs; in a run of the whole suite they are hidden.
"""

import json
import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.trainings import OPTIONS, Process, checkpoints, wait_until
from torchdlrm.config import ShardingConfig
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.training.checkpoint import Position
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group

CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"
FINALNET = Path(__file__).parents[2] / "examples" / "finalnet.py"
NUM_GPUS = torch.cuda.device_count()
FLOAT32 = ("--train.precision", "float32", "--train.tf32", "false", "--train.communication", "float32")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(NUM_GPUS == 0, reason="needs a CUDA device"),
]


def losses(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture
def fresh_dlrm(dlrm):
    """`dlrm` in a process that starts from nothing: CUDA fails in one that was forked after it was asked for GPUs."""
    return partial(dlrm, CUDA_DEVICE_ORDER="PCI_BUS_ID")


@pytest.fixture
def train(small_dataset, fresh_dlrm, tmp_path):
    def run(name, *options, max_steps=20):
        path = tmp_path / name
        done = fresh_dlrm(
            *("train", CONFIG, "--dataset", small_dataset.path, "--run", path, "--train.max-steps", max_steps),
            *("--logging.every-steps", 1, "--checkpoint.every-steps", 10, *options),
        )
        assert done.returncode == 0, done.stderr
        return path

    return run


def test_a_gpu_trains_what_the_cpu_trains(train):
    on_gpu, on_cpu = train("gpu", *FLOAT32), train("cpu", *FLOAT32, "--train.device", "cpu")
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), abs=1e-3)


@pytest.mark.parametrize("options", [("--train.precision", "float32"), ("--train.precision", "bfloat16")])
def test_tf32_and_bfloat16_stay_near_float32(train, options):
    assert losses(train("faster", *options)) == pytest.approx(losses(train("exact", *FLOAT32)), abs=0.02)


def test_a_run_on_a_gpu_goes_on_where_it_stopped(train):
    whole = train("whole")
    train("halves", max_steps=10)
    assert losses(train("halves", max_steps=20)) == pytest.approx(losses(whole), abs=1e-4)


def test_a_run_of_optimizers_for_gpus_alone_is_evaluated_alike_on_gpu_and_cpu(train, fresh_dlrm):
    run = train("adam", "--table-optimizer.name", "adam", "--dense-optimizer.name", "adamw")
    done = [fresh_dlrm("evaluate", run, "--split", "val+test", "--device", d, "--json") for d in ("cuda", "cpu")]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr + done[1].stderr
    on_gpu, on_cpu = (json.loads(one.stdout) for one in done)
    assert on_gpu["rows"] == on_cpu["rows"]
    assert on_gpu["logloss"] == pytest.approx(on_cpu["logloss"], abs=1e-5)


def test_validations_in_cached_tables_change_nothing(train, tmp_path):
    """A fifth of the rows in the GPU's cache; a validation looks up others between two steps."""
    whole = train("whole", *FLOAT32)
    plan = json.loads((whole / "plan.json").read_text())
    for table in plan["tables"].values():
        table |= {"compute_kernel": "fused_uvm_caching", "cache_fraction": 0.2}
    (tmp_path / "cached.json").write_text(json.dumps(plan))
    cached = train("cached", *FLOAT32, "--validation.every-steps", 3, "--plan", tmp_path / "cached.json")
    assert losses(cached) == pytest.approx(losses(whole), abs=1e-4)


@pytest.mark.parametrize("name", ["lamb", "partial_rowwise_lamb"])
def test_rows_without_a_gradient_stay_numbers_in_lamb(train, name):
    """Rows without a click weigh so little that their gradients are exactly 0."""
    weightless = ("--train.negative-weight", 1e-44, "--table-optimizer.name", name)
    run = train(name, *weightless, "--table-optimizer.weight-decay", 1e-6, max_steps=100)
    assert checkpoints(run)[-1] == 100  # which holds no NaN


def save_a_gigabyte(folder):
    with join_process_group(device="cuda") as ranks:
        checkpointer = Checkpointer(folder, torch.nn.Embedding(2_000_000, 128, device=ranks.device), None, ranks)
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        assert checkpointer.save(Position(1, {"epoch": 0, "batches_consumed": 1}), wait=True)
        checkpointer.close()
        return torch.cuda.host_memory_stats()["allocated_bytes.current"] - before


def test_a_save_that_is_waited_for_pins_no_memory(tmp_path):
    assert launch(save_a_gigabyte, tmp_path, processes=Processes(1, max_restarts=1)) == 0


def plan_after_a_training():
    """The memory that is planned for while each rank's allocator keeps 60 % of its GPU, which nothing uses."""
    with join_process_group(device="cuda") as ranks:
        total = torch.cuda.get_device_properties(ranks.device).total_memory
        cached = torch.empty(int(0.6 * total), dtype=torch.uint8, device=ranks.device)
        del cached
        ranks.all_gather(0)
        size = {"world_size": ranks.world_size, "local_world_size": ranks.local_world_size}
        machine = local_machine(ShardingConfig(), **size, device=ranks.device, all_gather=ranks.all_gather)
        return machine.hbm_bytes / total


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
def test_a_second_training_plans_for_the_whole_of_each_gpu():
    assert launch(plan_after_a_training, processes=Processes(2)) > 0.9


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
def test_a_killed_rank_is_told_in_time_and_replaced(small_dataset, tmp_path):
    """NCCL's kernels on the other GPU hang: its process is killed after half a minute."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--train.epochs", 50, "--train.max-steps", 2_000, "--nproc-per-node", 2, "--max-restarts", 1)
    process = Process("--dataset", small_dataset.path, "--run", run, *options)
    wait_until(lambda: max(checkpoints(run), default=0) >= 10, process)
    os.kill(process.workers()[1], signal.SIGKILL)
    code, output = process.wait()
    assert code == 0, output
    assert "resumed after" in output


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
def test_batch_normalisation_over_two_gpus_is_that_of_one(train):
    """Batches that cannot be halved, so that one of the GPUs has a row of padding."""
    odd = ("--model-class", f"{FINALNET}:FinalNet", "--train.batch-size-global", 301, *FLOAT32)
    assert losses(train("two", *odd, "--nproc-per-node", 2)) == pytest.approx(losses(train("one", *odd)), abs=1e-3)


@pytest.mark.skipif(NUM_GPUS < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("kind", ["table_wise", "row_wise", "column_wise"])
def test_two_gpus_train_what_one_trains(train, kind):
    two_gpus = ("--sharding.constraints", json.dumps([f"cat_0={kind}", f"cat_1={kind}"]), "--nproc-per-node", 2)
    # Row-wise Adagrad keeps a value for each row of a shard: cut by columns, a table learns a little differently.
    optimizer = ("--table-optimizer.name", "adagrad" if kind == "column_wise" else "rowwise_adagrad")
    one = losses(train("one", *FLOAT32, *optimizer))
    assert losses(train("two", *FLOAT32, *optimizer, *two_gpus)) == pytest.approx(one, abs=1e-3)
    assert losses(train("float16-between", *FLOAT32[:4], *optimizer, *two_gpus)) == pytest.approx(one, abs=0.02)
