"""What the dense parts of a step are estimated to take."""

import pytest

from torchdlrm.config import ModelConfig
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.devices import device_named
from torchdlrm.sharding.estimate import dense_part
from torchdlrm.sharding.topology import machine_of


def test_the_dense_parts_are_those_of_this_many_dense_features():
    config = ModelConfig(embedding_dim=8, dense_arch_layer_sizes=(16, 8), over_arch_layer_sizes=(4, 1))
    machine = machine_of(device_named("a100-80gb"), num_devices=2, num_hosts=None)
    found = dense_part(ModelShape(config, num_dense=2, num_sparse=3), machine, batch_size_global=100)
    weights = 2 * 16 + 16 * 8 + (8 + 6) * 4 + 4 * 1  # 4 vectors have 6 pairs
    square = 4 * 8 * 4
    rate = 0.5 * machine.float32_flops_per_s
    assert found.compute_ms == pytest.approx(1000 * 6 * 50 * (weights + square) / rate)
    assert found.all_reduce_ms == pytest.approx(1000 * 4 * weights / machine.intra_host_bytes_per_s)
