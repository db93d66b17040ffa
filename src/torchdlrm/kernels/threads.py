"""Deals work on arrays out to the threads that torch's own operators run on.

Threads of our own would fight for the cores with torch's, which spin for a while after each operator: on two cores a
thread that was woken meanwhile was put on the core of the one that woke it, and waited there for 3.5 ms.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

# With less work it takes longer to tell the other threads: some 20 microseconds.
MIN_FLOATS = 2**17
_PART_OF_A_TEAM = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def in_parts(num_items: int, floats_per_item: float, task: Callable[[int, int], object]) -> None:
    """Call task(first, end) for parts of the items at once, which must not depend on each other.

    Args:
        num_items: how many there are.
        floats_per_item: work of each, as numbers to read or write; for little work this thread does it all.
        task: compiled, so that it does not hold the interpreter's lock while it works.
    """
    num_parts = torch.get_num_threads()
    if num_parts == 1 or num_items * floats_per_item < MIN_FLOATS or _openmp() is None:
        task(0, num_items)
        return
    errors: list[BaseException] = []

    def run(_: object) -> None:
        part = _openmp().omp_get_thread_num()
        try:
            task(num_items * part // num_parts, num_items * (part + 1) // num_parts)
        except BaseException as error:  # noqa: BLE001 - raised below, in the thread that asked
            errors.append(error)

    _openmp().GOMP_parallel(_PART_OF_A_TEAM(run), None, num_parts, 0)
    if errors:
        raise errors[0]


def array_of(tensor: Tensor) -> NDArray[Any]:
    """The memory of a tensor on CPU; bfloat16, which NumPy does not know, is seen as its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


@cache
def _openmp() -> Any:
    """The OpenMP that torch itself runs on, whichever it is; None where torch has none."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return library if hasattr(library, "GOMP_parallel") else None
