"""Looks at the machine without importing what could be broken: processor, memory, system, GPUs by their driver."""

import os
import platform
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

from torchdlrm.processor import describe_processor
from torchdlrm.units import show_bytes

_TIMEOUT_S = 20


def describe_machine() -> dict[str, str]:
    """Facts of this machine by name, as people read them."""
    usable, total = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    found = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}, {' '.join(platform.libc_ver())}",
        "processor": describe_processor(),
        "cores": f"{usable} usable of {total}" + _quota(),
        "memory": show_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) + _memory_limit(),
        "/dev/shm": show_bytes(shutil.disk_usage("/dev/shm").free) + " free" if Path("/dev/shm").is_dir() else "none",  # noqa: S108
    }
    return found | _gpus_by_their_driver()


def _quota() -> str:
    """The cores that a container may use, where they are bounded."""
    with suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        if quota != "max":
            return f", of which the container gets {int(quota) / int(period):g}"
    return ""


def _memory_limit() -> str:
    with suppress(OSError, ValueError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            return f", of which the container gets {show_bytes(int(limit))}"
    return ""


def _gpus_by_their_driver() -> dict[str, str]:
    """What nvidia-smi says, whatever PyTorch makes of it."""
    query = ["--query-gpu=name,memory.total,memory.used,compute_cap,driver_version", "--format=csv,noheader"]
    gpus = _nvidia_smi(*query)
    if not gpus:
        return {"GPUs": "none (nvidia-smi is not there, or shows none)"}
    found = {f"GPU {index}": line for index, line in enumerate(gpus.splitlines())}
    return found | ({"links": links} if len(found) > 1 and (links := _nvidia_smi("topo", "-m")) else {})


def _nvidia_smi(*arguments: str) -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return ""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(  # noqa: S603
            [program, *arguments], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ""
    return ""
