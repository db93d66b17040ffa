"""Memory of GPUs that other programs use too; the driver's answers are made up, for there is none here."""

from types import SimpleNamespace

import pytest
import torch

from torchdlrm.config import ShardingConfig
from torchdlrm.sharding import local_machine as module
from torchdlrm.sharding.local_machine import local_machine

TOTAL = 80 * 10**9


@pytest.fixture
def machine_with(monkeypatch):
    """The machine of two ranks: bytes in use of each GPU, of which this process holds 10**9 on its own."""

    def make(*used, total=TOTAL, rank=0, all_gather=None, **sharding):
        def properties(device):
            index = device if isinstance(device, int) else device.index
            return SimpleNamespace(name="NVIDIA A100-SXM4-80GB", total_memory=total, uuid=str(index))

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index: 10**9 if index == rank else 0)
        monkeypatch.setattr(module, "used_bytes", lambda uuid: used[int(uuid)])
        return local_machine(
            ShardingConfig(**sharding),
            world_size=2,
            local_world_size=2,
            device=torch.device("cuda", rank),
            all_gather=all_gather,
        )

    return make


def test_what_other_programs_hold_of_the_fullest_gpu_is_left_to_them(machine_with):
    machine = machine_with(21 * 10**9, 30 * 10**9)
    assert machine.hbm_bytes == TOTAL - 30 * 10**9
    assert "other programs hold 30 GB of a GPU" in machine.source
    assert machine_with(31 * 10**9, 0).hbm_bytes == TOTAL - 30 * 10**9  # without what is this process's own


def test_what_ranks_hold_that_have_begun_changes_no_plan(machine_with):
    machine = machine_with(4 * 10**9, 3 * 10**9)
    assert machine.hbm_bytes == TOTAL
    assert "other programs" not in machine.source


def test_what_the_ranks_themselves_hold_from_a_training_before_is_planned_for(machine_with):
    """Each rank asks about its own GPU: of the others it would take what their processes have cached for foreign."""
    sent = []

    def all_gather(value):
        sent.append(value)
        return [0, 30 * 10**9]

    assert machine_with(60 * 10**9, 10**9, rank=1, all_gather=all_gather).hbm_bytes == TOTAL - 30 * 10**9
    assert sent == [0]
    assert machine_with(10**9, 41 * 10**9, rank=1, all_gather=lambda value: [value, 0]).hbm_bytes == TOTAL - 40 * 10**9


def test_on_a_small_gpu_contexts_and_buffers_of_our_own_change_no_plan(machine_with):
    assert machine_with(10**9, 2 * 10**9, total=24 * 10**9).hbm_bytes == 24 * 10**9


def test_a_size_that_is_given_counts(machine_with):
    assert machine_with(50 * 10**9, 0, hbm_bytes=TOTAL - 1).hbm_bytes == TOTAL - 1


def test_without_a_driver_nothing_is_known_to_be_in_use():
    assert module.used_bytes("00000000-0000-0000-0000-000000000000") == 0
