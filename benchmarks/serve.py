"""How long a served prediction takes, and what happens when more is asked than can be done.

    dlrm synthesize --rows 200000 --out log.tsv
    dlrm preprocess log.tsv --out dataset --min-count 1
    dlrm train configs/criteo-1tb.toml --dataset dataset --run run --train.batch-size-global 8192 --train.max-steps 5
    dlrm export run --out bundle --precision int8
    python benchmarks/serve.py bundle log.tsv

An open-loop load generator: requests leave at random moments of a fixed mean rate (a Poisson process), whether or not
those before are answered, and each latency counts from the moment at which its request was due.  So a server that
stalls is charged with all who came meanwhile.  The generator is a process of its own on the same machine, and shares
its cores with the server: its values are an upper bound.  It speaks plain HTTP/1.1 over connections that stay
open, one request at a time on each, because a client library would need more of the processor than the server does.

With `--versus`, servers of another state of the source take turns with this one's, and medians over the rounds are
set side by side:

    git worktree add ../before COMMIT
    python benchmarks/serve.py bundle log.tsv --versus ../before/src --rounds 5

Prints a table; `--json` writes all measurements to a file.
"""

import argparse
import asyncio
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import uvloop

CRITEO = ["label", *(f"int_{i}" for i in range(13)), *(f"cat_{i}" for i in range(26))]
MAX_CONNECTIONS = 2000
OK = 200  # the status of an answer


def read_rows(log: Path, num_rows: int) -> list[dict[str, object]]:
    """The first rows of a log in Criteo's layout, as JSON objects without the label."""
    rows: list[dict[str, object]] = []
    with log.open() as file:
        for line, _ in zip(file, range(num_rows), strict=False):
            cells = dict(zip(CRITEO, line.rstrip("\n").split("\t"), strict=True))
            del cells["label"]
            rows.append({name: int(cell) if name.startswith("int") else cell for name, cell in cells.items() if cell})
    return rows


def request(body: object) -> bytes:
    """A request to `/predict`."""
    content = json.dumps(body, separators=(",", ":")).encode()
    return b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(content) + content


def tensor_request(model: str, rows: list[dict[str, object]]) -> bytes:
    """A request to `infer` of the Open Inference Protocol, as Triton's clients send it: packed, as bytes."""
    dense = np.array([[row.get(f"int_{i}", np.nan) for i in range(13)] for row in rows], np.float32).tobytes()
    cells = [str(row.get(f"cat_{i}", "")).encode() for row in rows for i in range(26)]
    sparse = b"".join(len(cell).to_bytes(4, "little") + cell for cell in cells)
    inputs = [
        {"name": name, "datatype": kind, "shape": [len(rows), width], "parameters": {"binary_data_size": len(data)}}
        for name, kind, width, data in (("dense", "FP32", 13, dense), ("sparse", "BYTES", 26, sparse))
    ]
    header = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    lengths = (len(header), len(header) + len(dense) + len(sparse))
    line = b"POST /v2/models/%s/infer HTTP/1.1\r\nHost: localhost\r\n" % model.encode()
    return (
        line + b"Inference-Header-Content-Length: %d\r\nContent-Length: %d\r\n\r\n" % lengths + header + dense + sparse
    )


@dataclass(frozen=True)
class Asked:
    """A request: when it was due and answered, and the status of the answer, 0 where the connection failed."""

    due_s: float
    done_s: float
    status: int
    content: Any


