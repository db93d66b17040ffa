"""GPUs and their rates: found by the names that drivers give them."""

import pytest

from torchdlrm.errors import PlanError
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
