"""Tells how much of a GPU's memory is there for a job, where other programs use the GPU too."""

import ctypes
from contextlib import suppress

import torch

# CUDA's context, NCCL's buffers and the dense parts of ranks that have begun stay below the larger of these.
_OUR_OWN_FRACTION, _OUR_OWN_BYTES = 0.05, 2 * 2**30


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def memory_of_others_bytes(index: int) -> int:
    """What other processes hold of a GPU; 0 where that is little, and where the driver does not tell.

    Args:
        index: of the GPU, in PyTorch's order.
    """
    properties = torch.cuda.get_device_properties(index)
    others = used_bytes(str(properties.uuid)) - torch.cuda.memory_reserved(index)
    return others if others > max(_OUR_OWN_FRACTION * properties.total_memory, _OUR_OWN_BYTES) else 0


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
