"""Measures `dlrm preprocess --cluster` by Dask workers that share nothing but a bucket, and kills some of them.

    python benchmarks/cluster.py --rows 200000 --workers 1 2 4 8 --json cluster.json
    python benchmarks/cluster.py --rows 100000 --workers 8 --kills 20

The bucket is moto's S3 server on the loopback interface, behind a proxy that counts bytes.  Each worker has its own
mount namespace (where `unshare -m` is allowed), whose cache is a file system of its own.  However many cores there are,
these do not depend on their number: seconds of processors and bytes moved of a row, and the part of the time of
processors that is the command's own, which no worker takes from it.  What imports take is left out, and what Dask's
workers take while they wait.  The first run kills a worker in each phase, and starts another.  With `--kills`, jobs run
one after the other while workers are killed at random moments, each replaced by another.  All must give the bytes of a
job without a cluster.

Prints a table, and writes every figure as JSON.  Needs the development dependencies.
"""

import argparse
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.buckets import bytes_of, far_away, s3_server  # type: ignore[import-not-found]
from torchdlrm.storage import objects
from torchdlrm.synthetic.synthesize import synthesize

_IDLE_S = 5.0
DASK = [sys.executable, "-m"]


class Cluster:
    """A scheduler and workers, each in a mount namespace of its own."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder, self.environment = folder, environment
        command = [*DASK, "distributed.cli.dask_scheduler", "--port", "0", "--host", "127.0.0.1", "--no-dashboard"]
        tries = environment | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "10"}
        self.scheduler = subprocess.Popen(command, cwd=folder, env=tries, stderr=subprocess.PIPE, text=True)
        assert self.scheduler.stderr is not None
        found = (re.search(r"tcp://[\d.]+:\d+", line) for line in self.scheduler.stderr)
        self.address = next(match[0] for match in found if match)
        self.workers: list[subprocess.Popen[bytes]] = []

    def start_worker(self) -> None:
        """One more; waits for none."""
        cache = self.folder / "mount"
        cache.mkdir(exist_ok=True)
        environment = self.environment | {"TORCHDLRM_CACHE": str(cache)}
        worker = [*DASK, "distributed.cli.dask_worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", self.address]
        apart = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {cache} && exec "$@"', "sh"]
        if subprocess.run([*apart, "true"], capture_output=True, check=False).returncode:
            apart, environment["TORCHDLRM_CACHE"] = [], str(self.folder / f"cache-{len(self.workers)}")
        self.workers.append(
            subprocess.Popen([*apart, *worker], cwd=self.folder, env=environment, stderr=subprocess.DEVNULL)
        )

    def wait_for(self, number: int) -> None:
        """Until there are so many workers, which have imported what they need."""
        from distributed import Client  # noqa: PLC0415

        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(number, timeout=600)
            client.run(__import__, "torchdlrm.preprocessing.preprocess")

    def cpu_s(self) -> float:
        """Of all workers that are alive."""
        times = [psutil.Process(worker.pid).cpu_times() for worker in self.workers if worker.poll() is None]
        return sum(found.user + found.system for found in times)

    def close(self) -> None:
        """Stop all processes."""
        processes: list[Any] = [*self.workers, self.scheduler]
        for process in processes:
            process.kill()
            process.wait()


def command_cpu_s() -> float:
    """Of all commands that have ended."""
    found = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found.ru_utime + found.ru_stime


def preprocess(arguments: list[str], environment: dict[str, str], after_phase: Any = None) -> tuple[float, float]:
    """Wall time and processor time of a command; `after_phase` is called with the name of each that ends."""
    cpu_s, began_s = command_cpu_s(), time.perf_counter()
    command = [sys.executable, "-m", "torchdlrm", "preprocess", *arguments, "--json"]
    with subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("{") and after_phase is not None:
                after_phase(json.loads(line)["phase"])
            elif not line.startswith("{") and "error" in line.lower():
                print(line, end="", file=sys.stderr)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit code {process.returncode}")
    return time.perf_counter() - began_s, command_cpu_s() - cpu_s


def measured(
    cluster: Cluster, out: str, arguments: list[str], start_cpu_s: float, num_rows: int, *, kills: bool
) -> dict[str, Any]:
    """What a job took, of whose workers one may be killed in each phase, and another started."""

    def kill(_: str) -> None:
        next(worker for worker in cluster.workers if worker.poll() is None).send_signal(signal.SIGKILL)
        cluster.start_worker()

    def kill_in_read() -> None:
        while not objects.listed(f"{out}.partial"):
            time.sleep(0.05)
        kill("read")

    if kills:
        threading.Thread(target=kill_in_read, daemon=True).start()
    number, cpu_s = len(cluster.workers), cluster.cpu_s()
    time.sleep(_IDLE_S)  # a worker of Dask that waits for tasks has work, too
    idle_cpu_per_s = (cluster.cpu_s() - cpu_s) / _IDLE_S
    cpu_s = cluster.cpu_s()
    wall_s, own_cpu_s = preprocess(arguments, cluster.environment, kill if kills else None)
    own_cpu_s = max(0.0, own_cpu_s - start_cpu_s)
    all_cpu_s = cluster.cpu_s() - cpu_s - idle_cpu_per_s * wall_s + own_cpu_s
    return {
        "workers": number,
        "killed": sum(worker.poll() is not None for worker in cluster.workers),
        "rows_per_s": num_rows / wall_s,
        "cpu_us_per_row": 1e6 * all_cpu_s / num_rows,
        "serial_fraction": own_cpu_s / all_cpu_s,
        "pieces_left": len(objects.listed(f"{out}.partial")),
    }


def killed(
    folder: Path,
    environment: dict[str, str],
    arguments: list[str],
    options: argparse.Namespace,
    expected: dict[str, bytes],
) -> dict[str, Any]:
    """Jobs, until so many workers were killed at random moments of them."""
    luck, kills = random.Random(0), 0  # noqa: S311 - no secret
    jobs: list[dict[str, Any]] = []
    cluster, at_work = Cluster(folder, environment), threading.Event()

    def kill() -> None:
        nonlocal kills
        while kills < options.kills:
            time.sleep(luck.uniform(1.0, 15.0))
            if at_work.is_set():
                luck.choice([worker for worker in cluster.workers if worker.poll() is None]).send_signal(signal.SIGKILL)
                cluster.start_worker()
                kills += 1

    try:
        for _ in range(options.workers[0]):
            cluster.start_worker()
        cluster.wait_for(options.workers[0])
        killer = threading.Thread(target=kill, daemon=True)
        killer.start()
        while killer.is_alive():
            out, before = f"s3://clicks/killed-{len(jobs)}", kills
            at_work.set()
            wall_s, _ = preprocess([*arguments, "--out", out, "--cluster", cluster.address], environment)
            at_work.clear()
            is_same = bytes_of(out) == expected and not objects.listed(f"{out}.partial")
            jobs.append({"kills": kills - before, "seconds": wall_s, "same_bytes": is_same})
            print(json.dumps(jobs[-1]), file=sys.stderr, flush=True)
    finally:
        cluster.close()
    print(f"{kills} kills in {len(jobs)} jobs; same bytes: {all(job['same_bytes'] for job in jobs)}")
    return {"kills": kills, "jobs": jobs}


def show(results: list[dict[str, Any]]) -> None:
    """Print a table."""
    table = Table()
    for column in ("workers", "killed", "rows/s", "CPU us/row", "bytes/row", "serial", "same bytes"):
        table.add_column(column, justify="right")
    for found in results:
        cells = (found["rows_per_s"], found["cpu_us_per_row"], found["bytes_per_row"])
        shown = f"{cells[0]:,.0f}", f"{cells[1]:.1f}", f"{cells[2]:,.0f}", f"{found['serial_fraction']:.1%}"
        if found["killed"]:  # what the processors of killed workers did is not known
            shown = shown[0], "", shown[2], ""
        is_clean = found["same_bytes"] and not found["pieces_left"]
        table.add_row(str(found["workers"]), str(found["killed"]), *shown, "yes" if is_clean else "NO")
    Console().print(table)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument(
        "--kills", type=int, default=0, help="of workers, at random moments of jobs; nothing else is done"
    )
    parser.add_argument("--memory", default="1GB", help="of each worker; the log is cut by it")
    parser.add_argument("--latency-s", type=float, default=0.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, s3_server() as server, far_away(server) as faults:
        folder = Path(name)
        synthesize(folder / "log.tsv", rows=options.rows, progress=False)
        log_bytes = (folder / "log.tsv").stat().st_size
        environment = {**os.environ, **faults.environment, "TORCHDLRM_CACHE": str(folder / "cache")}
        os.environ.update(server.environment)
        objects.write("s3://clicks/log.tsv", folder / "log.tsv")
        log, memory = "s3://clicks/log.tsv", ["--memory", options.memory]
        preprocess([log, "--out", "s3://clicks/here", *memory, "--workers", "1"], environment)
        expected = bytes_of("s3://clicks/here")
        _, start_cpu_s = preprocess([log, "--out", "s3://clicks/here", *memory], environment)
        faults.latency_s = options.latency_s
        if options.kills:
            results.append(killed(folder, environment, [log, *memory], options, expected))
        for number, kills in [] if options.kills else [(2, True), *((number, False) for number in options.workers)]:
            cluster = Cluster(folder, environment)
            try:
                for _ in range(number):
                    cluster.start_worker()
                cluster.wait_for(number)
                out = f"s3://clicks/out-{number}-{kills}"
                arguments = [log, "--out", out, *memory, "--cluster", cluster.address]
                num_bytes = faults.num_bytes
                found = measured(cluster, out, arguments, start_cpu_s, options.rows, kills=kills)
                found["bytes_per_row"] = (faults.num_bytes - num_bytes) / options.rows
                found["same_bytes"] = bytes_of(out) == expected
                results.append(found)
                print(json.dumps(found), file=sys.stderr, flush=True)
            finally:
                cluster.close()
    if not options.kills:
        show(results)
    if options.json:
        about = {"rows": options.rows, "log_bytes": log_bytes, "memory": options.memory, "cores": os.cpu_count()}
        options.json.write_text(json.dumps({**about, "runs": results}, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
