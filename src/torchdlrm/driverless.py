"""Lets FBGEMM's CUDA build be imported on a host without NVIDIA's driver: a login node, the build of an image, CI.

It is linked against `libnvidia-ml.so.1`, which comes with the driver alone, and asks it about links between GPUs when
embeddings are exchanged by them. Where that library is missing, one of the package takes its place (`stand_in/nvml.c`),
in this process and its children, in which every function answers "driver not loaded". Plans, exports and predictions
then work as in the CPU set-up; what wants a GPU is refused, because PyTorch sees none.
"""

import ctypes
import os
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Literal

LIBRARY_NAME = "libnvidia-ml.so.1"
_STAND_IN = Path(__file__).with_name("stand_in") / LIBRARY_NAME


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
    if not _is_loadable(str(_STAND_IN)):
        return False
    os.environ["LD_PRELOAD"] = ":".join(filter(None, [str(_STAND_IN), os.environ.get("LD_PRELOAD")]))
    return True


def _is_loadable(name: str) -> bool:
    with suppress(OSError):
        ctypes.CDLL(name)
        return True
    return False
