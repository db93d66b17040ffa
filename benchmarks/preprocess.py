"""Times `dlrm preprocess` against upstream's preprocessing and against the floor, on one synthetic log.

    python benchmarks/preprocess.py --rows 2000000 --memory 4GB --json preprocess.json

Three things take turns, so that a busy machine is unfair to none:

    floor      Polars parses the whole file once to typed columns; nothing else, imports not counted
    dlrm       the whole command: start, parse, count, encode, shuffle, write, checksums
    upstream   tsv_to_npys, sparse_to_contiguous and shuffle of torchrec.datasets.criteo.BinaryCriteoUtils, on the first
               rows of the same file (--upstream-rows), imports not counted

Prints a table of the best of all rounds and writes every figure as JSON.  Needs the development dependencies.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

_SAMPLE_S = 0.02
FLOOR = """
import sys, time
import polars as pl
kinds = {"label": pl.Int8, **{f"int_{i}": pl.Int64 for i in range(13)}, **{f"cat_{i}": pl.String for i in range(26)}}
start = time.perf_counter()
pl.read_csv(sys.argv[1], has_header=False, separator="\\t", quote_char=None, schema=kinds)
print(time.perf_counter() - start)
"""
UPSTREAM = """
import contextlib, os, sys, time, warnings
warnings.simplefilter("ignore")
from torchrec.datasets.criteo import BinaryCriteoUtils as Utils
folder, rows = sys.argv[1], [int(count) for count in sys.argv[2:]]
start = time.perf_counter()
with contextlib.redirect_stdout(sys.stderr):
    for name in ("npy", "contiguous", "shuffled"):
        os.mkdir(f"{folder}/{name}")
    for day in range(len(rows)):
        names = [f"{folder}/npy/day_{day}_{kind}.npy" for kind in ("dense", "sparse", "labels")]
        Utils.tsv_to_npys(f"{folder}/day_{day}", *names, dataset_name="criteo_kaggle")
    sparse = [f"{folder}/npy/day_{day}_sparse.npy" for day in range(len(rows))]
    Utils.sparse_to_contiguous(sparse, f"{folder}/contiguous", output_file_suffix=".npy")
    Utils.shuffle(f"{folder}/npy", f"{folder}/contiguous", f"{folder}/shuffled", dict(enumerate(rows)), days=len(rows))
print(time.perf_counter() - start)
"""


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--upstream-rows", type=int, default=200_000, help="0 leaves upstream out")
    parser.add_argument("--no-floor", action="store_true", help="leave the floor out: it holds the whole log in memory")
    parser.add_argument("--memory", default="4GB")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--log", type=Path, help="a log in the Criteo layout, instead of a synthetic one")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--json", type=Path, help="where to write the measurements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="benchmark-preprocess-") as folder:
        log = arguments.log or _synthesize(Path(folder) / "log.tsv", arguments.rows)
        rows = _count_lines(log)
        rounds = [_round(Path(folder), log, arguments) for _ in range(arguments.rounds)]
    result = _summarize(rounds, rows, arguments)
    _show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _synthesize(path: Path, rows: int) -> Path:
    subprocess.run([*_dlrm(), "synthesize", "--rows", str(rows), "--out", str(path)], check=True)
    return path


def _dlrm() -> list[str]:
    return [sys.executable, "-c", "from torchdlrm.cli.main import main; main()"]


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 24), b""))


def _round(folder: Path, log: Path, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The three in turn; for each seconds, CPU seconds and peak memory of all its processes."""
    out = folder / "dataset"
    results = {} if arguments.no_floor else {"floor": _run([sys.executable, "-c", FLOOR, str(log)])}
    results["dlrm"] = _run([*_dlrm(), "preprocess", str(log), "--out", str(out), "--memory", arguments.memory])
    shutil.rmtree(out)
    if arguments.upstream_rows:
        upstream = folder / "upstream"
        upstream.mkdir()
        days = _write_days(log, upstream, arguments.upstream_rows)
        results["upstream"] = _run([sys.executable, "-c", UPSTREAM, str(upstream), *map(str, days)])
        shutil.rmtree(upstream)
    return results


def _write_days(log: Path, folder: Path, rows: int) -> list[int]:
    """The first rows of the log as two days, six sevenths and one: upstream holds out the last day."""
    counts = [rows - rows // 7, rows // 7]
    with log.open("rb") as file:
        for day, count in enumerate(counts):
            with (folder / f"day_{day}").open("wb") as target:
                target.writelines(file.readline() for _ in range(count))
    return counts


def _run(command: list[str]) -> dict[str, float]:
    start_s = time.perf_counter()
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak_bytes = 0
    usage: Any = None
    while usage is None:
        found, status, rusage = os.wait4(process.pid, os.WNOHANG)
        if found:
            usage = rusage
            process.returncode = os.waitstatus_to_exitcode(status)
            break
        peak_bytes = max(peak_bytes, _resident_bytes(process))
        time.sleep(_SAMPLE_S)
    seconds = time.perf_counter() - start_s
    output, errors = process.stdout.read(), process.stderr.read()
    if process.returncode:
        raise RuntimeError(errors)
    own = output.strip().splitlines()
    return {
        "seconds": float(own[-1]) if own else seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": peak_bytes,
    }


def _resident_bytes(process: psutil.Popen) -> int:
    try:
        return sum(member.memory_info().rss for member in (process, *process.children(recursive=True)))
    except psutil.Error:
        return 0


def _summarize(rounds: list[dict[str, dict[str, float]]], rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    rows_of = {"floor": rows, "dlrm": rows, "upstream": arguments.upstream_rows}
    best = {name: min(result[name]["seconds"] for result in rounds) for name in rounds[0]}
    per_s = {name: rows_of[name] / seconds for name, seconds in best.items()}
    return {
        "rows": rows,
        "memory": arguments.memory,
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}",
        "rows_per_s": per_s["dlrm"],
        "floor_rows_per_s": per_s.get("floor"),
        "upstream_rows_per_s": per_s.get("upstream"),
        "times_upstream": per_s["dlrm"] / per_s["upstream"] if "upstream" in per_s else None,
        "times_floor": best["dlrm"] / best["floor"] if "floor" in best else None,
        "peak_bytes": max(result["dlrm"]["peak_bytes"] for result in rounds),
        "rounds": rounds,
    }


def _show(result: dict[str, Any]) -> None:
    table = Table("", "rows/s", "best s", "CPU s", "peak MB")
    for name in result["rounds"][0]:
        measured = [found[name] for found in result["rounds"]]
        per_s = result["rows_per_s" if name == "dlrm" else f"{name}_rows_per_s"]
        table.add_row(
            name,
            f"{per_s:,.0f}",
            f"{min(m['seconds'] for m in measured):.2f}",
            f"{min(m['cpu_seconds'] for m in measured):.2f}",
            f"{max(m['peak_bytes'] for m in measured) / 1e6:,.0f}",
        )
    console = Console()
    console.print(table)
    console.print(f"{result['rows']:,} rows, --memory {result['memory']}, {result['machine']}")
    if result["times_floor"]:
        console.print(f"dlrm takes {result['times_floor']:.1f} times the floor's time")
    if result["times_upstream"]:
        console.print(f"dlrm gives {result['times_upstream']:.1f} times upstream's rows/s")


if __name__ == "__main__":
    main()