class Load:
    """Sends requests to a server and notes what becomes of them; `read` says what is kept of an answer's content."""

    def __init__(self, host: str, port: int, requests: list[bytes], read: Callable[[bytes], Any] | None = None) -> None:
        self._host, self._port, self._requests, self._read = host, port, requests, read
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self._num_connections = 0
        self.is_stopping = False
        self.asked: list[Asked] = []
        self.late_s: list[float] = []

    async def run(self, per_s: float, seconds: float = math.inf, seed: int = 0) -> dict[str, Any]:
        """Send at that rate for a time, or until `is_stopping`, and wait for all answers."""
        self.asked, self.late_s = [], []
        chance = random.Random(seed)  # noqa: S311 - nothing secret
        begin_s = time.perf_counter() + 0.05
        due_s, tasks = begin_s, []
        while not self.is_stopping and (due_s := due_s + chance.expovariate(per_s)) < begin_s + seconds:
            wait_s = due_s - time.perf_counter()
            if wait_s > 0:
                await asyncio.sleep(wait_s)
            self.late_s.append(time.perf_counter() - due_s)
            tasks.append(asyncio.ensure_future(self._ask(chance.choice(self._requests), due_s)))
        await asyncio.gather(*tasks)
        return self._summary(per_s, time.perf_counter() - begin_s)

    async def _ask(self, sent: bytes, due_s: float) -> None:
        status, content, connection = 0, b"", None
        try:
            connection = self._idle.pop() if self._idle else await self._connect()
            reader, writer = connection
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head[9:12])
            lower = head.lower()
            start = lower.index(b"\r\ncontent-length: ") + 18
            content = await reader.readexactly(int(lower[start : lower.index(b"\r\n", start)]))
            self._idle.append(connection)
        except (OSError, asyncio.IncompleteReadError):
            if connection is not None:
                connection[1].close()
                self._num_connections -= 1
        done_s = time.perf_counter()
        kept = self._read(content) if self._read and status == OK else None
        self.asked.append(Asked(due_s, done_s, status, kept))

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._num_connections >= MAX_CONNECTIONS:
            msg = "too many connections"
            raise OSError(msg)
        self._num_connections += 1
        try:
            return await asyncio.open_connection(self._host, self._port)
        except OSError:
            self._num_connections -= 1
            raise

    def _summary(self, per_s: float, seconds: float) -> dict[str, Any]:
        codes = Counter(one.status for one in self.asked)
        return {
            "asked_per_s": per_s,
            "answered_per_s": codes[OK] / seconds,
            "codes": dict(codes),
            "answered_ms": percentiles([one for one in self.asked if one.status == OK], (50, 90, 99, 99.9)),
            "refused_ms": percentiles([one for one in self.asked if one.status != OK], (50, 99)),
            "generator_late_ms_p99": round(float(np.percentile(self.late_s, 99)) * 1e3, 3),
        }


def percentiles(asked: list[Asked], of: Sequence[float]) -> dict[str, float]:
    """Of latencies, in milliseconds; NaN where there are none."""
    latencies = np.array([one.done_s - one.due_s for one in asked] or [np.nan]) * 1e3
    return {f"p{q}": round(float(np.percentile(latencies, q)), 3) for q in of}


