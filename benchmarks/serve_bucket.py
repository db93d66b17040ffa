"""What it costs a server that its model is in a bucket: kills while it fetches, faults, ten periods that it follows.

    python benchmarks/serve_bucket.py
    python benchmarks/serve_bucket.py --kills 5 --periods 3 --json serve_bucket.json

Starts an S3 server (moto's) on the loopback interface and a proxy before it, with 20 ms of latency and a limit of
bandwidth, writes bundles of a random model with one large table and the deltas between them, and

1. kills `dlrm serve BUNDLE` at random moments while it fetches, 5 % of the requests answered 503, and lets the last
   one serve; where a fetch was complete before its kill, the cache is removed and another begun:
   counts the bytes that came through the proxy, and the blocks that were asked for again though they were on the
   disk;
2. lets a server follow `LIVE/current` over the periods, with requests at random moments (a Poisson process): seconds
   from the switch to the first new answer, bytes fetched, lost requests, and bytes of the cache; bundles older than
   three periods are removed from the bucket, as retention does;
3. does so once more while the bucket throttles, its credentials have expired, and it has vanished.

Prints a table; `--json` writes all measurements to a file.
"""

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import uvloop

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from follow import TABLE, answer_of
from helpers.buckets import Faults, far_away, s3_server  # type: ignore[import-not-found]
from helpers.command_server import DLRM, shared_server  # type: ignore[import-not-found]
from random_periods import write_periods
from serve import Load, percentiles, request
from torchdlrm.bundle.manifest import WEIGHTS_NAME
from torchdlrm.config import ModelConfig
from torchdlrm.storage import objects

BUCKET, KEPT_BUNDLES = "s3://clicks", 3
FAULTS = {"throttled": (503, "SlowDown"), "expired": (400, "ExpiredToken"), "vanished": (404, "NoSuchBucket")}


def put(folder: Path, url: str) -> None:
    """Write a folder into the bucket, past the proxy and this host's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            objects.write(f"{url}/{path.relative_to(folder)}", path)


def publish(folder: Path, period: int) -> None:
    """As a live model does: bundle and delta, then `current`; what retention removes is gone."""
    for name in (f"{period:04}", f"{period:04}.delta"):
        put(folder / name, f"{BUCKET}/live/bundles/{name}")
    objects.write(f"{BUCKET}/live/current", f"bundles/{period:04}".encode())
    for name in (f"{period - KEPT_BUNDLES:04}", f"{period - KEPT_BUNDLES:04}.delta"):
        objects.delete(
            *[f"{BUCKET}/live/bundles/{name}/{file}" for file in objects.listed(f"{BUCKET}/live/bundles/{name}")]
        )


class Server:
    """A `dlrm serve` that reaches the bucket through the proxy alone."""

    def __init__(self, url: str, faults: Faults, cache: Path) -> None:
        environment = os.environ | faults.environment | {"TORCHDLRM_CACHE": str(cache)}
        command = [DLRM, "serve", url, "--port", "0", "--json", "--log-level", "warning"]
        command += ["--deadline-ms", "10000"]  # where other programs have the cores, a second may pass
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the server
        self.process = shared_server().start(command, env=environment, stdout=subprocess.PIPE, stderr=self.log)

    def ready(self) -> dict[str, Any]:
        """What it says once it takes requests."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.lines()
        return json.loads(line)

    def lines(self) -> list[dict[str, Any]]:
        """Its log so far."""
        self.log.seek(0)
        return [json.loads(line) if line.startswith("{") else {"event": line} for line in self.log]


def blocks_of(cache: Path) -> set[tuple[str, int]]:
    """Of each file of the bundle that is not complete, where the blocks begin that are on the disk."""
    notes = {file.name[1 : -len(".blocks")]: file.read_text().splitlines()[1:] for file in cache.rglob(".*.blocks")}
    return {(name, int(line[:-1])) for name, lines in notes.items() for line in lines}


def asked_for(faults: Faults, since: int) -> set[tuple[str, int]]:
    """Where the blocks begin that servers have asked for since then."""
    return {(path.rpartition("/")[2], start) for path, start in faults.ranges[since:]}


def is_complete(cache: Path) -> bool:
    """Whether all of the weights are there."""
    return any(cache.rglob(WEIGHTS_NAME)) and not any(cache.rglob(".*.blocks"))


