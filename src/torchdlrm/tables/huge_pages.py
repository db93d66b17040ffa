"""Asks Linux for huge pages for large tables in host memory.

Rows are looked up all over a table, so nearly each look-up misses the processor's cache of page addresses (TLB), which
covers a few MB in pages of 4 KiB; a miss costs as much as the row itself. With pages of 2 MiB looking up and updating
took two thirds of the time on an Intel Xeon.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

from torchdlrm.tables.optimizers import table_kernels

_PAGE_BYTES = 2**21
_MIN_BYTES = 16 * _PAGE_BYTES  # what fits in the caches gains nothing
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # from Linux's mman-common.h


def huge_pages_policy() -> str:
    """What the system does: `always`, `madvise` (where a program asks, as we do), `never`, or `unknown`."""
    with suppress(OSError, IndexError):
        return _POLICY.read_text().split("[")[1].split("]")[0]
    return "unknown"


def use_huge_pages(model: nn.Module) -> None:
    """Let large tables and their state lie in huge pages, where the system has them.

    Args:
        model: sharded just now: its tables become zero, and weights are drawn or loaded afterwards.
    """
    for kernel in table_kernels(model):
        if kernel.use_cpu:
            for tensor in (*kernel.parameters(), *kernel.buffers()):
                if tensor.nbytes >= _MIN_BYTES:
                    _ask_for_huge_pages(tensor)


def _ask_for_huge_pages(tensor: Tensor) -> None:
    """Give back the pages that lie wholly within a tensor: they come anew, as zeros, when they are written to."""
    tensor.detach().zero_()
    begin = -(-tensor.data_ptr() // _PAGE_BYTES) * _PAGE_BYTES
    end = (tensor.data_ptr() + tensor.nbytes) // _PAGE_BYTES * _PAGE_BYTES
    libc = ctypes.CDLL(None)
    address, length = ctypes.c_void_p(begin), ctypes.c_size_t(end - begin)
    if libc.madvise(address, length, _MADV_HUGEPAGE) == 0:  # else this kernel has none
        libc.madvise(address, length, _MADV_DONTNEED)