async def stages(host: str, port: int) -> dict[str, tuple[float, float]]:
    """What the server itself has measured so far: seconds and number by stage."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    found = dict(re.findall(r'^dlrm_latency_seconds_((?:sum|count)\{stage="\w+"\}) (\S+)$', text, re.MULTILINE))
    names = ("read", "queue", "encode", "model", "total")
    return {n: (float(found[f'sum{{stage="{n}"}}']), float(found[f'count{{stage="{n}"}}'])) for n in names}


def means(before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]) -> dict[str, float]:
    """Mean milliseconds of each stage between two moments."""
    return {
        stage: round(1e3 * (after[stage][0] - seconds) / max(1.0, after[stage][1] - count), 3)
        for stage, (seconds, count) in before.items()
    }


async def measure(
    host: str, port: int, model: str, rows: list[dict[str, object]], seconds: float
) -> list[dict[str, Any]]:
    """All cases, one after another."""
    ones = [request([row]) for row in rows[:500]]
    shared_names = [*(f"int_{i}" for i in range(8)), *(f"cat_{i}" for i in range(16))]
    many = []
    for start in range(0, 2000, 256):
        shared = {name: rows[start][name] for name in shared_names if name in rows[start]}
        own = [{n: c for n, c in row.items() if n not in shared_names} for row in rows[start : start + 256]]
        many.append(request({"shared": shared, "candidates": own}))
    results = []

    async def case(what: str, load: Load, per_s: float, seconds: float) -> dict[str, Any]:
        before = await stages(host, port)
        result = {"case": what, **await load.run(per_s, seconds)}
        result["server_mean_ms"] = means(before, await stages(host, port))
        results.append(result)
        print(show(result), flush=True)
        return result

    single, candidates = Load(host, port, ones), Load(host, port, many)
    tensors = Load(host, port, [tensor_request(model, [row]) for row in rows[:500]])
    await single.run(100, 1)
    await tensors.run(100, 1)
    await candidates.run(5, 1)
    await case("1 row", single, 100, seconds)
    await case("1 row, as tensors", tensors, 100, seconds)
    await case("256 candidates", candidates, 10, seconds)
    # What it can bear: the highest rate at which nothing is refused and answers stay quick.
    bearable = 100.0
    for per_s in (400, 600, 800, 1000, 1250, 1500, 2000, 2500, 3000, 4000, 5000, 6000):
        found = await case("1 row", single, per_s, min(seconds, 4))
        if set(found["codes"]) != {200} or found["answered_ms"]["p99"] > 100:
            break
        bearable = per_s
    await case("1 row, twice what it bears", single, 2 * bearable, seconds)
    await asyncio.sleep(0.5)
    await case("1 row, afterwards", single, 100, seconds)
    return results


def show(result: dict[str, Any]) -> str:
    """A line of the table."""
    answered, refused = result["answered_ms"], result["refused_ms"]
    codes = " ".join(f"{code}:{count}" for code, count in sorted(result["codes"].items()))
    return (
        f"{result['case']:27s} {result['asked_per_s']:7,.0f}/s  answered {result['answered_per_s']:7,.0f}/s  "
        f"p50 {answered['p50']:8.2f}  p99 {answered['p99']:8.2f}  p99.9 {answered['p99.9']:8.2f} ms  "
        f"refused p99 {refused['p99']:8.2f} ms  {codes}  (generator late by {result['generator_late_ms_p99']:.1f} ms; "
        f"server's own mean {result['server_mean_ms']['total']:.2f} ms)"
    )


def measure_server(source: Path, options: argparse.Namespace, rows: list[dict[str, object]]) -> list[dict[str, Any]]:
    """Start a server of a state of the source, measure it, stop it."""
    dlrm = [sys.executable, "-c", "from torchdlrm.cli.main import main; main()"]
    command = [*dlrm, "serve", str(options.bundle), "--port", "0", "--json", "--log-level", "warning", *options.serve]
    environment = {**os.environ, "PYTHONPATH": str(source)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stdout is not None
            ready = json.loads(server.stdout.readline())
            host, port = ready["url"].removeprefix("http://").split(":")
            return uvloop.run(measure(host, int(port), ready["model"], rows, options.seconds))
        finally:
            server.terminate()


def figures(results: list[dict[str, Any]]) -> dict[str, float]:
    """What two servers are compared by: latencies at rates that both bear, and the most requests answered a second."""
    quiet = {result["case"]: result["answered_ms"] for result in results if result["case"] != "1 row"}
    quiet = {"1 row": results[0]["answered_ms"], **quiet}
    found = {
        f"{case}, {q} (ms)": times[q] for case, times in quiet.items() if "twice" not in case for q in ("p50", "p99")
    }
    return {**found, "most answered (1/s)": max(result["answered_per_s"] for result in results)}


def main() -> None:
    """Measure this source's server, or it and another one by turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("log", type=Path, help="in Criteo's layout, 2,500 rows at least")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each case")
    parser.add_argument("--versus", type=Path, help="the folder src of another checkout, to compare with")
    parser.add_argument("--rounds", type=int, default=1, help="how often each server is measured")
    parser.add_argument("--json", type=Path, help="where to write all measurements")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of `dlrm serve`; last")
    options = parser.parse_args()
    rows = read_rows(options.log, 2500)
    sources = {"this": Path(__file__).resolve().parents[1] / "src"}
    sources |= {} if options.versus is None else {"versus": options.versus.resolve()}
    results: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in sources}
    for index in range(options.rounds):
        for name in sources if index % 2 == 0 else reversed(sources):
            print(f"round {index + 1}, {name}: {sources[name]}", flush=True)
            results[name].append(measure_server(sources[name], options, rows))
    by_name = {name: [figures(of_round) for of_round in rounds] for name, rounds in results.items()}
    medians = {name: {k: median(found[k] for found in rounds) for k in rounds[0]} for name, rounds in by_name.items()}
    if options.versus is not None:
        for key, value in medians["this"].items():
            other = medians["versus"][key]
            print(f"{key:32s} this {value:9.2f}  versus {other:9.2f}  ratio {value / other:.3f}")
    if options.json is not None:
        found = {"sources": {name: str(path) for name, path in sources.items()}, "medians": medians, "results": results}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
