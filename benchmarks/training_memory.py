"""Resident memory of `dlrm train` over many steps, compared with the bytes of its tables and their optimizer's state.

    python benchmarks/training_memory.py --dataset dataset --steps 10000 --json memory.json

Everything after `--` goes to `dlrm train`. The memory of all processes is sampled four times a second. It is flat when
the last tenth of the steps needs no more than the second tenth.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import psutil


def main() -> None:
    """Train, sample, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="written by dlrm preprocess")
    parser.add_argument("--steps", type=int, default=10_000, help="optimizer steps")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    parser.add_argument("train_options", nargs="*", help="for dlrm train: a config, then keys to override")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(options.dataset, Path(folder) / "run", options.steps, options.train_options)
    for name, value in figures.items():
        print(f"{name:<36} {value:,.3f}" if isinstance(value, float) else f"{name:<36} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def measure(dataset: Path, run: Path, steps: int, train_options: list[str]) -> dict[str, float | bool | str]:
    """Figures of one training; GB is 10^9 bytes."""
    command = [
        *(str(Path(sys.executable).with_name("dlrm")), "train", *train_options),
        *("--dataset", str(dataset), "--run", str(run), "--train.max-steps", str(steps), "--train.epochs", "1000"),
    ]
    dry = subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True, text=True)
    ranks = json.loads(dry.stdout)["plan"]["ranks"]
    state_gb = sum(rank["weight_bytes"] + rank["state_bytes"] for rank in ranks) / 1e9
    process = psutil.Popen(command, stderr=subprocess.DEVNULL)
    samples_gb: list[float] = []
    clock = threading.Event()
    while process.poll() is None:
        try:
            family = [process, *process.children(recursive=True)]
            samples_gb.append(sum(member.memory_info().rss for member in family) / 1e9)
        except psutil.NoSuchProcess:
            continue
        clock.wait(0.25)
    assert process.returncode == 0, f"dlrm train ended with {process.returncode}"
    tenth = max(1, len(samples_gb) // 10)
    tenths = [statistics.median(samples_gb[start : start + tenth]) for start in range(0, 10 * tenth, tenth)]
    limit_gb = 1.2 * state_gb + len(ranks)
    return {
        "tables_and_state_gb": state_gb,
        "limit_gb (1.2 x + 1 a process)": limit_gb,
        "peak_gb": max(samples_gb),
        "median_gb of each tenth": " ".join(f"{gb:.3f}" for gb in tenths),
        "growth from the second to the last": tenths[-1] / tenths[1] - 1.0,
        "within_limit": max(samples_gb) <= limit_gb,
    }


if __name__ == "__main__":
    main()
