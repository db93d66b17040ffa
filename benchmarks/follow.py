"""What it costs a running server to follow its model: deltas that are applied in memory, while requests arrive.

    python benchmarks/follow.py
    python benchmarks/follow.py --precision float32 --values 1000 --json follow.json

Writes a bundle with one large table, and after it one for each period, in which a fraction of the rows and
some values of the vocabulary changed, and the delta to each.  Then it starts `dlrm serve` on a symbolic link, sends
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
import gc
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import uvloop

from random_periods import write_periods
from serve import Load, percentiles, request
from torchdlrm.bundle.delta import Delta
from torchdlrm.config import ModelConfig

TABLE = "cat_0"
WARM_UP_S, AFTER_S = 3.0, 0.5
QUANTILES = (50, 90, 99, 100)


async def answer_of(load: Load, period: int) -> float:
    """When the first answer of a period came."""
    while not (times := [one.done_s for one in load.asked[-100:] if one.content == period]):
        await asyncio.sleep(0.005)
    return min(times)


def anonymous_bytes(pid: int) -> int:
    """Of the memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def write_live(folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The bundles of all periods, `current`, which leads to the first, and what is in each delta."""
    sizes, dim = {TABLE: options.rows}, options.embedding_dim
    config = ModelConfig(embedding_dim=dim, dense_arch_layer_sizes=(64, dim), over_arch_layer_sizes=(64, 1))
    changes: dict[str, Any] = {"changed_fraction": options.changed, "num_values": options.values}
    write_periods(folder, sizes, config, options.precision, num_periods=options.periods, **changes)
    deltas = []
    for period in range(2, options.periods + 1):
        delta = Delta.open(folder / f"{period:04}.delta")
        (table,) = delta.manifest.weights.tables
        result_bytes, changed_bytes = delta.manifest.result.size_bytes, sum(table.changed_rows) * table.row_bytes
        sizes_bytes = {"delta_bytes": delta.size_bytes, "of_bundle": delta.size_bytes / result_bytes}
        deltas.append(sizes_bytes | {"changed_bytes": changed_bytes})
    (folder / "current").symlink_to("0001")
    return deltas


async def measure(url: str, pid: int, folder: Path, options: argparse.Namespace) -> tuple[list[dict[str, Any]], Load]:
    """Move the link period after period while requests arrive."""
    host, port = url.removeprefix("http://").split(":")
    chance = np.random.default_rng(0)
    values = (chance.integers(1, options.rows, 2000, dtype=np.uint32) * np.uint32(0x9E3779B1)).tolist()
    rows = [{"int_0": int(chance.integers(100)), TABLE: f"{value:08x}"} for value in values]
    load = Load(host, int(port), [request([row]) for row in rows], lambda content: json.loads(content)["period"])
    running = asyncio.ensure_future(load.run(options.per_s))
    await asyncio.sleep(WARM_UP_S)
    switches = []
    for period in range(2, options.periods + 1):
        usual_from_s, drifts_from_bytes = time.perf_counter(), anonymous_bytes(pid)
        await asyncio.sleep(options.seconds)
        before_bytes, moved_s = anonymous_bytes(pid), time.perf_counter()
        (folder / "new").symlink_to(f"{period:04}")
        (folder / "new").replace(folder / "current")
        answered_s = await answer_of(load, period)
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
                ready = json.loads(server.stdout.readline())
                gc.disable()  # to look through all that torch has loaded takes 0.2 s, without a request meanwhile
                switches, load = uvloop.run(measure(ready["url"], ready["pid"], folder, options))
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
        switch["during_ms"] = percentiles(mine, QUANTILES)
        print(show(switch))
    lost = sum(one.content is None for one in load.asked)
    found: dict[str, Any] = {"usual_ms": percentiles(usual, QUANTILES), "during_ms": percentiles(during, QUANTILES)}
    for when, times in found.items():
        print(f"{when:10s}", "  ".join(f"{q} {value:6.2f}" for q, value in times.items()))
    print(f"requests {len(load.asked):,}, of which {lost} were lost")
    found |= {"requests": len(load.asked), "lost": lost}
    if options.json is not None:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"options": given, **found, "switches": switches}, indent=1) + "\n")


if __name__ == "__main__":
    main()
