"""Lets FBGEMM's CUDA build be imported on a host without NVIDIA's driver: a login node, the build of an image, CI.

It is linked against `libnvidia-ml.so.1`, which comes with the driver alone, and asks it about links between GPUs when
somebody exchanges embeddings by them. Where that library is missing, one takes its place, in this process and its
children, in which every function answers "driver not loaded". Plans, exports and predictions then work as in the CPU
set-up; what wants a GPU is refused, because PyTorch sees none.
"""

import ctypes
import os
import platform
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import Literal

LIBRARY_NAME = "libnvidia-ml.so.1"
# What FBGEMM 1.8 takes of it. All must be there, for its libraries are linked at once when they are loaded.
_FUNCTIONS = (
    "nvmlInit_v2",
    "nvmlDeviceGetCount_v2",
    "nvmlDeviceGetHandleByIndex_v2",
    "nvmlDeviceGetPciInfo_v3",
    "nvmlDeviceGetNvLinkState",
    "nvmlDeviceGetNvLinkRemotePciInfo_v2",
)
_ANSWER = bytes.fromhex("b809000000c3")  # mov eax, 9 (NVML_ERROR_DRIVER_NOT_LOADED); ret
_PAGE_BYTES = 4096
_STAND_IN_PATH = re.compile(r"/proc/\d+/fd/\d+")


def fbgemm_build() -> Literal["cuda", "cpu"]:
    """Which build of FBGEMM is installed, by the name of its package: the CUDA one may have no import."""
    is_cpu, is_cuda = (any(metadata.distributions(name=name)) for name in ("fbgemm-gpu-cpu", "fbgemm-gpu"))
    return "cpu" if is_cpu and not is_cuda else "cuda"


def stand_in_for_driver() -> bool:
    """Make FBGEMM's CUDA build importable where there is no driver, here and in processes that are started from here.

    Returns:
        Whether that was needed.
    """
    if platform.machine() != "x86_64" or _is_loadable(LIBRARY_NAME) or fbgemm_build() == "cpu":
        return False
    # A file without a name: nothing is left of it, however this process ends.
    descriptor = os.memfd_create(LIBRARY_NAME)
    os.write(descriptor, stand_in_library())
    if not _is_loadable(f"/proc/self/fd/{descriptor}"):
        return False
    path = f"/proc/{os.getpid()}/fd/{descriptor}"
    os.environ["LD_PRELOAD"] = ":".join(filter(None, [path, os.environ.get("LD_PRELOAD")]))
    return True


@contextmanager
def hidden_stand_in() -> Iterator[None]:
    """For starting processes that may outlive this job, as a tracker's do: the library's path ends with the job."""
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = ":".join(path for path in before.split(":") if not _STAND_IN_PATH.fullmatch(path))
    try:
        yield
    finally:
        os.environ["LD_PRELOAD"] = before


def _is_loadable(name: str) -> bool:
    with suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False


def stand_in_library() -> bytes:
    """A shared library for Linux on x86-64 with the name and the functions of NVIDIA's, written without a compiler.

    ELF: a page with header, four segments, symbols, their hash table (of one chain), names and code; one with the
    dynamic section, which the linker writes to.
    """
    names = b"\0" + b"".join(name.encode() + b"\0" for name in (LIBRARY_NAME, *_FUNCTIONS))
    place_of = {name: names.index(b"\0" + name.encode() + b"\0") + 1 for name in (LIBRARY_NAME, *_FUNCTIONS)}
    num_symbols = len(_FUNCTIONS) + 1  # the first one is empty
    chain = [0, *range(2, num_symbols), 0]
    hashes = struct.pack(f"<{3 + num_symbols}I", 1, num_symbols, 1, *chain)
    symbols_at = 64 + 4 * 56
    hashes_at = symbols_at + 24 * num_symbols
    names_at = hashes_at + len(hashes)
    code_at = names_at + len(names)
    symbols = bytes(24) + b"".join(  # global functions, in no section that matters
        struct.pack("<IBBHQQ", place_of[name], 0x12, 0, 1, code_at, len(_ANSWER)) for name in _FUNCTIONS
    )
    soname, hash_table, strings, symbol_table, size_of_strings, size_of_symbol = 14, 4, 5, 6, 10, 11
    tags = (
        (soname, place_of[LIBRARY_NAME]),
        (hash_table, hashes_at),
        (strings, names_at),
        (symbol_table, symbols_at),
        (size_of_strings, len(names)),
        (size_of_symbol, 24),
        (0, 0),
    )
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0, 0, 64, 56, 4, 64, 0, 0)
    loaded, of_dynamic, of_stack = 1, 2, 0x6474E551  # without the last one the stack would have to be executable
    segments = b"".join(
        struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, alignment)
        for kind, flags, at, size, alignment in (
            (loaded, 5, 0, code_at + len(_ANSWER), _PAGE_BYTES),
            (loaded, 6, _PAGE_BYTES, len(dynamic), _PAGE_BYTES),
            (of_dynamic, 6, _PAGE_BYTES, len(dynamic), 8),
            (of_stack, 6, 0, 0, 16),
        )
    )
    return (header + segments + symbols + hashes + names + _ANSWER).ljust(_PAGE_BYTES, b"\0") + dynamic
