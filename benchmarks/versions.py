"""Our training step on several sets of versions, by turns: each in an environment of its own, in one run.

    python benchmarks/versions.py .venv/bin/python .venv-newest/bin/python --json versions.json

In: Pythons of environments in which torchdlrm is installed.  Out: rows per second of the paper's model (batch 2,048,
26 tables of 100,000 x 128) and of criteo-small, medians of the turns, and of their ratios to the first environment's.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CONFIGS = {"the paper's model": None, "criteo-small": "criteo-small"}
_TURN_S = 0.5


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="+", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--steps-of", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.steps_of:
        do_steps(CONFIGS[asked.steps_of])
        return
    found: list[dict[str, Any]] = []
    for name in CONFIGS:
        processes = [Environment(python, name) for python in asked.pythons]
        turns = [[process.turn() for process in processes] for _ in range(asked.rounds + 1)][1:]
        for process, seconds in zip(processes, zip(*turns, strict=True), strict=True):
            ratios = [first[0] / here for first, here in zip(turns, seconds, strict=True)]
            found.append(
                {
                    "model": name,
                    **process.versions,
                    "rows_per_s": process.rows / statistics.median(seconds),
                    "ratio": statistics.median(ratios),
                    "ratios": sorted(ratios),
                }
            )
            process.close()
    print("| model | Python | torch | FBGEMM | TorchRec | rows/s | times the first |\n" + "| --- " * 7 + "|")
    for one in found:
        cells = [one[key] for key in ("model", "python", "torch", "fbgemm_gpu", "torchrec")]
        print("|", " | ".join(cells), f"| {one['rows_per_s']:,.0f} | {one['ratio']:.3f} |")
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=1) + "\n")


class Environment:
    """A process of another Python that does steps on demand.

    Attributes:
        rows: of a step.
        versions: of what computes there.
    """

    def __init__(self, python: str, name: str) -> None:
        command = [python, __file__, python, "--steps-of", name]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        about = json.loads(self._answer())
        self.rows: int = about.pop("rows")
        self.versions: dict[str, str] = about
        self._steps = 3
        self._steps = max(self._steps, round(_TURN_S / self.turn()))

    def turn(self) -> float:
        """The seconds of a step, mean of a turn."""
        assert self._process.stdin is not None
        print(self._steps, file=self._process.stdin, flush=True)
        return float(self._answer())

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        return line or sys.exit("a process has ended: its errors stand above")


def do_steps(config_name: str | None) -> None:
    """Read numbers of steps, do as many, and print the seconds of one."""
    os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads
    from torchdlrm.bench.competitors import Case, our_step  # noqa: PLC0415 - of the environment that is measured
    from torchdlrm.config import load_config  # noqa: PLC0415
    from torchdlrm.training.compute import choose_precision  # noqa: PLC0415
    from torchdlrm.training.environment import versions  # noqa: PLC0415
    from torchdlrm.training.processes.process_group import join_process_group  # noqa: PLC0415

    config = load_config(config_name, {} if config_name else {"train.batch_size_global": "2048"})
    with join_process_group(device="cpu") as ranks:
        case = Case(config, {f"cat_{i}": 100_000 for i in range(26)})
        precision = choose_precision(config, case.shape, ranks.device)
        step = our_step(ranks, Case(config, case.num_embeddings, dtype=precision.dtype))
        print(json.dumps({"rows": config.train.batch_size_global, **versions()}), flush=True)
        for line in sys.stdin:
            started_s = time.perf_counter()
            for _ in range(int(line)):
                step()
            print((time.perf_counter() - started_s) / int(line), flush=True)


if __name__ == "__main__":
    main()
