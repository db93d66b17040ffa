"""One rank of 8, and of 16 on two nodes, in this process: every kind of sharding, every optimizer of the tables."""

import json
import re
import shutil
import statistics
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from torchdlrm.config import load_config
from torchdlrm.config.optimizers import TABLE_OPTIMIZERS
from torchdlrm.training.checkpoint import Position
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.processes.process_group import join_process_group

FINALNET = f"{Path(__file__).parents[2]}/examples/finalnet.py:FinalNet"
KINDS = ("table_wise", "column_wise", "row_wise", "table_row_wise", "grid_shard")


@pytest.fixture
def train_one_rank(small_dataset, tmp_path):
    """Trains rank 0 of so many: train_one_rank(8, {"train.max_steps": "4"}) -> (the run, what its steps cost)."""
    from counted_steps import counted_steps
    from one_rank import one_rank_of

    from torchdlrm.training.job import train

    def run(world_size, overrides=(), look_at=0, model_class=None):
        settings = {"train.batch_size_global": "512", "train.max_steps": "6", "logging.every_steps": "3"}
        settings |= {"logging.tensorboard": "false", **dict(overrides)}
        config = load_config("criteo-small", settings)
        ranks = one_rank_of(world_size) if world_size > 1 else nullcontext()
        with ranks, counted_steps(look_at=look_at) as steps:
            history = train(config, small_dataset, tmp_path / "run", model_class=model_class)
        assert history.summary.step == int(settings["train.max_steps"])
        return tmp_path / "run", steps

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world_size", [8, 16])
def test_a_rank_trains_with_each_kind_of_sharding(train_one_rank, world_size, kind):
    run, _ = train_one_rank(world_size, {"sharding.constraints": json.dumps([f"cat_0={kind}", f"cat_5={kind}"])})
    plan = json.loads((run / "plan.json").read_text())
    assert plan["tables"]["t_cat_0"]["sharding_type"] == kind


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_a_rank_trains_with_each_optimizer_of_the_tables(train_one_rank, name):
    decay = {"table_optimizer.weight_decay": "1e-6"} if "lamb" in name else {}
    train_one_rank(8, {"table_optimizer.name": name, "sharding.constraints": '["cat_0=row_wise"]', **decay})


@pytest.mark.parametrize("name", ["adagrad", "sgd", "adamw"])
def test_a_rank_trains_with_each_dense_optimizer(train_one_rank, name):
    train_one_rank(8, {"dense_optimizer.name": name})


@pytest.mark.parametrize("kind", ["table_wise", "row_wise"])
def test_a_rank_trains_with_tables_cached_from_host_memory(train_one_rank, tmp_path, kind):
    everywhere = {"sharding.constraints": json.dumps([f"cat_{i}={kind}" for i in range(26)])}
    run, _ = train_one_rank(8, everywhere)
    plan = json.loads((run / "plan.json").read_text())
    for table in plan["tables"].values():
        table |= {"compute_kernel": "fused_uvm_caching", "cache_fraction": 0.2}
    (tmp_path / "cached.json").write_text(json.dumps(plan))
    shutil.rmtree(run)
    run, _ = train_one_rank(8, {"sharding.plan": str(tmp_path / "cached.json")})
    assert "fused_uvm_caching" in (run / "plan.json").read_text()


@pytest.mark.parametrize("world_size", [1, 8])
def test_a_rank_whose_last_batch_is_small_trains_with_row_wise_tables(train_one_rank, world_size):
    """4,286 rows in batches of 857: the last one has a single row."""
    train_one_rank(
        world_size,
        {"train.batch_size_global": "857", "sharding.constraints": '["cat_0=row_wise"]' if world_size > 1 else "[]"},
    )


def test_a_rank_uses_its_own_gpu_alone(train_one_rank):
    from pretend import take_used_gpus

    take_used_gpus()
    train_one_rank(8)
    assert take_used_gpus() == {0}


def test_asynchronous_checkpoints_are_copied_to_the_host(train_one_rank):
    from one_rank import saved

    saved.clear()
    train_one_rank(8, {"sharding.constraints": '["cat_0=row_wise"]', "checkpoint.every_steps": "4"})
    assert saved[0] == {"cpu"}


def test_a_save_that_is_waited_for_pins_no_memory(tmp_path):
    """Torch's writer would copy ahead: two shards at a time, rounded up to powers of two, and keep them."""
    with join_process_group(device="cuda") as ranks:
        model = torch.nn.Embedding(100_000, 8, device=ranks.device)
        checkpointer = Checkpointer(tmp_path, model, None, ranks)
        before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
        assert checkpointer.save(Position(1, {"epoch": 0, "batches_consumed": 1}), wait=True)
        checkpointer.close()
        assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before


@pytest.mark.parametrize(
    ("world_size", "constraints", "model_class", "max_waits", "max_launches"),
    [
        (1, [], None, 9, 113),
        (8, [], None, 10, 165),
        (16, ["cat_0=row_wise", "cat_1=table_row_wise"], None, 28, 292),
        (8, [], FINALNET, 10, 444),  # with batch normalisation
    ],
)
def test_a_step_waits_and_launches_no_more_than_today(
    train_one_rank, world_size, constraints, model_class, max_waits, max_launches
):
    """All these waits are TorchRec's: it reads the sizes of what the ranks exchange. One of ours would come on top."""
    settings = {"train.max_steps": "20", "train.epochs": "3", "logging.every_steps": "1000"}
    settings["sharding.constraints"] = json.dumps(constraints)
    _, steps = train_one_rank(world_size, settings, look_at=14, model_class=model_class)
    told = "\n".join(f"{times} x {place}" for place, times in steps.waits.most_common())
    usual = {name: statistics.median(row[name] for row in steps.counts[12:-2]) for name in steps.counts[0]}
    assert usual["waits"] <= max_waits, told
    assert usual["launches"] <= max_launches
    frames = " < ".join(steps.waits).split(" < ")
    assert not any(re.search("(^|/src/)torchdlrm/", frame) for frame in frames), told
