"""Tells how much memory a process has had when it ran out of it, and what would need less."""

import re
import resource
from contextlib import suppress

import torch

from torchdlrm.sharding.machine import host_memory_bytes
from torchdlrm.units import show_bytes

# Of torch on GPUs and on the host, of CUDA itself (pinned and managed memory), and of NCCL.
_SIGNS = ("can't allocate memory", "out of memory")
_ASKED = re.compile(r"tried to allocate ([\d.,]+ \w+)", re.IGNORECASE)
_PINNED = (
    ". Where the GPU has room, it was the host's memory, which CUDA pins for batches and copies and says the same of: "
    "checkpoint.asynchronous = false needs less of it"
)
# From here on memory that torch holds without using it is worth a word.
_MUCH = 0.1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error of torch, CUDA, NCCL, NumPy or Python says that memory has run out."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))


def describe_shortage(error: BaseException, device: torch.device) -> str:
    """What was asked for, what there is, and what to change; `error` is one of `is_out_of_memory`."""
    asked = _ASKED.search(str(error))
    if asked:
        number, unit = asked[1].split()
        wanted = f"it asked for {show_bytes(int(number)) if unit == 'bytes' else asked[1]}"
    else:
        wanted = str(error).partition("\n")[0] or type(error).__name__
    # Host memory may end on a GPU machine too, but never the other way round.
    if device.type == "cuda" and "DefaultCPUAllocator" not in str(error) and not isinstance(error, MemoryError):
        or_host = "" if isinstance(error, torch.OutOfMemoryError) else _PINNED
        return f"{wanted} on {device}{_held_on_gpu(device)}{or_host}"
    held_bytes = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (
        f"{wanted}; it has held up to {show_bytes(held_bytes)}, and this machine has {show_bytes(host_memory_bytes())} "
        "for all processes. Start fewer of them on a machine, save without a copy of the tables "
        "(checkpoint.asynchronous = false), or take smaller batches (train.batch_size_global, "
        "validation.batch_size_global); docs/faq.md#out-of-memory"
    )


def _held_on_gpu(device: torch.device) -> str:
    """Memory of a GPU, and what takes less of it."""
    held, in_pieces = "", ""
    with suppress(RuntimeError):  # after some errors CUDA answers nothing any more
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        free, total = torch.cuda.mem_get_info(device)
        held = (
            f", where {show_bytes(used)} are allocated, {show_bytes(reserved)} reserved by torch, and "
            f"{show_bytes(free)} of {show_bytes(total)} free"
        )
        if reserved - used > _MUCH * total:
            in_pieces = "; PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True leaves less of it in pieces"
    return (
        f"{held}. Let the plan leave more of it to the batches (a higher sharding.reserved_fraction), keep tables in "
        "host memory (sharding.cache_fraction), take smaller batches (train.batch_size_global, "
        f"validation.batch_size_global) or more GPUs{in_pieces}"
    )
