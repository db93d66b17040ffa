"""Builds the pretended GPU's libraries from stubs/ and what torch and FBGEMM ask for; runs a command with them.

usage: libraries.py COMMAND...: runs it with PRETENDED_GPUS (1 where it is not set) pretended GPUs
"""

import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCES = Path(__file__).parent / "stubs"
BUILT = Path(__file__).parents[2] / "build" / "pretended_gpu"
PACKAGES = Path(sysconfig.get_path("purelib"))
HEADERS = PACKAGES / "triton" / "backends" / "nvidia" / "include"
# What torch and FBGEMM take from the runtime, cuBLAS and NCCL, and from the driver.
_OF_RUNTIME, _OF_DRIVER = re.compile(r"(__)?cuda|cublas|nccl"), re.compile(r"cu(?!File)[A-Z]")
RUNTIME, DRIVER, NVML = BUILT / "pretended_cuda.so", BUILT / "libcuda.so.1", BUILT / "libnvidia-ml.so.1"


def build():
    """Compile the libraries, where they are older than their sources or than torch."""
    sources = [*SOURCES.iterdir(), Path(__file__), PACKAGES / "torch" / "version.py"]
    newest_s = max(path.stat().st_mtime for path in sources)
    if all(path.is_file() and path.stat().st_mtime > newest_s for path in (RUNTIME, DRIVER, NVML)):
        return
    BUILT.mkdir(parents=True, exist_ok=True)
    runtime = [_compiled(SOURCES / f"{name}.c") for name in ("runtime", "cublas", "nccl")]
    driver = [_compiled(SOURCES / "driver.c")]
    asked = _symbols("--undefined-only", "-D", *PACKAGES.glob("torch/lib/*.so"), *PACKAGES.glob("fbgemm_gpu/*.so"))
    for library, objects, pattern in ((RUNTIME, runtime, _OF_RUNTIME), (DRIVER, driver, _OF_DRIVER)):
        rest = BUILT / f"rest_of_{library.stem}.c"
        missing = sorted({name for name in asked if pattern.match(name)} - _symbols("--defined-only", *objects))
        rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
        _gcc("-shared", "-o", library, *objects, _compiled(rest), "-ldl", "-lpthread")
    _gcc("-shared", "-o", NVML, _compiled(SOURCES / "nvml.c"))


def environment(num_gpus=1):
    """What a command must find in its environment to see so many GPUs."""
    folders = [str(BUILT), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"LD_PRELOAD": str(RUNTIME), "LD_LIBRARY_PATH": ":".join(folders), "PRETENDED_GPUS": str(num_gpus)}


def _compiled(source):
    target = BUILT / f"{source.stem}.o"
    # -fno-builtin: a stub of a name that gcc knows has other arguments.
    _gcc(
        "-c",
        "-O2",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-fno-builtin",
        f"-I{SOURCES}",
        f"-isystem{HEADERS}",
        "-o",
        target,
        source,
    )
    return target


def _symbols(*arguments):
    """The names that `nm` lists, without their versions."""
    told = subprocess.run(["nm", *map(str, arguments)], capture_output=True, text=True, check=True).stdout
    return {line.split()[-1].partition("@")[0] for line in told.splitlines() if line.strip() and ":" not in line}


def _gcc(*arguments):
    done = subprocess.run(["gcc", *map(str, arguments)], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr:
        sys.exit(f"gcc {' '.join(map(str, arguments))}\n{done.stderr}")


if __name__ == "__main__":
    build()
    command = sys.argv[1:]
    os.execvpe(command[0], command, {**os.environ, **environment(int(os.environ.get("PRETENDED_GPUS", "1")))})
