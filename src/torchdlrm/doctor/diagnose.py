"""Examines this machine: facts here, and what may crash or hang in a program of its own (`torchdlrm.doctor.probe`)."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from torchdlrm.doctor.findings import Check, Diagnosis
from torchdlrm.doctor.machine import describe_machine
from torchdlrm.doctor.packages import check_installed
from torchdlrm.doctor.probe import FINDINGS_NAME

# Several times what it takes on a machine that has just started, with packages on a network disk.
TIMEOUT_S = 300.0
_MAX_SAID_LINES = 5
# Inside a job of torchrun or Slurm these would make us wait for its other processes.
_OF_LAUNCHERS = frozenset(("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def diagnose(timeout_s: float = TIMEOUT_S) -> Diagnosis:
    """What this machine has, what torchdlrm will use of it, and whether it works.

    Works where packages are missing or broken: they are imported by another process alone.

    Args:
        timeout_s: how long the checks may take before what is running then is called hanging.
    """
    versions, checks = check_installed()
    diagnosis = Diagnosis(machine=describe_machine(), packages=versions, checks=checks)
    with tempfile.TemporaryDirectory(prefix="torchdlrm-doctor-") as folder:
        ended = _run_probe(Path(folder), timeout_s)
        findings = Path(folder) / FINDINGS_NAME
        lines = findings.read_text(encoding="utf-8").splitlines() if findings.exists() else []
    read_findings(lines, ended, diagnosis)
    return diagnosis


def read_findings(lines: list[str], ended: str, diagnosis: Diagnosis) -> None:
    """Add what a probe has written down to a diagnosis.

    Args:
        lines: JSON, as the probe has written them.
        ended: how it ended before its time; empty where it came to its end.
        diagnosis: receives it.
    """
    begun = {"name": "start", "remedy": "start the same command again; if it fails again, report it"}
    for line in lines:
        for kind, facts in json.loads(line).items():
            if kind == "machine":
                diagnosis.machine |= facts
            elif kind == "uses":
                diagnosis.uses |= facts
            elif kind == "check":
                diagnosis.checks.append(Check(**facts))
            else:
                begun = facts
    if ended:
        diagnosis.checks.append(Check(begun["name"], "failed", ended, begun["remedy"]))


def _run_probe(folder: Path, timeout_s: float) -> str:
    """Run the probe; how it ended where that was not its own end."""
    command = [sys.executable, "-m", "torchdlrm.doctor.probe", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS}
    with (folder / "said").open("w+", encoding="utf-8") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment, start_new_session=True)  # noqa: S603
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:  # also at Ctrl-C
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        if code == 0:
            return ""
        said.seek(0)
        last = " / ".join(line.strip() for line in said.read().splitlines()[-_MAX_SAID_LINES:] if line.strip())
    if code is None:
        how = f"has not answered for {timeout_s:g} s"
    else:
        how = f"the process died by {signal.Signals(-code).name}" if code < 0 else f"the process ended with {code}"
    return f"{how}; its last words: {last}" if last else how
