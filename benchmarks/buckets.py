"""Measures `dlrm preprocess` from and to a bucket next to a disk, and kills it, and its requests, at random moments.

    python benchmarks/buckets.py rates --rows 600000 --rounds 3 --json rates.json
    python benchmarks/buckets.py faults --rows 100000 --kills 20 --json faults.json

The bucket is of a real S3 server (moto's) on the loopback interface, behind a proxy with latency, a bandwidth limit and
faults, both in processes of their own: on a machine of two cores they take part of them, which `CPU s`, of the command
alone, does not count.

    rates    rows/s, start included, of a log on a disk and in a bucket, as text and packed, by turns; medians
    faults   kill -9 at random moments while 5 % of the requests are answered 503 and 5 % of the answers are cut; 30 s
             of 503 alone; credentials that expire and a bucket that vanishes in the middle. After each the same command
             ends with the bytes of a disk, and at no moment a manifest is there without all of its files

Prints tables and writes every figure as JSON.  Needs the development dependencies.
"""

import argparse
import gzip
import importlib
import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchdlrm.storage import objects

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
_buckets: Any = importlib.import_module("helpers.buckets")
_OUT = "s3://clicks/dataset"


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "faults"))
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--latency-s", type=float, default=0.02)
    parser.add_argument("--bytes-per-s", type=float, default=100e6)
    parser.add_argument("--outage-s", type=float, default=30)
    parser.add_argument("--json", type=Path, help="where to write the measurements")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmark-buckets-") as name, _buckets.s3_server() as server:
        folder = Path(name)
        with _buckets.far_away(
            server, latency_s=arguments.latency_s, bytes_per_s=arguments.bytes_per_s, seed=1
        ) as faults:
            os.environ.update(server.environment)
            log = folder / "log.tsv"
            _dlrm("synthesize", "--rows", str(arguments.rows), "--out", log)
            packed = folder / "log.tsv.gz"
            packed.write_bytes(gzip.compress(log.read_bytes(), 1))
            for path in (log, packed):
                objects.write(f"s3://clicks/{path.name}", path)
            measure = _rates if arguments.what == "rates" else _faults
            rows = measure(folder, faults, arguments)
    _show(rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"arguments": vars(arguments) | {"json": None}, "rows": rows}, indent=2))


def _rates(folder: Path, faults: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    local = {name: folder / name for name in ("log.tsv", "log.tsv.gz")}
    jobs: dict[str, tuple[str | Path, str | Path]] = {}
    for name, path in local.items():
        jobs[f"{name}, disk to disk"] = (path, folder / "out")
        jobs[f"{name}, bucket to disk"] = (f"s3://clicks/{name}", folder / "out")
        jobs[f"{name}, bucket to bucket"] = (f"s3://clicks/{name}", _OUT)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in jobs}
    for _ in range(arguments.rounds):
        for name, (log, out) in jobs.items():
            shutil.rmtree(folder / "out", ignore_errors=True)
            with _away(folder, faults) as environment:
                before, started_s = _cpu_s(), time.perf_counter()
                done = _dlrm("preprocess", log, "--out", out, "--overwrite", environment=environment)
                assert done.returncode == 0, done.stderr
                taken[name].append((time.perf_counter() - started_s, _cpu_s() - before))
    found = []
    for name, pairs in taken.items():
        wall_s, cpu_s = (statistics.median(column) for column in zip(*pairs, strict=True))
        found.append({"what": name, "s": wall_s, "rows/s": arguments.rows / wall_s, "CPU s": cpu_s})
    for row in found:
        disk = next(other for other in found if other["what"] == f"{row['what'].partition(',')[0]}, disk to disk")
        row |= {"of the disk's rows/s": disk["s"] / row["s"], "of its CPU s": row["CPU s"] / disk["CPU s"]}
    return found


def _faults(folder: Path, faults: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    assert _dlrm("preprocess", folder / "log.tsv", "--out", folder / "expected").returncode == 0
    files = (path for path in (folder / "expected").rglob("*") if path.is_file())
    expected = {path.relative_to(folder / "expected").as_posix(): path.read_bytes() for path in files}
    command = ("preprocess", "s3://clicks/log.tsv", "--out", _OUT)
    rows, luck = [], random.Random(7)  # noqa: S311 - no secret

    def looks_whole() -> bool:
        content = _buckets.bytes_of(_OUT)
        return "dataset.json" not in content or content == expected

    with _away(folder, faults) as environment:
        faults.busy = faults.cut = 0.05
        started_s = time.perf_counter()
        assert _dlrm(*command, environment=environment).returncode == 0
        whole_s = time.perf_counter() - started_s
        ended, half, seen = 0, 0, set()
        for _ in range(arguments.kills):
            process = _start(*command, environment=environment)
            try:
                process.wait(luck.uniform(0, whole_s))
                # It was done: the next one begins anew.
                ended += 1
                objects.delete(*[f"{_OUT}/{name}" for name in objects.listed(_OUT)])
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            half += not looks_whole()
            seen.add(len(objects.listed(_OUT)))
        done = _dlrm(*command, environment=environment)
        rows.append(
            {
                "what": f"{arguments.kills - ended} kills, {ended} ends, 5 % busy, 5 % cut",
                "exit codes": f"{done.returncode}",
                "half published": half,
                "same bytes": _buckets.bytes_of(_OUT) == expected,
                "said": f"objects of {_OUT} after kills: {sorted(seen)}",
            }
        )
        faults.busy = faults.cut = 0.0
    cases: Sequence[tuple[str, tuple[int, str], float | None]] = (
        (f"{arguments.outage_s:g} s of 503", (503, "SlowDown"), arguments.outage_s),
        ("credentials expire", (403, "ExpiredToken"), None),
        ("the bucket vanishes", (404, "NoSuchBucket"), None),
    )
    for name, answer, lasts_s in cases:
        objects.delete(*[f"{_OUT}/{name}" for name in objects.listed(_OUT)])
        with _away(folder, faults) as environment:
            started_s, asked = time.perf_counter(), len(faults.requests)
            process = _start(*command, environment=environment)
            while process.poll() is None and len(faults.requests) < asked + 12:  # in the middle of the log
                time.sleep(0.01)
            faults.answer = answer
            if lasts_s is not None:
                time.sleep(lasts_s)
                faults.answer = None
            said = process.communicate()[1].strip().splitlines()[-1]
            seconds, code, faults.answer = time.perf_counter() - started_s, process.returncode, None
            half = not looks_whole()
            again = _dlrm(*command, environment=environment).returncode
            row = {"what": name, "exit codes": f"{code}, then {again}", "half published": int(half)}
            rows.append(row | {"same bytes": _buckets.bytes_of(_OUT) == expected, "said": said, "s": seconds})
    return rows


@contextmanager
def _away(folder: Path, faults: Any) -> Iterator[dict[str, str]]:
    """What a command needs for the bucket behind the proxy, with an empty cache."""
    yield faults.environment | {"TORCHDLRM_CACHE": str(folder / "cache")}
    shutil.rmtree(folder / "cache", ignore_errors=True)


def _start(*words: str | Path, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    command = [str(Path(sys.executable).with_name("dlrm")), *map(str, words)]
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def _dlrm(*words: str | Path, environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    with _start(*words, environment=environment or {}) as process:
        said = process.communicate()[1]
    return subprocess.CompletedProcess(words, process.returncode, "", said)


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table()
    for name in rows[0]:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{row[name]:,.3g}" if isinstance(row[name], float) else str(row[name]) for name in rows[0]))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
