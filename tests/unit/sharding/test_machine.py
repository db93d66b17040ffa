"""GPUs and their rates: found by the names that drivers give them; and what other programs hold of their memory.

The driver's answers are made up, for there is none here.
"""

from types import SimpleNamespace

import pytest
import torch

from torchdlrm.config import ShardingConfig
from torchdlrm.errors import PlanError
from torchdlrm.sharding import local_machine as module
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.machine import DEVICES, device_named, device_of_gpu

GB = 10**9


@pytest.mark.parametrize(
    ("driver_says", "memory_gb", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", 42, "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", 85, "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", 85, "a100-80gb"),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 42, "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", 85, "h100-80gb"),
        ("NVIDIA H100 NVL", 100, "h100-80gb"),
        ("NVIDIA H20", 102, "h20"),
        ("NVIDIA H200", 150, "h200"),
        ("NVIDIA GH200 480GB", 102, "h200"),
        ("NVIDIA B200", 192, "b200"),
        ("NVIDIA GB200", 192, "b200"),
        ("NVIDIA L4", 24, "l4"),
        ("NVIDIA L40S", 48, "l40s"),
        ("NVIDIA A10", 24, "a10"),
        ("NVIDIA A10G", 24, "a10"),
        ("NVIDIA RTX 6000 Ada Generation", 51, "rtx-6000-ada"),
    ],
)
def test_a_gpu_is_found_by_the_name_that_its_driver_gives_it(driver_says, memory_gb, name):
    assert device_of_gpu(driver_says, memory_gb * GB) is DEVICES[name]


@pytest.mark.parametrize(
    "driver_says", ["Tesla T4", "NVIDIA RTX A6000", "Quadro RTX 6000", "NVIDIA RTX PRO 6000 Blackwell Server Edition"]
)
def test_a_gpu_that_is_not_listed_is_taken_for_none_that_is_faster(driver_says):
    device = device_of_gpu(driver_says, 16 * GB)
    assert (device.device, device.memory_bytes) == (driver_says, 16 * GB)
    assert "rates of this GPU are not known" in device.source
    for other in DEVICES.values():
        if other.kind == "cuda":
            assert device.memory_bytes_per_s <= other.memory_bytes_per_s
            assert device.intra_host_bytes_per_s <= other.intra_host_bytes_per_s
            assert device.inter_host_bytes_per_s <= other.inter_host_bytes_per_s


@pytest.mark.parametrize("name", ["v100-32gb", "T4"])
def test_a_gpu_that_fbgemm_has_no_kernels_for_is_refused_with_the_reason(name):
    with pytest.raises(
        PlanError, match=rf"{name} has compute capability 7\.\d, and FBGEMM's wheel has kernels for 8\.0"
    ):
        device_named(name)


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
