"""Imports what computes and tries it: a program of its own, which may crash or hang.

    python -m torchdlrm.doctor.probe FOLDER

In: an empty folder for a small log, runs and a bundle.  Out: FOLDER/findings.jsonl, a line at a time, so that the
process that started this one knows what it was doing when it ended.
"""

import importlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from torchdlrm.doctor.findings import AFRESH, Check
from torchdlrm.errors import TorchDLRMError
from torchdlrm.versions import installed

FINDINGS_NAME = "findings.jsonl"
_DRIVER = (
    "FBGEMM's CUDA build needs NVIDIA's driver: install it (580 or newer for CUDA 13; in a container: docker run "
    "--gpus all), or use the CPU set-up in a venv of its own (make install)"
)
_DEVICE = "see docs/gpu.md; until then train.device = cpu (--train.device cpu) computes on the processor"
_DISK = "make room in the folder for temporary files, or name another one (TMPDIR)"
_REPORT = "see the troubleshooting in docs/gpu.md; if this message is not there, report it with the output of --json"
_GLOO = "processes of this machine cannot talk to each other: name the network to use, GLOO_SOCKET_IFNAME=lo"
_NCCL = (
    "NCCL_DEBUG=INFO tells what NCCL does, NCCL_SOCKET_IFNAME names the network, NCCL_P2P_DISABLE=1 avoids links "
    "between GPUs that do not work; a container needs --shm-size 8g --ulimit memlock=-1"
)

Task = Callable[[], str]
Remedy = str | Callable[[BaseException], str]


class Findings:
    """Makes checks and writes down what they find, as they find it.

    Args:
        path: of the file, which need not be there.

    Attributes:
        worked: names of the checks that worked.
        num_gpus: that a training would use; known once the device was seen.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.worked: set[str] = set()
        self.num_gpus = 0

    def tell(self, kind: str, facts: Mapping[str, Any]) -> None:
        """Write a line: `machine` or `uses` with facts by name, `check`, or `begun` with what would be its failure."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({kind: facts}) + "\n")

    def try_out(self, name: str, task: Task, remedy: Remedy, needs: str = "") -> None:
        """Do something and write down whether it worked.

        Args:
            name: of the check.
            task: gives what was seen.
            remedy: what to do if it fails.
            needs: the check that must have worked before; empty if none.
        """
        if needs and needs not in self.worked:
            self.tell("check", asdict(Check(name, "not run", f"needs what did not work: {needs}")))
            return
        self.tell("begun", {"name": name, "remedy": remedy if isinstance(remedy, str) else AFRESH})
        started_s = time.perf_counter()
        try:
            seen = task()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is what we were asked to find
            helps = remedy if isinstance(remedy, str) else remedy(error)
            check = Check(name, "failed", describe(error), helps, time.perf_counter() - started_s)
        else:
            check = Check(name, "ok", seen, "", time.perf_counter() - started_s)
            self.worked.add(name)
        self.tell("check", asdict(check))


def describe(error: BaseException) -> str:
    """An error with what has caused it, in a line; one of ours says that itself."""
    if isinstance(error, TorchDLRMError):
        return " ".join(str(error).split())
    said = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
    return said if error.__cause__ is None else f"{said}; caused by {describe(error.__cause__)}"


def import_package(name: str) -> str:
    """Import a package of the engine, and say which version came from where."""
    logging.getLogger().addHandler(logging.NullHandler())  # FBGEMM writes to the root logger what it then raises
    module = importlib.import_module(name)
    return f"{getattr(module, '__version__', 'unknown version')}, {Path(str(module.__file__)).parent}"


def why_no_import(error: BaseException) -> str:
    """What helps where FBGEMM cannot be imported."""
    said = describe(error)
    return _DRIVER if "libnvidia-ml" in said or "libcuda.so" in said else AFRESH


def examine(findings: Findings, folder: Path) -> None:
    """Make all checks, each where what it needs has worked."""
    for name, remedy, needs in (
        ("polars", AFRESH, ""),
        ("torch", AFRESH, ""),
        ("fbgemm_gpu", why_no_import, "import torch"),
        ("torchrec", AFRESH, "import fbgemm_gpu"),
    ):
        if name == "torchrec" and not installed(name):  # one that only serves; what trains then needs what is not here
            continue
        findings.try_out(f"import {name}", partial(import_package, name), remedy, needs)
    findings.try_out("device", _later("device", "see_device", findings), _DEVICE, "import torch")
    engine, places = "import torchrec", ["cpu"] + ["cuda"] * (findings.num_gpus > 0)
    findings.try_out("dataset", _later("self_test", "make_dataset", findings, folder), _DISK, engine)
    for place in places:
        num = 2 if place == "cpu" else findings.num_gpus
        title = f"all-to-all of {num} processes by " + ("gloo" if place == "cpu" else "NCCL")
        network = _GLOO if place == "cpu" else _NCCL
        findings.try_out(title, _later("self_test", "exchange_all_to_all", place, num), network, engine)
    for place in places:
        num = findings.num_gpus if place == "cuda" else 1
        findings.try_out(_step(place), _later("self_test", "train_steps", folder, place, num), _REPORT, "dataset")
    findings.try_out("checkpoint", _later("self_test", "load_checkpoint", folder, places[-1]), _DISK, _step(places[-1]))
    findings.try_out("bundle", _later("self_test", "score_by_bundle", folder, places[-1]), _DISK, "checkpoint")


def _step(place: str) -> str:
    return "steps on " + ("the processor" if place == "cpu" else "each GPU")


def _later(module: str, function: str, *arguments: Any) -> Task:
    """A function of this room that is imported when it is called: what it imports may be broken."""

    def call() -> str:
        return getattr(importlib.import_module(f"torchdlrm.doctor.{module}"), function)(*arguments)

    return call


if __name__ == "__main__":
    examine(Findings(Path(sys.argv[1]) / FINDINGS_NAME), Path(sys.argv[1]))
