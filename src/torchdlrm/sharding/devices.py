"""Devices to plan for, with figures that anyone can look up.

All rates are peak figures of the makers' datasheets, in bytes or floating-point operations per second and in one
direction; real kernels reach a part of them, so times planned from them are too short rather than too long, and
`dlrm plan --measure` replaces them by what the machine at hand does.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass

from torchdlrm.errors import PlanError


@dataclass(frozen=True)
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
        source: where the figures come from.
    """

    name: str
    kind: str
    memory_bytes: int | None
    host_memory_bytes: int | None
    memory_bytes_per_s: float
    host_link_bytes_per_s: float
    intra_host_bytes_per_s: float
    inter_host_bytes_per_s: float
    float32_flops_per_s: float
    devices_per_host: int
    source: str


_DEVICES = (
    Device(
        *("v100-32gb", "cuda", 32 * 10**9, 1536 * 10**9, 900e9, 16e9, 150e9, 12.5e9, 15.7e12, 8),
        "NVIDIA V100 SXM2 datasheet; DGX-1 / DGX-2: PCIe 3 x16, NVLink 2, 100 Gb/s a GPU",
    ),
    Device(
        *("a100-40gb", "cuda", 40 * 10**9, 1024 * 10**9, 1555e9, 32e9, 300e9, 25e9, 19.5e12, 8),
        "NVIDIA A100 SXM4 40GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
    ),
    Device(
        *("a100-80gb", "cuda", 80 * 10**9, 2048 * 10**9, 2039e9, 32e9, 300e9, 25e9, 19.5e12, 8),
        "NVIDIA A100 SXM4 80GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
    ),
    Device(
        *("h100-80gb", "cuda", 80 * 10**9, 2048 * 10**9, 3350e9, 64e9, 450e9, 50e9, 67e12, 8),
        "NVIDIA H100 SXM5 datasheet; DGX H100: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
    ),
    Device(
        *("h200", "cuda", 141 * 10**9, 2048 * 10**9, 4800e9, 64e9, 450e9, 50e9, 67e12, 8),
        "NVIDIA H200 SXM datasheet; DGX H200: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
    ),
    Device(
        *("b200", "cuda", 180 * 10**9, 2048 * 10**9, 8000e9, 64e9, 900e9, 50e9, 75e12, 8),
        "NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs, NVLink 5, 400 Gb/s a GPU",
    ),
    Device(
        *("cpu", "cpu", None, None, 204.8e9, 204.8e9, 10e9, 3.125e9, 2.6e12, 1),
        "one socket of a server: 8 channels of DDR4-3200, 32 cores with AVX2 at 2.5 GHz, 25 Gb/s Ethernet; "
        "memory is that of this machine when not told",
    ),
)
DEVICES: Mapping[str, Device] = {device.name: device for device in _DEVICES}


def device_named(name: str) -> Device:
    """The device of a name.

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
    """The table's row for a GPU as the driver names it, for example `NVIDIA A100-SXM4-80GB`; the A100 where none is."""
    name = gpu_name.lower()
    for device in reversed(_DEVICES):
        model, _, size = device.name.partition("-")
        if model in name and (not size or abs((device.memory_bytes or 0) / memory_bytes - 1) < 0.2):
            return device
    return DEVICES["a100-80gb"]
