"""Examines a machine with GPUs, runs tests/gpu and a short benchmark there, and writes one file to send.

    make gpu-check

In: this machine.  Out: gpu-report.json, with what `dlrm doctor`, the tests and `dlrm bench step` have said, each with
its exit code and seconds; under ten minutes. Where there is no GPU it says so, and has what the processor does.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DLRM = str(Path(sys.executable).with_name("dlrm"))
TESTS = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-n", "2", "-p", "no:cacheprovider"]
TEN_MINUTES_S = 600.0
_MAX_SAID_CHARACTERS = 20_000


def run(command: list[str], timeout_s: float) -> dict[str, Any]:
    """Run a command, at most for so long, and keep what it says at its end."""
    started_s = time.monotonic()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, said = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, said = process.communicate()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return {
        "command": " ".join(command),
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started_s, 1),
        "said": said[-_MAX_SAID_CHARACTERS:],
        "out": out[-_MAX_SAID_CHARACTERS:],
    }


def run_for_json(command: list[str], timeout_s: float) -> dict[str, Any]:
    """As `run`, of a command that takes --json: its object is the `result`; None where it has none."""
    found = run([*command, "--json"], timeout_s)
    lines = found.pop("out").splitlines()
    return {**found, "result": json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None}


def check(out: Path, budget_s: float) -> bool:
    """Run all three and write the report; whether everything worked."""
    deadline_s = time.monotonic() + budget_s

    def left(fraction: float) -> float:
        return max(1.0, fraction * (deadline_s - time.monotonic()))

    doctor = run_for_json([DLRM, "doctor"], left(0.5))
    device = ((doctor["result"] or {}).get("uses") or {}).get("device", "")
    num_gpus = int(device.split()[0]) if "cuda" in device else 0
    tests = run(TESTS, left(0.6))
    size = ["--rows-per-table", "1000000"] if num_gpus else ["--num-tables", "8", "--rows-per-table", "10000"]
    benchmark: dict[str, Any] = {}
    for num_processes in sorted({1, num_gpus or 1}):
        # Rows of each GPU: with fewer, a step is bound by the host.
        batch = ["--train.batch-size-global", str(16_384 * num_processes if num_gpus else 512)]
        options = ["--rounds", "3", "--steps-per-round", "20" if num_gpus else "3", "--nproc-per-node"]
        command = [DLRM, "bench", "step", *batch, *size, *options, str(num_processes)]
        benchmark[str(num_processes)] = run_for_json(command, left(0.5))
    works = all(part["exit_code"] == 0 for part in (doctor, tests, *benchmark.values()))
    report = {
        "num_gpus": num_gpus,
        "works": works,
        "doctor": doctor,
        "tests": tests,
        "bench_step_by_num_processes": benchmark,
    }
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(summary(report))
    return works


def summary(report: dict[str, Any]) -> str:
    """The report in a few lines."""
    num_gpus = report["num_gpus"]
    lines = [f"{num_gpus} GPU(s)" if num_gpus else "there is no GPU that a training would use: this is the processor"]
    for name in ("doctor", "tests"):
        part = report[name]
        last = ([line for line in (part["said"] + part.get("out", "")).splitlines() if line.strip()] or [""])[-1]
        lines.append(f"{name}: exit code {part['exit_code']}, {part['seconds']:.0f} s: {last}")
    for number, part in report["bench_step_by_num_processes"].items():
        rows = "no result" if part["result"] is None else f"{part['result']['rows_per_s']:,.0f} rows/s"
        lines.append(f"bench step, {number} process(es): exit code {part['exit_code']}, {rows}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("gpu-report.json"))
    parser.add_argument("--budget-s", type=float, default=TEN_MINUTES_S - 20)
    options = parser.parse_args()
    everything_works = check(options.out, options.budget_s)
    print(f"wrote {options.out}")
    sys.exit(0 if everything_works else 1)
