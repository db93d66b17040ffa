"""The machine that this process runs on: the memory that it really has, less what other programs hold of its GPUs.

TorchRec assumes 32 GiB of GPU memory and 128 GiB of host memory if these are not given.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from torchdlrm.config import ShardingConfig
from torchdlrm.sharding.machine import DEVICES, Machine, device_of_gpu, host_memory_bytes
from torchdlrm.units import show_bytes

# CUDA's context, NCCL's buffers and the dense parts of ranks that have begun stay below the larger of these.
_OUR_OWN_FRACTION, _OUR_OWN_BYTES = 0.05, 2 * 2**30


def local_machine(
    config: ShardingConfig,
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    all_gather: Callable[[int], list[int]] | None = None,
) -> Machine:
    """Return the machine that this process runs on, as training plans for it.

    What other programs hold of its GPUs is not planned for; all ranks have as much as the one with the least.

    Args:
        config: may give memory sizes that differ from the machine's.
        world_size: number of ranks.
        local_world_size: number of ranks on each host.
        device: where this rank computes; all ranks are taken to have the same.
        all_gather: gives the values of all ranks, each of which asks about its own GPU: it alone knows what it holds
            there itself. None where there are no other ranks yet.
    """
    named = DEVICES["cpu"]
    hbm_bytes = 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named = device_of_gpu(properties.name, properties.total_memory)
        hbm_bytes = config.hbm_bytes or properties.total_memory
        others_bytes = 0
        if not config.hbm_bytes and all_gather is not None:
            others_bytes = max(all_gather(memory_of_others_bytes(device.index)))
        elif not config.hbm_bytes:
            others_bytes = max(map(memory_of_others_bytes, range(local_world_size)))
        if others_bytes:
            hbm_bytes -= others_bytes
            named = replace(named, source=f"{named.source}; other programs hold {show_bytes(others_bytes)} of a GPU")
    machine = named.spread(world_size, max(1, world_size // local_world_size))
    host_bytes = config.host_memory_bytes or host_memory_bytes() // local_world_size
    return replace(machine, hbm_bytes=hbm_bytes, host_memory_bytes=host_bytes)


def memory_of_others_bytes(index: int) -> int:
    """What other processes hold of a GPU; 0 where that is little, and where the driver does not tell.

    Args:
        index: of the GPU, in PyTorch's order.
    """
    properties = torch.cuda.get_device_properties(index)
    others = used_bytes(str(properties.uuid)) - torch.cuda.memory_reserved(index)
    return others if others > max(_OUR_OWN_FRACTION * properties.total_memory, _OUR_OWN_BYTES) else 0


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def used_bytes(uuid: str) -> int:
    """What all programs hold of a GPU; 0 where the driver does not tell.

    Asked of the driver's library: CUDA itself would take half a gigabyte of the GPU for a process that asks it.
    """
    memory = _Memory()
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        handle = ctypes.c_void_p()
        if (
            nvml.nvmlInit_v2() == 0
            and nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}".encode(), ctypes.byref(handle)) == 0
        ):
            nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
    return int(memory.used)
