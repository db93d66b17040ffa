"""What tables and the dense parts of a step are estimated to take."""

from dataclasses import replace

import pytest
import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen

from helpers.interactions import INTERACTIONS
from helpers.random_problems import problem
from torchdlrm.config import TABLE_OPTIMIZERS, Config, ModelConfig, TableOptimizerConfig, TrainConfig, load_config
from torchdlrm.errors import DoesNotFitError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.eager import EagerModel
from torchdlrm.sharding.layout import PlacedShard, PlacedTable
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import shard_costs, solve
from torchdlrm.sharding.tables import Table
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.tables.optimizers import fused_params


def test_the_dense_parts_are_those_of_this_many_dense_features():
    config = ModelConfig(embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(4, 1))
    asked = problem([Table("t", 10, 8)], 2, batch=100, shape=ModelShape(config, num_dense=2, num_sparse=3))
    machine, found = asked.machine, asked.dense
    weights = 2 * 16 + 16 * 8 + (8 + 6) * 4 + 4 * 1  # 4 vectors have 6 pairs
    square = 4 * 8 * 4
    rate = 0.5 * machine.bfloat16_flops_per_s
    assert found.compute_ms == pytest.approx(1000 * 6 * 50 * (weights + square) / rate)
    assert found.all_reduce_ms == pytest.approx(1000 * 4 * weights / machine.intra_host_bytes_per_s)


@pytest.mark.parametrize(
    ("device", "train", "rate"),
    [
        ("h100-80gb", {}, 989e12),
        ("h100-80gb", {"precision": "bfloat16"}, 989e12),
        ("h100-80gb", {"precision": "float32"}, 989e12 / 2),
        ("h100-80gb", {"precision": "float32", "tf32": False}, 67e12),
        ("cpu", {}, 2.6e12),
    ],
)
def test_the_dense_parts_are_planned_in_the_precision_of_the_training(device, train, rate):
    config = Config(train=TrainConfig(**train))
    machine = device_named(device).spread(1)
    asked = Problem.of(config, [Table("t", 10, 128)], machine)
    flops = asked.shape.step_flops(config.train.batch_size_global)
    assert asked.dense.compute_ms == pytest.approx(1000 * flops / (0.5 * rate))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_the_activations_are_what_autograd_keeps(interaction):
    config = ModelConfig(
        embedding_dim=16,
        dense_arch_layer_sizes=(48, 16),
        over_arch_layer_sizes=(40, 24, 1),
        **INTERACTIONS[interaction],
    )
    shape, num_rows = ModelShape(config, num_dense=13, num_sparse=26), 512
    model = EagerModel(shape)
    model.module.train()
    ids = torch.zeros(26 * num_rows, dtype=torch.int64)
    kept = {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.logits(
            torch.rand(num_rows, 13), ids, torch.ones_like(ids), torch.rand(num_rows, 26, 16, requires_grad=True)
        )
    weights = {weight.untyped_storage().data_ptr() for weight in model.module.parameters()}
    kept_bytes = sum(storage.nbytes() for place, storage in kept.items() if place not in weights)
    assert 4 * num_rows * shape.num_activations == pytest.approx(kept_bytes, rel=0.02)


def test_mlperfs_model_has_the_multiply_adds_that_its_layers_name():
    """By hand: 13-512-256-128, three layers of 2 x 3,456 x 512, 3,456-1024-1024-512-256-1."""
    config = ModelConfig(interaction="dcn", over_arch_layer_sizes=(1024, 1024, 512, 256, 1))
    assert ModelShape(config, num_dense=13, num_sparse=26).multiply_adds == 170_496 + 10_616_832 + 5_243_136


def test_dense_parts_that_need_more_than_is_reserved_leave_less_to_the_tables():
    asked = problem([Table("t_0", 1000, 128)], devices=1, batch=900_000)
    assert asked.dense.total_bytes < 0.15 * asked.machine.memory_bytes
    assert asked.usable_bytes == int(0.85 * asked.machine.memory_bytes)
    crossed = replace(asked, shape=replace(asked.shape, config=ModelConfig(interaction="dcn")))
    assert crossed.usable_bytes == pytest.approx(crossed.machine.memory_bytes - crossed.dense.total_bytes)
    assert crossed.dense.total_bytes > 0.15 * crossed.machine.memory_bytes
    adam = replace(crossed, dense_state_per_weight=2)
    assert adam.dense.weight_bytes == pytest.approx(4 / 3 * crossed.dense.weight_bytes)
    assert solve(crossed).problem.dense == crossed.dense
    with pytest.raises(DoesNotFitError):
        solve(replace(crossed, machine=replace(crossed.machine, hbm_bytes=crossed.dense.total_bytes // 2)))


@pytest.mark.parametrize("name", TABLE_OPTIMIZERS)
def test_lazy_decay_takes_a_value_a_row_more_which_the_plan_counts(name):
    config = load_config(None, {"table_optimizer.name": name, "table_optimizer.weight_decay_mode": "lazy"})
    rows, dim = 300, 16
    plain = problem([Table("t_0", rows, dim)], devices=1, optimizer=name)
    lazy = replace(plain, optimizer=config.table_optimizer.record)
    assert lazy.table_bytes == plain.table_bytes + 4 * rows
    kernel = TablesOfRank(
        [(rows, dim, EmbeddingLocation.HOST, ComputeDevice.CPU)], **fused_params(config.table_optimizer)
    )
    held_bytes = sum(tensor.nbytes for name, tensor in kernel.named_parameters() if name.endswith("_host"))
    assert held_bytes == lazy.table_bytes


@pytest.mark.parametrize("optimizer", TABLE_OPTIMIZERS)
@pytest.mark.parametrize("dim", [16, 128])
def test_a_cached_table_takes_the_memory_that_fbgemm_allocates(optimizer, dim):
    """FBGEMM's own constructor says which tensors there are and where; on the meta device they have no memory."""
    rows, fraction = 3_200_000, 0.1
    placed = PlacedTable("table_wise", "fused_uvm_caching", (PlacedShard(0, (0, 0), (rows, dim)),), fraction)
    asked = problem([Table("t_0", rows, dim)], devices=1, optimizer=optimizer, batch=64, cache_fraction=fraction)
    costs = shard_costs(asked, {"t_0": placed})
    (cost,) = costs["t_0"]
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(rows, dim, EmbeddingLocation.MANAGED_CACHING, ComputeDevice.CUDA)],
        optimizer=fused_params(TableOptimizerConfig(name=optimizer))["optimizer"],
        cache_sets=int(rows * fraction) // 32,
        device=torch.device("meta"),
    )
    on_device, on_host = 0, 0
    for name, tensor in [*kernel.named_buffers(), *kernel.named_parameters()]:
        on_host += tensor.nbytes * name.endswith("_uvm")
        on_device += tensor.nbytes * (not name.endswith("_uvm"))
    assert cost.host_bytes == pytest.approx(on_host, abs=1_000)  # it has a few counters besides
    assert cost.device_bytes == pytest.approx(on_device, abs=50_000)
