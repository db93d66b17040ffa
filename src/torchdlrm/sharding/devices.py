"""Lists devices to plan for, with published rates.

All rates are peak rates of the makers' datasheets, in bytes or floating-point operations per second and in one
direction; real kernels reach a part of them, so times planned from them are too short rather than too long, and
`dlrm plan --measure` replaces them by what this machine reaches.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchdlrm.errors import PlanError
from torchdlrm.toml import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one device, and the host around it, can do.

    Attributes:
        name: what `device` calls it.
        kind: `cuda`, or `cpu` for a process on a host without GPUs.
        memory_bytes: memory of the device where tables live; None on CPU, where it is the host's, shared.
        host_memory_bytes: memory of the whole host; None means the host that plans.
        memory_bytes_per_s: reading the device's memory (on CPU the host's, shared by its processes).
        host_link_bytes_per_s: between host memory and device.
        intra_host_bytes_per_s: from a device to the others of its host.
        inter_host_bytes_per_s: from a device to other hosts.
        float32_flops_per_s: matrix products in float32 (on CPU of the whole host).
        bfloat16_flops_per_s: matrix products in bfloat16 without sparsity; of TF32 these GPUs do half as many.
        devices_per_host: in the usual machine.
        source: where the rates come from.
    """

    name: str
    memory_bytes: int | None
    host_memory_bytes: int | None
    memory_bytes_per_s: float
    host_link_bytes_per_s: float
    intra_host_bytes_per_s: float
    inter_host_bytes_per_s: float
    float32_flops_per_s: float
    bfloat16_flops_per_s: float
    source: str
    kind: str = "cuda"
    devices_per_host: int = 8


