"""What a live model in a bucket promises: a server follows it, two writers do no harm, a killed one is gone on with.

    python benchmarks/live_bucket.py follow --periods 10 --json follow.json
    python benchmarks/live_bucket.py follow --periods 400 --rows 2000     # a year of days, with expiry and retention
    python benchmarks/live_bucket.py two                                  # two `dlrm advance` at once, and a killed one
    python benchmarks/live_bucket.py kills --kills 20                     # each on another host, whose cache is empty
    python benchmarks/live_bucket.py machines                             # two advance together
    python benchmarks/live_bucket.py faults                               # what goes wrong with a bucket in a period
    python benchmarks/live_bucket.py watch                                # `--watch`, stopped while it waits and works
    python benchmarks/live_bucket.py cluster                              # preprocessed by Dask workers

An S3 server of its own on the loopback interface (moto, its objects in memory), logs whose values and clicks drift from
day to day, a small model.  `follow` advances in this process, and `dlrm serve` follows the object `current`; one client
asks for a row after the other.  The time of a switch is from the write of `current` to the first answer of the new
model.  The server's memory is its anonymous memory (RssAnon).  All others run the real command; their hosts are cache
folders.
"""

import argparse
import json
import os
import random
import resource
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from cluster import Cluster
from helpers.buckets import BUCKET, bytes_of, far_away, s3_server  # type: ignore[import-not-found]
from helpers.live_models import CONFIG, SCHEMA, WIDE, files_of, write_day  # type: ignore[import-not-found]
from torchdlrm import LiveModel, LiveSettings, advance
from torchdlrm.config import config_toml
from torchdlrm.features.schema_file import schema_toml
from torchdlrm.processor import describe_processor
from torchdlrm.storage import objects
from torchdlrm.storage.lease import LEASE_VARIABLE
from torchdlrm.storage.places import CACHE_VARIABLE, located

SETTINGS = LiveSettings(gate=WIDE, expire_after=20, keep_runs=2, keep_bundles=4)
DLRM = str(Path(sys.executable).with_name("dlrm"))
URL = f"s3://{BUCKET}/live"


def main() -> None:
    """Run what is named, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["follow", "two", "kills", "machines", "faults", "watch", "cluster"])
    parser.add_argument("--periods", type=int, default=10)
    parser.add_argument("--rows", type=int, default=2_000, help="of each log")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(describe_processor(), flush=True)
    with TemporaryDirectory() as temporary, s3_server() as server:
        os.environ |= server.environment | {CACHE_VARIABLE: f"{temporary}/cache"}
        options.server = server
        parts = (follow, two, kills, machines, faults, watch, cluster)
        found = {part.__name__: part for part in parts}[options.what](Path(temporary), options)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


class Client:
    """Asks a server for a row again and again; notes when the first answer of each period came."""

    def __init__(self, url: str) -> None:
        self.first_s: dict[int, float] = {}
        self.num_answers, self.slowest_s = 0, 0.0
        self.lost: list[str] = []
        self._url, self._ended = f"{url}/predict", threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)
        self._thread.start()

    def _ask(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._ended.wait(0.01):
                started_s = time.monotonic()
                try:
                    answer = client.post(self._url, json=[{}])
                    answer.raise_for_status()
                except httpx.HTTPError as error:
                    self.lost.append(str(error))
                    continue
                self.first_s.setdefault(answer.json()["period"], time.monotonic())
                self.slowest_s = max(self.slowest_s, time.monotonic() - started_s)
                self.num_answers += 1

    def end(self) -> None:
        """Ask no more."""
        self._ended.set()
        self._thread.join()


def follow(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Advance period by period while a server follows."""
    switched_s: dict[int, float] = {}
    switch = LiveModel.switch

    def noted(model: LiveModel, period: int | None) -> None:
        switch(model, period)
        switched_s[period or 0] = time.monotonic()

    LiveModel.switch = noted  # type: ignore[assignment, method-assign]
    rows: list[dict[str, float]] = []
    for period in range(1, options.periods + 1):
        log = write_day(folder, period, options.rows)
        started_s, cpu_s = time.monotonic(), time.process_time()
        record = advance(URL, log, config=CONFIG, schema=SCHEMA, settings=SETTINGS, progress=False)
        assert record.published, record.gate.reasons
        row = {"period": period, "seconds": time.monotonic() - started_s, "cpu_s": time.process_time() - cpu_s}
        log.unlink()
        if period == 1:
            environment = os.environ | {CACHE_VARIABLE: str(folder / "server-cache")}
            command = [DLRM, "serve", f"{URL}/current", "--json", "--port", "0"]
            process = subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            client = Client(json.loads(process.stdout.readline())["url"])
        else:
            while period not in client.first_s:
                if time.monotonic() > switched_s[period] + 60:
                    msg = f"period {period} is not served a minute after its switch"
                    raise SystemExit(msg)
                time.sleep(0.05)
            row["switch_s"] = client.first_s[period] - switched_s[period]
        stored = objects.listed(URL)
        row |= {
            "rss_mb": resident_mb(os.getpid()),
            "server_mb": resident_mb(process.pid),
            "objects": len(stored),
            "stored_mb": sum(stat.size_bytes for stat in stored.values()) / 1e6,
            "cache_mb": folder_mb(folder / "cache"),
            "server_cache_mb": folder_mb(folder / "server-cache"),
            "load": os.getloadavg()[0],
        }
        rows.append(row)
        if period <= 10 or period % 20 == 0:
            print(" ".join(f"{name} {value:,.2f}" for name, value in row.items()), flush=True)
            if options.json:
                options.json.write_text(json.dumps({"rows": rows}) + "\n")
    client.end()
    process.terminate()
    process.wait()
    report = folder / "live.html"
    subprocess.run([DLRM, "report", URL, "--out", str(report)], check=True, stderr=subprocess.DEVNULL)
    found: dict[str, Any] = {
        "rows": rows,
        "answers": client.num_answers,
        "lost": client.lost,
        "slowest_answer_s": client.slowest_s,
        "switch_s": [row["switch_s"] for row in rows[1:]],
        "report_bytes": report.stat().st_size,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
    }
    print_stretches(rows)
    slowest = max(found["switch_s"])
    print(f"answers {client.num_answers:,}, lost {len(client.lost)}, slowest {client.slowest_s:.2f} s")
    print(
        f"from a switch to its first answer: median {statistics.median(found['switch_s']):.2f} s, most {slowest:.2f} s"
    )
    print(f"report: {report.stat().st_size / 1e6:.2f} MB")
    return found