def killed(faults: Faults, cache: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Kill servers that fetch until one has been killed as often as asked, and let the last one serve."""
    chance, again, began_s = random.Random(0), 0, time.perf_counter()  # noqa: S311 - nothing secret
    faults.busy, faults.num_bytes = 0.05, 0
    kills, rounds = 0, 1
    while kills < options.kills:
        there, before, seen = blocks_of(cache), faults.num_bytes, len(faults.ranges)
        limit_bytes = before + chance.randrange(1 << 20, options.kill_bytes)
        server = Server(f"{BUCKET}/bundle", faults, cache)
        while server.process.poll() is None and faults.num_bytes < limit_bytes and not is_complete(cache):
            time.sleep(0.005)
        assert server.process.poll() is None, server.lines()
        server.process.kill()
        server.process.wait()
        kills += 1
        again += len(asked_for(faults, seen) & there)
        if is_complete(cache):
            rounds += 1
            shutil.rmtree(cache)
        print(f"kill {kills:2d}: {faults.num_bytes - before:12,d} bytes came, {len(blocks_of(cache)):3d} blocks there")
    there, seen = blocks_of(cache), len(faults.ranges)
    server = Server(f"{BUCKET}/bundle", faults, cache)
    served = server.ready()
    again += len(asked_for(faults, seen) & there)
    server.process.terminate()
    server.process.wait()
    faults.busy = 0.0
    return {
        "kills": kills,
        "whole_fetches": rounds,
        "version": served["version"],
        "bytes_through_the_proxy": faults.num_bytes,
        "blocks_fetched_again_though_on_the_disk": again,
        "seconds": time.perf_counter() - began_s,
    }


async def follow(
    server: Server, folder: Path, faults: Faults, cache: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Publish period after period while requests arrive; the last ones while something is wrong with the bucket."""
    ready = server.ready()
    host, port = ready["url"].removeprefix("http://").split(":")
    rows = [{"int_0": i % 100, TABLE: f"{i * 0x9E3779B1 % 2**32:08x}"} for i in range(1, 1000)]
    load = Load(host, int(port), [request([row]) for row in rows], lambda content: json.loads(content)["period"])
    running = asyncio.ensure_future(load.run(options.per_s))
    await asyncio.sleep(2.0)
    switches, during = [], []
    for period in range(2, options.periods + len(FAULTS) + 1):
        name = None if period <= options.periods else [*FAULTS][period - options.periods - 1]
        held_s = 0.0
        if name is not None:
            faults.answer, lines = FAULTS[name], len(server.lines())
            await asyncio.to_thread(publish, folder, period)
            await asyncio.sleep(options.fault_s)
            held_s, faults.answer = options.fault_s, None
            said = [line for line in server.lines()[lines:] if line["event"] == "swap failed"]
        before, moved_s = faults.num_bytes, time.perf_counter()
        if name is None:
            await asyncio.to_thread(publish, folder, period)
            moved_s = time.perf_counter()
        answered_s = await asyncio.wait_for(answer_of(load, period), 120)
        cache_bytes = sum(path.stat().st_blocks * 512 for path in cache.rglob("*") if path.is_file())
        switch = {"period": period, "fault": name, "fault_s": held_s, "seconds": answered_s - moved_s}
        switch |= {"fetched_bytes": faults.num_bytes - before, "cache_bytes": cache_bytes}
        if name is not None:
            switch["log"] = [re.sub(r"^.*?: ", "", line["message"]) for line in said]
        switches.append(switch)
        during += [one for one in load.asked if moved_s <= one.due_s < answered_s + 0.5]
        print(show(switch))
        await asyncio.sleep(1.0)
    load.is_stopping = True
    await running
    lost = sum(one.content is None for one in load.asked)
    print(f"requests {len(load.asked):,}, of which {lost} were lost")
    return {
        "switches": switches,
        "requests": len(load.asked),
        "lost": lost,
        "during_ms": percentiles(during, (50, 99, 100)),
    }


def show(switch: dict[str, Any]) -> str:
    """A line of the table."""
    fault = (
        "" if switch["fault"] is None else f"  {switch['fault']} for {switch['fault_s']:.0f} s; log: {switch['log']}"
    )
    return (
        f"period {switch['period']:2d}  new answers after {switch['seconds']:5.2f} s  "
        f"fetched {switch['fetched_bytes'] / 1e6:6.2f} MB  cache {switch['cache_bytes'] / 1e6:7.2f} MB{fault}"
    )


def main() -> None:
    """Write the bundles, kill, follow, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rows", type=int, default=800_000, help="of the table of the bundle that is fetched and killed"
    )
    parser.add_argument("--live-rows", type=int, default=200_000, help="of the table of the live model")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--kill-bytes", type=int, default=40 << 20, help="the most that a server fetches before its end"
    )
    parser.add_argument("--periods", type=int, default=11, help="0: kills alone")
    parser.add_argument("--per-s", type=float, default=50.0, help="requests a second")
    parser.add_argument("--fault-s", type=float, default=30.0)
    parser.add_argument("--latency-s", type=float, default=0.02)
    parser.add_argument("--bytes-per-s", type=float, default=50e6)
    parser.add_argument("--json", type=Path, help="where to write all measurements")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, s3_server() as s3:
        folder, settings = Path(name), {"latency_s": options.latency_s, "bytes_per_s": options.bytes_per_s}
        os.environ |= s3.environment
        config = ModelConfig(embedding_dim=64, dense_arch_layer_sizes=(64, 64), over_arch_layer_sizes=(64, 1))
        changes: dict[str, Any] = {"changed_fraction": 0.02, "num_values": 100}
        (folder / "large").mkdir()
        (folder / "live").mkdir()
        write_periods(folder / "large", {TABLE: options.rows}, config, "int8", num_periods=1, **changes)
        put(folder / "large/0001", f"{BUCKET}/bundle")
        weights_bytes = (folder / "large/0001" / WEIGHTS_NAME).stat().st_size
        periods = options.periods + len(FAULTS)
        write_periods(folder / "live", {TABLE: options.live_rows}, config, "int8", num_periods=periods, **changes)
        objects.write(f"{BUCKET}/live/live.toml", b"")
        found: dict[str, Any] = {"weights_bytes": weights_bytes}
        with far_away(s3, **settings) as faults:
            if options.kills:
                found["killed"] = killed(faults, folder / "cache", options)
                print(f"weights of {weights_bytes:,} bytes:", json.dumps(found["killed"]))
            if not options.periods:
                return
            publish(folder / "live", 1)
            server = Server(f"{BUCKET}/live", faults, folder / "other")
            try:
                found["followed"] = uvloop.run(follow(server, folder / "live", faults, folder / "other", options))
            finally:
                server.process.terminate()
                found["exit_code"] = server.process.wait()
    if options.json is not None:
        given = {key: value for key, value in vars(options).items() if key != "json"}
        options.json.write_text(json.dumps({"options": given, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
