"""Sets how this device computes: precision, threads, what is sent between ranks, and the reuse of freed memory.

Weights, tables, optimizer state, loss and metrics are float32 whatever the precision says; bfloat16 is for the matrix
products of the dense arch, the interaction arch and the over arch, forward and backward. What a device can do is asked
of it, not assumed.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torchrec.distributed.fbgemm_qcomm_codec import CommType, QCommsConfig, get_qcomm_codecs_registry

from torchdlrm.config import Config, TrainConfig
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.precision import Precision, precision_of_processor
from torchdlrm.tables.huge_pages import let_the_heap_grow_in_huge_pages
from torchdlrm.training.processes.process_group import Ranks

# Below this a step spends its time between kernels, and casting costs more than faster products save: a step of
# configs/criteo-small.toml (0.06e9) is slower in bfloat16, one of configs/quickstart.toml (0.45e9) a third faster.
MIN_BFLOAT16_FLOPS = 0.3e9
# Below this much work a step is so short that waking a second thread for each of its hundred kernels costs more than
# the thread saves: measured on two cores with the model of configs/criteo-small.toml.
FLOPS_PER_THREAD = 0.5e9
# From malloc.h: when to give memory at the top of the heap back, and how many buffers may bypass the heap.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = 2**31 - 1


def choose_precision(config: Config, shape: ModelShape, device: torch.device) -> Precision:
    """What `train.precision` says; `auto` is bfloat16 where the device multiplies it faster and the work is enough."""
    if config.train.precision != "auto":
        return Precision(getattr(torch, config.train.precision), "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU has it")
        return Precision(torch.float32, "the GPU has no bfloat16")
    precision = precision_of_processor()
    # Of the global batch: a run must not change its precision with the number of processes.
    is_short = shape.step_flops(config.train.batch_size_global) < MIN_BFLOAT16_FLOPS
    if precision.dtype == torch.bfloat16 and is_short:
        return Precision(torch.float32, "steps are too short for bfloat16 to pay")
    return precision


def set_threads(config: Config, shape: ModelShape, ranks: Ranks) -> None:
    """Let this process compute on CPU with `train.num_threads`, or with as many of its threads as its steps can use."""
    if ranks.device.type == "cpu":
        wanted = round(shape.step_flops(config.train.batch_size_global / ranks.world_size) / FLOPS_PER_THREAD)
        torch.set_num_threads(config.train.num_threads or max(1, min(torch.get_num_threads(), wanted)))


def allow_tf32(config: TrainConfig, device: torch.device) -> None:
    """Let a GPU multiply float32 matrices in TF32, with ten bits of mantissa, if the config wants it."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.tf32 else "highest")


@contextmanager
def exact_products() -> Iterator[None]:
    """Inside, float32 matrices are multiplied in float32 on every device, whatever the process allows elsewhere."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def communication_codecs(config: TrainConfig, device: torch.device) -> dict[str, Any] | None:
    """What TorchRec's sharder needs to send pooled embeddings as float16 and their gradients as bfloat16.

    These are the precisions of TorchRec's own example (golden_training): activations are small and want mantissa,
    gradients want range. TorchRec has no bfloat16 for gloo, so between CPUs gradients are float16 too and the smallest
    are lost: there it is for trials, and nothing that `auto` would choose.

    Args:
        config: of the training; `auto` takes float16 between GPUs.
        device: where this rank computes.

    Returns:
        The registry, or None where everything travels as it is.
    """
    precision = config.communication
    if precision == "auto":
        precision = "float16" if device.type == "cuda" else "float32"
    if precision == "float32":
        return None
    backward = CommType.BF16 if device.type == "cuda" else CommType.FP16
    return get_qcomm_codecs_registry(
        QCommsConfig(forward_precision=CommType.FP16, backward_precision=backward), device=device
    )


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory, since a training step asks for the same buffers again and again.

    glibc gives large buffers back to the kernel when they are freed and gets them again as untouched pages. For the
    paper's model at batch 2,048 that was 16,700 page faults a step, about a quarter of its time on two cores. It stays
    so until the process ends: glibc cannot be asked what it did before. Another C library is left alone.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_MMAP_MAX, 0)
        let_the_heap_grow_in_huge_pages()


def give_back_freed_memory() -> None:
    """Return what is free to the kernel, once: after something large that the steps do not need again."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