def print_stretches(rows: list[dict[str, float]]) -> None:
    """The medians of a tenth of the periods each."""
    names = [name for name in rows[-1] if name != "period"]
    print(f"| periods | {' | '.join(names)} |")
    size = max(1, len(rows) // 10)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        values = [statistics.median(row.get(name, 0.0) for row in part) for name in names]
        print(f"| {part[0]['period']}-{part[-1]['period']} | {' | '.join(f'{value:,.2f}' for value in values)} |")


def resident_mb(process_id: int) -> float:
    """Anonymous memory of a process."""
    lines = Path(f"/proc/{process_id}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssAnon"))


def folder_mb(folder: Path) -> float:
    """What its files take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink()) / 1e6


def command(
    folder: Path, host: str, *more: str | Path, environment: dict[str, str] | None = None
) -> subprocess.Popen[str]:
    """`dlrm advance` on a host, for the first and any later log."""
    config, schema = folder / "config.toml", folder / "schema.toml"
    config.write_text(config_toml(CONFIG))
    schema.write_text(schema_toml(SCHEMA))
    options = [
        "--config",
        config,
        "--schema",
        schema,
        "--gate.calibration",
        0.3,
        3.0,
        "--gate.max-logloss-increase",
        0.5,
    ]
    return subprocess.Popen(
        [*map(str, (DLRM, "advance", URL, *options, *more))],
        env=os.environ | {CACHE_VARIABLE: str(folder / host)} | (environment or {}),
        stderr=subprocess.PIPE,
        text=True,
    )


def two(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Two at once on two hosts; then one that is killed while it holds the lease."""
    os.environ[LEASE_VARIABLE] = "10"
    logs = [write_day(folder, day, options.rows) for day in range(2)]
    both = [command(folder, f"host-{number}", logs[0]) for number in range(2)]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    refused = next((text for code, text in zip(codes, said, strict=True) if code == 2), "")
    print(f"two at once: exit codes {codes}; {refused.strip().splitlines()[-1] if refused else said}")
    killed = command(folder, "host-0", logs[1])
    while "draft.json" not in " ".join(objects.listed(URL)):
        time.sleep(0.05)
    time.sleep(1)
    killed.kill()
    killed.communicate()
    killed_s, tries = time.monotonic(), 0
    while True:
        tries += 1
        process = command(folder, "host-2", logs[1])
        text = process.communicate()[1]
        if process.returncode == 0:
            break
        assert "holds the lease until" in text, text
        if tries == 1:
            print(f"after the kill: exit code {process.returncode}; {text.strip().splitlines()[-1]}")
    print(f"taken over and complete {time.monotonic() - killed_s:.1f} s after the kill; tries: {tries}")
    return {"codes": codes, "refused": refused, "same_bytes": compare(folder, logs)}


