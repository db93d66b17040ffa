"""Lists devices to plan for, with published rates.

All rates are peak rates of the makers' datasheets, in bytes or floating-point operations per second and in one
direction; real kernels reach a part of them, so times planned from them are too short rather than too long, and
`dlrm plan --measure` replaces them by what this machine reaches.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchdlrm.errors import PlanError


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
    source="NVIDIA H100 SXM5 datasheet; DGX H100: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
)
_DEVICES = (
    Device(
        name="v100-32gb",
        memory_bytes=32 * 10**9,
        host_memory_bytes=1536 * 10**9,
        memory_bytes_per_s=900e9,
        host_link_bytes_per_s=16e9,
        intra_host_bytes_per_s=150e9,
        inter_host_bytes_per_s=12.5e9,
        float32_flops_per_s=15.7e12,
        source="NVIDIA V100 SXM2 datasheet; DGX-1 / DGX-2: PCIe 3 x16, NVLink 2, 100 Gb/s a GPU",
    ),
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
        source="NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs, NVLink 5, 400 Gb/s a GPU",
    ),
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
        devices_per_host=1,
        source="one socket of a server: 8 channels of DDR4-3200, 32 cores with AVX2 at 2.5 GHz, 25 Gb/s Ethernet; "
        "memory is that of this machine when not given",
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """Find a device by its name.

    Raises:
        PlanError: there is none of this name.
    """
    if name in DEVICES:
        return DEVICES[name]
    close = difflib.get_close_matches(name.lower(), DEVICES, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    msg = f"`device`: unknown device {name!r}{hint} Known: {', '.join(DEVICES)}; `hbm` and the like change its rates"
    raise PlanError(msg)


def device_of_gpu(gpu_name: str, memory_bytes: int) -> Device:
    """Find a GPU by its driver's name, for example `NVIDIA A100-SXM4-80GB`; the A100 where none is known."""
    name = gpu_name.lower()
    for device in reversed(_DEVICES):
        model, _, size = device.name.partition("-")
        if model in name and (not size or abs((device.memory_bytes or 0) / memory_bytes - 1) < 0.2):
            return device
    return DEVICES["a100-80gb"]
