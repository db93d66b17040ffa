"""Trains from a bucket that is far away and faulty, and from a disk: rows/s, kills, bytes.

    python benchmarks/train_from_bucket.py rows --rows 3000000   # 20 ms, 100 MB/s, empty cache, against a local run
    python benchmarks/train_from_bucket.py kills --kills 20      # each resumed with an empty cache; 10 % fail

Needs the tests' packages. Prints a table, then JSON in a line.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from helpers.buckets import bytes_of, far_away, s3_server  # type: ignore[import-not-found]
from torchdlrm import PreprocessOptions, preprocess
from torchdlrm.storage import objects

DLRM = Path(sys.executable).with_name("dlrm")
KILLED = ("--train.epochs", "2", "--checkpoint.every-steps", "40", "--logging.every-steps", "20")


def run(folder: Path, *arguments: object, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """The JSON that a command prints; ends the benchmark where it fails."""
    command = [str(DLRM), *map(str, arguments), "--json"]
    environment = {**os.environ, **(environment or {})}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return json.loads(done.stdout)


def prepare(folder: Path, num_rows: int) -> None:
    """Make a log and its dataset, in about ten parts."""
    run(folder, "synthesize", "--rows", num_rows, "--out", "log.tsv")
    options = PreprocessOptions(part_rows=max(num_rows // 10, 16_384))
    preprocess(folder / "log.tsv", folder / "dataset", options=options, progress=False)


def upload(folder: Path, url: str) -> None:
    """Put a folder into the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            objects.write(f"{url}/{path.relative_to(folder).as_posix()}", path)


def environment_of(faults: Any, cache: Path) -> dict[str, str]:
    """Of a host with this cache that reaches the bucket through the proxy."""
    return {**faults.environment, "TORCHDLRM_CACHE": str(cache)}


def rows(folder: Path, server: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Local and remote runs in turn, each in a process of its own, each remote one with an empty cache."""
    upload(folder / "dataset", "s3://clicks/dataset")
    how = ("--train.batch-size-global", options.batch, "--logging.every-steps", 200, "--train.epochs", options.epochs)
    found: dict[str, list[float]] = {"local": [], "remote": []}
    with far_away(server, latency_s=0.02, bytes_per_s=100e6) as faults:
        for turn in range(options.turns):
            local = run(folder, "train", options.config, "--dataset", "dataset", "--run", f"run-{turn}", *how)
            url, environment = f"s3://clicks/run-{turn}", environment_of(faults, folder / f"cache-{turn}")
            arguments = (options.config, "--dataset", "s3://clicks/dataset", "--run", url, *how)
            faults.num_bytes = 0
            remote = run(folder, "train", *arguments, environment=environment)
            for name, summary in (("local", local), ("remote", remote)):
                found[name].append(summary["rows_per_s"])
                print(f"{name:>6} {summary['rows_per_s']:>10,.0f} rows/s, {summary['seconds']:.1f} s of steps")
            print(f"       {faults.num_bytes / 1e6:,.0f} MB through the proxy, {len(faults.requests)} requests")
    ratio = sum(found["remote"]) / sum(found["local"])
    print(f"remote / local: {ratio:.3f}")
    return {**found, "ratio": ratio}


def kills(folder: Path, server: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Kill a training again and again, and go on with an empty cache."""
    upload(folder / "dataset", "s3://clicks/dataset")
    run(folder, "train", "criteo-small", "--dataset", "dataset", "--run", "run", *KILLED)
    expected = {
        path.relative_to(folder / "run/checkpoints").as_posix(): path.read_bytes()
        for path in sorted((folder / "run/checkpoints").glob("*/*"))
    }
    luck = random.Random(options.seed)  # noqa: S311 - no secret
    num_kills, started_s, begun_at = 0, time.monotonic(), list[str]()
    with far_away(server, busy=0.05, cut=0.05) as faults:
        command = [
            str(DLRM),
            "train",
            "criteo-small",
            "--dataset",
            "s3://clicks/dataset",
            "--run",
            "s3://clicks/run",
            *KILLED,
        ]
        while True:
            shutil.rmtree(folder / "cache", ignore_errors=True)
            environment = {**os.environ, **environment_of(faults, folder / "cache")}
            job = subprocess.Popen(
                command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            try:
                end_s = luck.uniform(*options.after_s) if num_kills < options.kills else None
                said = job.communicate(timeout=end_s)[1]
            except subprocess.TimeoutExpired:
                os.killpg(job.pid, signal.SIGKILL)
                said, num_kills = job.communicate()[1], num_kills + 1
                begun_at.append(said.partition("resuming after step ")[2].partition("\n")[0] or "0")
                continue
            if job.returncode:
                sys.exit(said[-2000:])
            if num_kills >= options.kills:
                break
            run_folder = "s3://clicks/run"  # done before it could be killed: once more from the start
            print(f"complete after {num_kills} kills: begun again", flush=True)
            subprocess.run([*command, "--restart", "--dry-run"], env=environment, capture_output=True, check=False)
            objects.delete(*[f"{run_folder}/{name}" for name in objects.listed(run_folder)])
        num_requests = len(faults.requests)
    found = bytes_of("s3://clicks/run/checkpoints")
    same = found == expected
    print(f"{num_kills} kills in {time.monotonic() - started_s:.0f} s, {num_requests} requests, 5 % busy, 5 % cut")
    print(f"resumed after steps {', '.join(begun_at)}")
    print(f"checkpoints: {len(found)} files, {'the same bytes as local' if same else 'OTHER BYTES'}")
    return {"kills": num_kills, "same_bytes": same, "requests": num_requests, "begun_at": begun_at}


def main() -> None:
    """Do one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("rows", "kills"))
    parser.add_argument("--rows", type=int, help="of the log; 3,000,000 for rows, 20,000 for kills")
    parser.add_argument("--config", default="criteo-small")
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--after-s", type=float, nargs=2, default=(8, 40), help="a process is killed between these")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="train-from-bucket-") as name, s3_server() as server:
        folder = Path(name)
        os.environ |= server.environment | {"TORCHDLRM_CACHE": str(folder / "cache-of-the-benchmark")}
        prepare(folder, options.rows or {"rows": 3_000_000, "kills": 20_000}[options.part])
        found = {"rows": rows, "kills": kills}[options.part](folder, server, options)
    print(json.dumps({"part": options.part, **found}))


if __name__ == "__main__":
    main()