def kills(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Kill -9 at random moments, until there were as many; each time another host, whose cache is empty, goes on."""
    os.environ[LEASE_VARIABLE] = "2"
    luck, hosts = random.Random(options.seed), 0  # noqa: S311 - no secret
    logs: list[Path] = []
    done: list[str] = []
    while len(done) < options.kills:
        logs.append(write_day(folder, len(logs), options.rows))
        while True:
            hosts += 1
            process = command(folder, f"host-{hosts}", logs[-1])
            while process.poll() is None and not holds(process.pid):  # before, there is nothing to kill
                time.sleep(0.02)
            try:
                text = process.communicate(timeout=luck.uniform(0.0, 14.0) if len(done) < options.kills else None)[1]
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done.append(done_steps())
                print(f"kill {len(done)}, in period {len(logs)}; done: {done[-1]}", flush=True)
                continue
            if process.returncode == 0:
                break
            assert "holds the lease until" in text, text
    same = compare(folder, logs)
    print(f"{len(done)} kills in {len(logs)} periods, {hosts} hosts; same bytes: {same}")
    return {"kills": len(done), "periods": len(logs), "hosts": hosts, "done_at_kills": done, "same_bytes": same}


def machines(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Two hosts advance together, and again with the next log."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    more = ("--nnodes", "2", "--rdzv-endpoint", f"127.0.0.1:{port}")
    seconds = []
    for day in range(2):
        started_s, log = time.monotonic(), write_day(folder, day, options.rows)
        both = [command(folder, f"host-{number}", log, *more) for number in range(2)]
        said = [process.communicate()[1] for process in both]
        codes = [process.returncode for process in both]
        seconds.append(time.monotonic() - started_s)
        assert codes == [0, 0], said
    environment = json.loads(objects.read(f"{URL}/days/0002/run/environment.json"))
    print(f"two machines, two periods: {seconds[0]:.0f} and {seconds[1]:.0f} s; processes: {environment['world_size']}")
    return {"seconds": seconds, "world_size": environment["world_size"], "current": LiveModel.open(URL).current}


def faults(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """A period while the bucket fails at several moments; what ends the command is over when it is given again."""
    os.environ[LEASE_VARIABLE] = "2"
    cases: list[tuple[str, tuple[int, str] | None, float]] = [
        ("nothing", None, 0.0),
        ("5 % of 503, 5 % cut", None, 0.05),
        ("30 s of 503", (503, "SlowDown"), 0.0),
        *[("credentials expire", (403, "ExpiredToken"), 0.0)] * 3,
        *[("the bucket vanishes", (404, "NoSuchBucket"), 0.0)] * 3,
    ]
    luck = random.Random(options.seed)  # noqa: S311 - no secret
    logs: list[Path] = []
    rows: list[dict[str, object]] = []
    of_a_period = 0  # requests
    with far_away(options.server, latency_s=0.02, seed=options.seed) as away:
        for day, (name, answer, share) in enumerate(cases):
            logs.append(write_day(folder, day, options.rows))
            away.busy = away.cut = share
            started_s, asked = time.monotonic(), len(away.requests)
            process = command(folder, "host", logs[-1], environment=away.environment)
            wanted = luck.randrange(of_a_period // 6, of_a_period * 5 // 6) if answer else 0
            while answer and process.poll() is None and len(away.requests) < asked + wanted:
                time.sleep(0.005)
            done, away.answer = done_steps(), answer
            if answer and answer[0] == 503:
                time.sleep(30)
                away.answer = None
            said = process.communicate()[1].strip().splitlines()[-1]
            codes, away.answer = [process.returncode], None
            seconds, num_requests = time.monotonic() - started_s, len(away.requests) - asked
            whole = is_whole()
            while codes[-1]:
                again = command(folder, "host", logs[-1], environment=away.environment)
                text = again.communicate()[1]
                codes.append(again.returncode)
                assert codes[-1] == 0 or "holds the lease until" in text, text
            row = {"what": name, "done": done if answer else "", "codes": codes, "seconds": seconds}
            rows.append(row | {"requests": num_requests, "whole": whole, "said": said if codes[0] else ""})
            print(rows[-1], flush=True)
            of_a_period = of_a_period or num_requests
    return {"rows": rows, "same_bytes": compare(folder, logs)}


def is_whole() -> bool:
    """Whether `current`, where there is one, leads to a bundle all of whose files are there."""
    stored = objects.listed(URL)
    if "current" not in stored:
        return True
    bundle = objects.read(f"{URL}/current").decode()
    files = json.loads(objects.read(f"{URL}/{bundle}/bundle.json"))["files"]
    return all(f"{bundle}/{name}" in stored for name in files)


def watch(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Three logs come one after the other; Ctrl-C while it waits for the second, and in the middle of the third."""
    os.environ[LEASE_VARIABLE] = "2"
    logs = [write_day(folder, day, options.rows) for day in range(3)]
    hours = f"s3://{BUCKET}/hours"
    codes: list[int] = []

    def come(day: int) -> None:
        objects.write(f"{hours}/{day:02d}/part-0.tsv", logs[day])
        objects.write(f"{hours}/{day:02d}/_SUCCESS", b"")

    def stop() -> None:
        process.send_signal(signal.SIGINT)
        said = process.communicate()[1].strip().splitlines()[-1]
        codes.append(process.returncode)
        print(f"Ctrl-C: exit code {codes[-1]}; {said}", flush=True)

    come(0)
    process = command(folder, "host", "--watch", hours)
    wait_for(1, process)
    time.sleep(2)
    stop()
    process = command(folder, "host", "--watch", hours)
    come(1)
    wait_for(2, process)
    come(2)
    while not done_steps().endswith("preprocess"):
        time.sleep(0.02)
    stop()
    process = command(folder, "host", "--watch", hours)
    wait_for(3, process)
    stop()
    return {
        "codes": codes,
        "same_bytes": compare(folder, [located(f"{hours}/{day:02d}/part-0.tsv") for day in range(3)]),
    }


def wait_for(period: int, process: subprocess.Popen[str]) -> None:
    """Until a command has completed this period."""
    while f"days/{period:04d}/period.json" not in objects.listed(URL):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.1)


