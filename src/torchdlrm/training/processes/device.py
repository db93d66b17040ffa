"""Chooses where a training computes: on a GPU for each process of the host, or on the processor.

In: what was seen of this machine (`SeenGPUs.now`) and `train.device`.  Out: `cuda` or `cpu`, or an error that says what
keeps the GPUs from being used. The CUDA build of FBGEMM is installed for GPUs: with it nothing computes on
the processor for hours only because a driver is too old. PyTorch's CUDA build alone means nothing: pip fetches it for
the CPU set-up too, where it computes on the processor.
"""

import ctypes
import os
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self

import torch

from torchdlrm.config import DeviceChoice
from torchdlrm.driverless import LIBRARY_NAME, fbgemm_build
from torchdlrm.errors import ConfigError

# Major compute capabilities that the wheels of fbgemm-gpu 1.8 and 1.9 have kernels for (sm_80, sm_90, sm_100, and no
# PTX, from which a driver could make others).
FBGEMM_CAPABILITIES = (8, 9, 10)
# The oldest driver that runs programs of a CUDA version, by NVIDIA's table of minor version compatibility.
_LEAST_DRIVER = {12: 525, 13: 580}
VISIBLE_VARIABLE = "CUDA_VISIBLE_DEVICES"


class GPU(NamedTuple):
    """A GPU as CUDA describes it."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int


@dataclass(frozen=True)
class SeenGPUs:
    """What this process sees of PyTorch, the driver and the GPUs.

    Attributes:
        torch: version of PyTorch.
        cuda: version of CUDA that PyTorch was built for; None for the CPU build.
        driver: version of NVIDIA's driver; None where none is found.
        gpus: that PyTorch can use, in its order.
        visible: what `CUDA_VISIBLE_DEVICES` says; None where it is not set.
        said: PyTorch's own words where it cannot use any.
        fbgemm: which build of FBGEMM is installed.
    """

    torch: str
    cuda: str | None
    driver: str | None
    gpus: tuple[GPU, ...]
    visible: str | None = None
    said: str = ""
    fbgemm: Literal["cuda", "cpu"] = "cuda"

    @classmethod
    def now(cls) -> Self:
        """Look at this machine; takes no memory of a GPU."""
        gpus: list[GPU] = []
        said = ""
        if torch.version.cuda is not None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")  # not only the first time in a process
                is_available = torch.cuda.is_available()
            said = " ".join(str(warning.message).partition(" (Triggered internally")[0] for warning in caught)
            for index in range(torch.cuda.device_count() if is_available else 0):
                found = torch.cuda.get_device_properties(index)
                gpus.append(GPU(found.name, (found.major, found.minor), found.total_memory))
        visible = os.environ.get(VISIBLE_VARIABLE)
        version = str(torch.__version__)
        return cls(version, torch.version.cuda, driver_version(), tuple(gpus), visible, said, fbgemm_build())

    @property
    def is_cpu_set_up(self) -> bool:
        """Whether what is installed cannot compute on a GPU, whatever there is."""
        return self.cuda is None or self.fbgemm == "cpu"

    @property
    def least_driver(self) -> int | None:
        """The major version of the oldest driver that this build of PyTorch runs with, where it is known."""
        return _LEAST_DRIVER.get(int(self.cuda.partition(".")[0])) if self.cuda else None

    @property
    def num_gpus(self) -> str:
        """How many there are, and of which names."""
        names = ", ".join(dict.fromkeys(gpu.name for gpu in self.gpus))
        return f"{len(self.gpus)} GPU{'s' * (len(self.gpus) != 1)}" + (f" ({names})" if names else "")

    def problem(self, num_processes: int, *, asks_for_kernels: bool = True) -> str:
        """What keeps `num_processes` of this host from computing on a GPU each, and what helps; empty if nothing.

        With `asks_for_kernels`, GPUs that FBGEMM's wheel has no kernels for are a problem too.
        """
        if self.is_cpu_set_up:
            what = f"PyTorch {self.torch}" if self.cuda is None else "FBGEMM (fbgemm-gpu-cpu)"
            return f"{what} is the CPU build; install the CUDA set-up in a venv of its own (make install EXTRA=gpu)"
        if not self.gpus:
            return self._why_there_is_none()
        if len(self.gpus) < num_processes:
            return (
                f"{num_processes} processes on this host want a GPU each, but it has {self.num_gpus}, driver "
                f"{self.driver or 'unknown'}{self._visible}; start {len(self.gpus)} or fewer (`nproc_per_node`)"
            )
        for gpu in self.gpus[:num_processes] if asks_for_kernels else ():
            if gpu.capability[0] not in FBGEMM_CAPABILITIES:
                built = ", ".join(f"{major}.x" for major in FBGEMM_CAPABILITIES)
                return (
                    f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, and FBGEMM's wheel "
                    f"has kernels for {built} alone; for a build of your own, cuda in place of auto takes it"
                )
        return ""

    def _why_there_is_none(self) -> str:
        least = self.least_driver
        wanted = f"{least} or newer" if least else "a newer one"
        about = f"this is the CUDA set-up (PyTorch {self.torch}), but"
        if self.driver is None:
            return f"{about} no NVIDIA driver is found here; install {wanted} (in a container: docker run --gpus all)"
        if least and int(self.driver.partition(".")[0]) < least:
            return f"{about} driver {self.driver} is too old for CUDA {self.cuda}; install {wanted}"
        said = f" (PyTorch says: {self.said})" if self.said else ""
        return (
            f"{about} driver {self.driver} shows no GPU{self._visible}{said}; see what nvidia-smi shows; a container "
            "needs docker run --gpus all"
        )

    @property
    def _visible(self) -> str:
        return "" if self.visible is None else f", {VISIBLE_VARIABLE} is {self.visible!r}"


def choose_device_type(
    choice: DeviceChoice, seen: SeenGPUs, *, num_processes: int, setting: str = "train.device"
) -> Literal["cuda", "cpu"]:
    """Where all processes of a host compute.

    Args:
        choice: `cpu`; `cuda`, which demands GPUs of whatever kind; or `auto`, which is `cpu` with the CPU build of
            PyTorch or FBGEMM and where an empty `CUDA_VISIBLE_DEVICES` hides all GPUs, and else demands some that
            FBGEMM's wheel has kernels for.
        seen: on this host.
        num_processes: of this host.
        setting: what messages call the choice.

    Raises:
        ConfigError: the GPUs that are demanded are not there.
    """
    if choice == "cpu" or (choice == "auto" and (seen.is_cpu_set_up or seen.visible == "")):
        return "cpu"
    problem = seen.problem(num_processes, asks_for_kernels=choice == "auto")
    if problem:
        raise ConfigError(f"{setting} = {choice}: {problem}; or set {setting} to cpu, which computes on the processor")
    return "cuda"


def rank_device(
    local_rank: int, local_world_size: int, choice: DeviceChoice = "auto", setting: str = "train.device"
) -> torch.device:
    """Where the rank of a host computes, on its own GPU or on the processor, as `choose_device_type` has it."""
    if choose_device_type(choice, SeenGPUs.now(), num_processes=local_world_size, setting=setting) == "cuda":
        return torch.device("cuda", local_rank)
    return torch.device("cpu")


def driver_version() -> str | None:
    """The version of NVIDIA's driver, as its library or the kernel tells it; None where there is none."""
    with suppress(OSError, AttributeError):
        nvml = ctypes.CDLL(LIBRARY_NAME)
        text = ctypes.create_string_buffer(80)
        if nvml.nvmlInit_v2() == 0 and nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text))) == 0:
            return text.value.decode()
    # A container that was started without GPUs has no library, but its kernel still tells.
    with suppress(OSError), open("/proc/driver/nvidia/version", encoding="utf-8") as file:  # noqa: PTH123
        found = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", file.readline())
        return found[1] if found else None
    return None
