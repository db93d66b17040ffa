"""How long it takes to judge many predicted rows with intervals, and how much memory it needs.

    python benchmarks/judge.py --rows 10000000 100000000 --json judge.json

For each number of rows a file of predictions is made (Parquet: label, logit, and where the variant has them a weight, a
user) and judged in a process of its own by what `dlrm evaluate FILE` calls: the file is read, then every metric is
computed with its interval of 95 %. With --compare a second model's predictions of the same rows are compared with them,
by what `dlrm compare FILE FILE` calls. CPU time, of all threads, and peak memory are those of the process, with Python
and its libraries. Nothing is predicted, so this is what judging adds to predicting.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

VARIANTS = {"plain": (), "weighted": ("weight",), "grouped": ("user",), "weighted, grouped": ("weight", "user")}
_BLOCK_ROWS = 1 << 20
_ROWS_A_USER = 20


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000], help="how many are judged")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS], help="what rows have")
    parser.add_argument("--compare", action="store_true", help="compare two files, too")
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    parser.add_argument("--one", nargs="+", metavar=("JOB", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        job, *files = options.one
        figures = JOBS[job](*map(Path, files))
        print(json.dumps(figures | {"cpu_s": time.process_time(), "peak_mb": peak_mb()}))
        return
    found = []
    times = f"{'read s':>7} {'metrics s':>9} {'all s':>7} {'CPU s':>7}"
    print(f"{'rows':>12}  {'job':<9} {'variant':<18} {times} {'peak MB':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            for variant in options.variants:
                files = [Path(folder) / name for name in ("p.parquet", "q.parquet")]
                for noise, file in zip((0.7, 0.72), files, strict=True):
                    write_rows(file, rows, VARIANTS[variant], noise)
                for job in ("evaluate", *(["compare"] if options.compare else [])):
                    command = [sys.executable, __file__, "--one", job, *map(str, files)]
                    started_s = time.perf_counter()
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    figures = json.loads(done.stdout) | {"all_s": time.perf_counter() - started_s}
                    found.append({"rows": rows, "job": job, "variant": variant, **figures})
                    print(
                        f"{rows:>12,}  {job:<9} {variant:<18} {figures['read_s']:>7.1f} {figures['metrics_s']:>9.1f} "
                        f"{figures['all_s']:>7.1f} {figures['cpu_s']:>7.1f} {figures['peak_mb']:>8,.0f}"
                    )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def write_rows(path: Path, rows: int, columns: tuple[str, ...], noise: float) -> None:
    """Write predicted rows whose labels are drawn from a truth that the model knows with noise of this deviation."""
    rng, writer = np.random.default_rng(rows), None
    for start in range(0, rows, _BLOCK_ROWS):
        size = min(_BLOCK_ROWS, rows - start)
        truth = rng.normal(-2.5, 1.2, size)
        block: dict[str, Any] = {
            "label": (rng.random(size) < 1 / (1 + np.exp(-truth))).astype(np.int8),
            "logit": (truth + rng.normal(0, noise, size)).astype(np.float32),
        }
        if "weight" in columns:
            block["weight"] = rng.choice(np.array([0.5, 1, 3], np.float32), size)
        if "user" in columns:
            block["user"] = rng.integers(0, max(1, rows // _ROWS_A_USER), size)
        table = pa.table(block)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd", compression_level=1)
        writer.write_table(table)
    assert writer is not None, "at least one row"
    writer.close()


def evaluate(file: Path, _: Path) -> dict[str, float]:
    """What `dlrm evaluate FILE` does, with its times."""
    from torchdlrm.evaluation.predictions import Asked, predicted_rows  # noqa: PLC0415 - in the process that is measured
    from torchdlrm.metrics import estimates  # noqa: PLC0415

    has_groups = "user" in pl.read_parquet_schema(file)
    started_s = time.perf_counter()
    rows = predicted_rows(file, Asked(group="user" if has_groups else None))
    read_s = time.perf_counter() - started_s
    assert rows is not None, "of a file"
    estimates(rows.judged)
    return {"read_s": read_s, "metrics_s": time.perf_counter() - started_s - read_s}


def compare(*files: Path) -> dict[str, float]:
    """What `dlrm compare FILE FILE` does; reading takes part in the time of the metrics."""
    from torchdlrm import compare as compare_models  # noqa: PLC0415 - in the process that is measured

    has_groups = "user" in pl.read_parquet_schema(files[0])
    started_s = time.perf_counter()
    compare_models(*files, group="user" if has_groups else None, progress=False)
    return {"read_s": 0.0, "metrics_s": time.perf_counter() - started_s}


def peak_mb() -> float:
    """The most memory that this process has had so far."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1e3


JOBS: dict[str, Callable[..., dict[str, float]]] = {"evaluate": evaluate, "compare": compare}


if __name__ == "__main__":
    main()