def cluster(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Two periods, preprocessed by two Dask workers that share nothing but the bucket."""
    environment = {**os.environ, CACHE_VARIABLE: str(folder / "cache")}
    dask, logs, codes = Cluster(folder, environment), [], []
    try:
        for _ in range(2):
            dask.start_worker()
        dask.wait_for(2)
        for day in range(2):
            url = f"s3://{BUCKET}/log-{day}.tsv"
            objects.write(url, write_day(folder, day, options.rows))
            logs.append(located(url))
            process = command(folder, "host", url, "--cluster", dask.address)
            said = process.communicate()[1]
            codes.append(process.returncode)
            assert process.returncode == 0, said
    finally:
        dask.close()
    return {"codes": codes, "same_bytes": compare(folder, logs)}


def holds(process_id: int) -> bool:
    """Whether the lease is a process's."""
    try:
        held = json.loads(objects.read(f"{URL}/.lock"))
    except FileNotFoundError:
        return False
    return held["pid"] == process_id


def done_steps() -> str:
    """What the draft in the bucket says."""
    drafts = [name for name in objects.listed(URL) if name.endswith("draft.json")]
    if not drafts:
        return "-"
    return ",".join(json.loads(objects.read(f"{URL}/{max(drafts)}"))["done"]) or "none"


def compare(folder: Path, logs: list[Path]) -> bool:
    """Whether the bucket has what the same calls leave on a disk."""
    for log in logs:
        advance(folder / "live", log, config=CONFIG, schema=SCHEMA, settings=LiveSettings(gate=WIDE), progress=False)
    expected, found = files_of(folder / "live"), bytes_of(URL)
    found["current"] = found["current"].decode()
    leave = {"times.json", "metrics.jsonl", "environment.json", ".lock"}
    names = [name for name in found.keys() | expected.keys() if Path(name).name not in leave]
    differing = sorted(name for name in names if found.get(name) != expected.get(name))
    print(f"{len(names)} files compared; differing: {differing or 'none'}")
    return not differing


if __name__ == "__main__":
    main()
