"""What it costs a running server to follow its model: deltas that are applied in memory, while requests arrive.

    python benchmarks/follow.py
    python benchmarks/follow.py --precision float32 --values 1000 --json follow.json

Writes a bundle with one large table, and after it one for each period, in which a fraction of the rows is other and
some values of the vocabulary are others, and the delta to each.  Then it starts `dlrm serve` on a symbolic link, sends
requests of a row at random moments of a fixed mean rate (a Poisson process; each latency counts from the moment at
which its request was due), and moves the link period after period.

The time of a switch is from moving the link to the first answer of the new model: it includes the wait for the server's
next look at the link (`--follow-s`).  Latencies "during" are of requests that were due from then until half a second
after that answer; those of the seconds before each switch are "usual".  Memory is the server's anonymous memory
(RssAnon) before each switch and a second after it.  The generator shares the machine with the server.

Prints a table; `--json` writes all measurements to a file.
"""

import argparse
import asyncio
import contextlib
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from serve import request
from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bench.random_periods import make_first_period, write_next_period
from torchdlrm.bundle.delta import Delta
from torchdlrm.config import ModelConfig

TABLE = "cat_0"
WARM_UP_S, AFTER_S = 3.0, 0.5


@dataclass(frozen=True)
class Asked:
    """A request: when it was due and answered, by which period; None where no prediction came."""

    due_s: float
    done_s: float
    period: int | None


class Load:
    """Asks a server for predictions, at a mean rate, until `stop`."""

    def __init__(self, host: str, port: int, per_s: float, requests: list[bytes]) -> None:
        self._address, self._per_s, self._requests = (host, port), per_s, requests
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.asked: list[Asked] = []
        self.is_stopping = False

    async def run(self) -> None:
        """Ask; returns after the last answer."""
        chance = random.Random(0)  # noqa: S311 - nothing secret
        due_s, tasks = time.perf_counter(), []
        while not self.is_stopping:
            due_s += chance.expovariate(self._per_s)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            tasks.append(asyncio.ensure_future(self._ask(chance.choice(self._requests), due_s)))
        await asyncio.gather(*tasks)

    async def answer_of(self, period: int) -> float:
        """When the first answer of a period came."""
        while not (times := [one.done_s for one in self.asked[-100:] if one.period == period]):
            await asyncio.sleep(0.005)
        return min(times)

    async def _ask(self, sent: bytes, due_s: float) -> None:
        period = None
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection(*self._address)
            writer.write(sent)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            content = await reader.readexactly(length)
            self._idle.append((reader, writer))
            period = json.loads(content)["period"] if head[9:12] == b"200" else None
        self.asked.append(Asked(due_s, time.perf_counter(), period))


def anonymous_bytes(pid: int) -> int:
    """Of the memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def write_live(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundles of all periods, `current`, which leads to the first, and what is in each delta."""
    sizes, dim = {TABLE: options.rows}, options.embedding_dim
    config = ModelConfig(embedding_dim=dim, dense_arch_layer_sizes=(64, dim), over_arch_layer_sizes=(64, 1))
    before = write_random_bundle(folder / "0001", sizes, options.precision, config, for_raw_rows=True)
    make_first_period(before)
    deltas = []
    for period in range(2, options.periods + 1):
        path = folder / f"{period:04}"
        changes: dict[str, Any] = {"changed_fraction": options.changed, "num_values": options.values}
        delta = Delta.open(write_next_period(before, path, period=period, **changes))
        (table,) = delta.manifest.weights.tables
        result_bytes, changed_bytes = delta.manifest.result.size_bytes, sum(table.changed_rows) * table.row_bytes
        sizes_bytes = {"delta_bytes": delta.size_bytes, "of_bundle": delta.size_bytes / result_bytes}
        deltas.append(sizes_bytes | {"changed_bytes": changed_bytes})
        before = path
    (folder / "current").symlink_to("0001")
    return deltas