_A100 = Device(
    name="a100-40gb",
    memory_bytes=40 * 10**9,
    host_memory_bytes=1024 * 10**9,
    memory_bytes_per_s=1555e9,
    host_link_bytes_per_s=32e9,
    intra_host_bytes_per_s=300e9,
    inter_host_bytes_per_s=25e9,
    float32_flops_per_s=19.5e12,
    bfloat16_flops_per_s=312e12,
    source="NVIDIA A100 SXM4 40GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
)
_H100 = Device(
    name="h100-80gb",
    memory_bytes=80 * 10**9,
    host_memory_bytes=2048 * 10**9,
    memory_bytes_per_s=3350e9,
    host_link_bytes_per_s=64e9,
    intra_host_bytes_per_s=450e9,
    inter_host_bytes_per_s=50e9,
    float32_flops_per_s=67e12,
    bfloat16_flops_per_s=989e12,
    source="NVIDIA H100 SXM5 datasheet; DGX H100: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
)
# What follows has neither NVLink nor a usual machine: hosts are those that AWS rents, with 8 GPUs.
_L40S = Device(
    name="l40s",
    memory_bytes=48 * 10**9,
    host_memory_bytes=1536 * 2**30,
    memory_bytes_per_s=864e9,
    host_link_bytes_per_s=32e9,
    intra_host_bytes_per_s=32e9,
    inter_host_bytes_per_s=6.25e9,
    float32_flops_per_s=91.6e12,
    bfloat16_flops_per_s=362e12,
    source="NVIDIA L40S datasheet: PCIe 4 x16; AWS g6e.48xlarge: 400 Gb/s for 8 GPUs",
)
_L4 = replace(
    _L40S,
    name="l4",
    memory_bytes=24 * 10**9,
    host_memory_bytes=768 * 2**30,
    memory_bytes_per_s=300e9,
    inter_host_bytes_per_s=1.5625e9,
    float32_flops_per_s=30.3e12,
    bfloat16_flops_per_s=121e12,
    source="NVIDIA L4 datasheet: PCIe 4 x16; AWS g6.48xlarge: 100 Gb/s for 8 GPUs",
)
_DEVICES = (
    _A100,
    replace(
        _A100,
        name="a100-80gb",
        memory_bytes=80 * 10**9,
        host_memory_bytes=2048 * 10**9,
        memory_bytes_per_s=2039e9,
        source="NVIDIA A100 SXM4 80GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
    ),
    _H100,
    replace(
        _H100,
        name="h200",
        memory_bytes=141 * 10**9,
        memory_bytes_per_s=4800e9,
        source="NVIDIA H200 SXM datasheet; DGX H200: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
    ),
    replace(
        _H100,
        name="b200",
        memory_bytes=180 * 10**9,
        memory_bytes_per_s=8000e9,
        intra_host_bytes_per_s=900e9,
        float32_flops_per_s=75e12,
        bfloat16_flops_per_s=2250e12,
        source="NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs, NVLink 5, 400 Gb/s a GPU",
    ),
    replace(
        _H100,
        name="h20",
        memory_bytes=96 * 10**9,
        memory_bytes_per_s=4000e9,
        float32_flops_per_s=44e12,
        bfloat16_flops_per_s=148e12,
        source="NVIDIA HGX H20 datasheet: PCIe 5 x16, NVLink 4; 400 Gb/s a GPU as in DGX H100",
    ),
    _L40S,
    replace(
        _L40S,
        name="rtx-6000-ada",
        memory_bytes_per_s=960e9,
        float32_flops_per_s=91.1e12,
        bfloat16_flops_per_s=364e12,
        source="NVIDIA RTX 6000 Ada Generation datasheet: PCIe 4 x16; the host of an L40S",
    ),
    replace(
        _L4,
        name="a10",
        memory_bytes_per_s=600e9,
        float32_flops_per_s=31.2e12,
        bfloat16_flops_per_s=125e12,
        source="NVIDIA A10 datasheet: PCIe 4 x16; AWS g5.48xlarge: 100 Gb/s for 8 A10G",
    ),
    _L4,
    Device(
        name="cpu",
        kind="cpu",
        memory_bytes=None,
        host_memory_bytes=None,
        memory_bytes_per_s=204.8e9,
        host_link_bytes_per_s=204.8e9,
        intra_host_bytes_per_s=10e9,
        inter_host_bytes_per_s=3.125e9,
        float32_flops_per_s=2.6e12,
        bfloat16_flops_per_s=2.6e12,
        devices_per_host=1,
        source="one socket of a server: 8 channels of DDR4-3200, 32 cores with AVX2 and without a unit for bfloat16 at "
        "2.5 GHz, 25 Gb/s Ethernet; "
        "memory is that of this machine when not given",
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


_WITHOUT_KERNELS = {"v100": "7.0", "t4": "7.5"}


def device_named(name: str) -> Device:
    """Find a device by its name.

    Raises:
        PlanError: there is none of this name.
    """
    if name in DEVICES:
        return DEVICES[name]
    model = name.lower().partition("-")[0]
    if model in _WITHOUT_KERNELS:
        msg = (
            f"`device`: {name} has compute capability {_WITHOUT_KERNELS[model]}, and FBGEMM's wheel has kernels "
            f"for 8.0 and above alone; plan for one of {', '.join(DEVICES)}"
        )
        raise PlanError(msg)
    known = f"known are {', '.join(DEVICES)}, and `hbm` and the like change their rates"
    msg = f"`device`: unknown device {name!r}; {known}{did_you_mean(name.lower(), DEVICES)}"
    raise PlanError(msg)


def device_of_gpu(gpu_name: str, memory_bytes: int) -> Device:
    """Find a GPU by its driver's name, for example `NVIDIA A100-SXM4-80GB`.

    A GPU that is not listed has the rates of the slowest one that is, and says so.
    """
    words = set(re.split(r"[\s-]+", gpu_name.lower()))
    words |= {word.strip("g") for word in words}  # a GB200 holds B200s, and an A10G is an A10 for AWS
    for device in DEVICES.values():
        model = re.sub(r"-\d+gb$", "", device.name)
        is_size = model == device.name or abs((device.memory_bytes or 0) / memory_bytes - 1) < 0.2
        if is_size and words.issuperset(model.split("-")):
            return device
    source = (
        f"rates of this GPU are not known; assumed are those of {_L4.name}, the slowest that is listed: {_L4.source}"
    )
    return replace(_L4, name=gpu_name, memory_bytes=memory_bytes, source=source)
