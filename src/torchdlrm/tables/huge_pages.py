"""Asks Linux for huge pages for large tables in host memory, and for what a step computes.

Rows are looked up all over a table, so nearly each look-up misses the processor's cache of page addresses (TLB), which
covers a few MB in pages of 4 KiB; a miss costs as much as the row itself. With pages of 2 MiB looking up and updating
took two thirds of the time on an Intel Xeon.
"""

import ctypes
from contextlib import suppress
from pathlib import Path

from torch import Tensor, nn

_PAGE_BYTES = 2**21
_MIN_BYTES = 16 * _PAGE_BYTES  # what fits in the caches gains nothing
_HEAP_BYTES = 3 * 2**29  # below 2 GiB, from which on glibc shrinks the heap whatever its settings are
_POLICY = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MADV_DONTNEED, _MADV_HUGEPAGE = 4, 14  # from Linux's mman-common.h


def huge_pages_policy() -> str:
    """What the system does: `always`, `madvise` (where a program asks, as we do), `never`, or `unknown`."""
    with suppress(OSError, IndexError):
        return _POLICY.read_text().split("[")[1].split("]")[0]
    return "unknown"


def use_huge_pages(tables: nn.Module) -> None:
    """Let large weights and state on CPU lie in huge pages, where the system has them; all of those become zero."""
    for tensor in (*tables.parameters(), *tables.buffers()):
        if tensor.nbytes >= _MIN_BYTES:
            _ask_for_huge_pages(tensor)


def _ask_for_huge_pages(tensor: Tensor) -> None:
    """Give back the pages that lie wholly within a tensor: it gets new ones, all zeros, when it is written to."""
    tensor.detach().zero_()
    if _advise(tensor.data_ptr(), tensor.nbytes, _MADV_HUGEPAGE):
        _advise(tensor.data_ptr(), tensor.nbytes, _MADV_DONTNEED)


def let_the_heap_grow_in_huge_pages() -> None:
    """Have what C's heap gives out next lie in huge pages; untouched, it takes no memory.

    Pages that a process touches one by one lie all over the machine's memory: with huge ones all element-wise work of a
    step is faster, which took 38 ms instead of 43 with the paper's model on an Intel Xeon. Only for a process that
    keeps freed memory: else the heap would shrink again at once.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.malloc.restype = ctypes.c_void_p
        begin = libc.malloc(ctypes.c_size_t(_HEAP_BYTES))
        if begin is not None:
            _advise(begin, _HEAP_BYTES, _MADV_HUGEPAGE)
            libc.free(ctypes.c_void_p(begin))


def _advise(begin: int, num_bytes: int, advice: int) -> bool:
    """Advise Linux about the huge pages that lie wholly within; whether it knows this advice."""
    first, end = -(-begin // _PAGE_BYTES) * _PAGE_BYTES, (begin + num_bytes) // _PAGE_BYTES * _PAGE_BYTES
    return ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), advice) == 0