async def measure(url: str, pid: int, folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], Load]:
    """Move the link period after period while requests arrive."""
    host, port = url.removeprefix("http://").split(":")
    chance = np.random.default_rng(0)
    values = (chance.integers(1, options.rows, 2000, dtype=np.uint32) * np.uint32(0x9E3779B1)).tolist()
    rows = [{"int_0": int(chance.integers(100)), TABLE: f"{value:08x}"} for value in values]
    load = Load(host, int(port), options.per_s, [request([row]) for row in rows])
    running = asyncio.ensure_future(load.run())
    await asyncio.sleep(WARM_UP_S)
    switches = []
    for period in range(2, options.periods + 1):
        usual_from_s, drifts_from_bytes = time.perf_counter(), anonymous_bytes(pid)
        await asyncio.sleep(options.seconds)
        before_bytes, moved_s = anonymous_bytes(pid), time.perf_counter()
        (folder / "new").symlink_to(f"{period:04}")
        (folder / "new").replace(folder / "current")
        answered_s = await load.answer_of(period)
        await asyncio.sleep(1.0)
        grown_bytes = anonymous_bytes(pid) - before_bytes
        switches.append(
            {
                "period": period,
                "usual_from_s": usual_from_s,
                "moved_s": moved_s,
                "seconds": answered_s - moved_s,
                "grown_bytes": grown_bytes,
                "drift_bytes": before_bytes - drifts_from_bytes,
            }
        )
    load.is_stopping = True
    await running
    return switches, load


def percentiles(asked: list[Asked]) -> dict[str, float]:
    """Of latencies, in milliseconds."""
    found = np.array([one.done_s - one.due_s for one in asked]) * 1e3
    return {f"p{q}": round(float(np.percentile(found, q)), 3) for q in (50, 90, 99, 100)}


def show(switch: dict[str, Any]) -> str:
    """A line of the table."""
    log = switch["log"]
    return (
        f"period {switch['period']:2d}  delta {switch['delta_bytes'] / 1e6:6.2f} MB ({switch['of_bundle']:.1%})  "
        f"new answers after {switch['seconds']:5.2f} s (applied in {log['seconds']:5.2f} s)  "
        f"memory +{switch['grown_bytes'] / 1e6:6.2f} MB, {switch['grown_bytes'] / switch['changed_bytes']:5.2f} times "
        f"the changed rows  patched {log.get('patched_rows', 0):7,d} rows {log.get('patched_bytes', 0) / 1e6:6.2f} MB  "
        f"p99 {switch['during_ms']['p99']:6.2f} ms"
    )


def main() -> None:
    """Write the bundles, serve them, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the table")
    parser.add_argument("--embedding-dim", type=int, default=64)
    parser.add_argument("--precision", default="int8", choices=["float32", "float16", "int8", "int4"])
    parser.add_argument("--changed", type=float, default=0.02, help="fraction of the rows that each period changes")
    parser.add_argument("--values", type=int, default=0, help="of the vocabulary that each period replaces")
    parser.add_argument("--periods", type=int, default=6)
    parser.add_argument("--per-s", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=5.0, help="before each switch")
    parser.add_argument("--json", type=Path, help="where to write all measurements")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="options of `dlrm serve`; last")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        deltas = write_live(folder, options)
        dlrm = [sys.executable, "-c", "from torchdlrm.cli.main import main; main()", "serve", str(folder / "current")]
        command = [*dlrm, "--port", "0", "--json", "--log-level", "warning", *options.serve]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                told = json.loads(server.stdout.readline())
                gc.disable()  # to look through all that torch has loaded takes 0.2 s, in which nobody would ask
                switches, load = uvloop.run(measure(told["url"], told["pid"], folder, options))
            finally:
                server.terminate()
                _, log = server.communicate()
    swapped = [line for line in map(json.loads, log.splitlines()) if line["event"] == "bundle swapped"]
    during, usual = [], []
    for switch, delta, line in zip(switches, deltas, swapped, strict=True):
        switch.update(delta, log=line)
        edges = switch["usual_from_s"], switch["moved_s"], switch["moved_s"] + switch["seconds"] + AFTER_S
        usual += [one for one in load.asked if edges[0] <= one.due_s < edges[1]]
        mine = [one for one in load.asked if edges[1] <= one.due_s < edges[2]]
        during += mine
        switch["during_ms"] = percentiles(mine)
        print(show(switch))
    lost = sum(one.period is None for one in load.asked)
    found: dict[str, Any] = {"usual_ms": percentiles(usual), "during_ms": percentiles(during)}
    for when, times in found.items():
        print(f"{when:10s}", "  ".join(f"{q} {value:6.2f}" for q, value in times.items()))
    print(f"requests {len(load.asked):,}, of which {lost} were lost")
    found |= {"requests": len(load.asked), "lost": lost}
    if options.json is not None:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"options": given, **found, "switches": switches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
