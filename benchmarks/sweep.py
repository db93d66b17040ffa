"""Whether a sweep that is killed again and again ends with the same trials and the same best as one that is not.

    python benchmarks/sweep.py --trials 20 --kills 5 --json sweep.json

Runs `dlrm sweep` on a synthetic log, once without an interruption and once ended by SIGKILL at random places of its
journal, in the middle of a line each time. Prints both, and says whether all but the times is the same.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from torchdlrm import preprocess, synthesize
from torchdlrm.features.schema import criteo_schema

CONFIG = """
[train]
batch_size_global = 512
[validation]
every_steps = 2
[checkpoint]
every_steps = 2
[logging]
tensorboard = false
"""
SPACE = """
"dense_optimizer.learning_rate" = {{ low = 0.001, high = 0.1, log = true }}
"model.over_arch_layer_sizes" = {{ choices = [[16, 1], [32, 1]] }}
"train.dropout" = {{ low = 0.0, high = 0.2, step = 0.1 }}
[sweep]
trials = {}
finalists = 0
"""


def main() -> None:
    """Sweep twice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        synthesize(folder / "log.tsv", rows=options.rows, progress=False)
        preprocess([folder / "log.tsv"], folder / "dataset", criteo_schema(), progress=False)
        (folder / "config.toml").write_text(CONFIG)
        (folder / "space.toml").write_text(SPACE.format(options.trials))
        whole, whole_s = sweep(folder, "whole")
        killed, killed_s = sweep(folder, "killed", options.kills, np.random.default_rng(options.seed))
    found = {"trials": options.trials, "kills": options.kills, "is_same": whole == killed, "best": whole["best"]}
    found |= {"seconds": whole_s, "seconds_killed": killed_s, "states": [trial["state"] for trial in whole["trials"]]}
    print(f"uninterrupted: best {whole['best']} of {options.trials}, {whole_s:.0f} s")
    print(f"killed {options.kills} times: best {killed['best']} of {len(killed['trials'])}, {killed_s:.0f} s")
    print("the same" if found["is_same"] else "NOT the same")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def sweep(
    folder: Path, out: str, kills: int = 0, rng: np.random.Generator | None = None
) -> tuple[dict[str, Any], float]:
    """What a sweep finds that is killed so often, without the times; and how long it takes in all."""
    journal, started_s = folder / out / "journal.log", time.monotonic()
    command: list[str | Path] = [Path(sys.executable).with_name("dlrm"), "sweep", folder / "config.toml", "--json"]
    command += ["--space", folder / "space.toml", "--dataset", folder / "dataset", "--out", folder / out]
    for _ in range(kills):
        assert rng is not None, "it says where"
        target = lines_of(journal) + int(rng.integers(8, 30))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while lines_of(journal) < target and process.poll() is None:
                time.sleep(0.02)
            process.kill()
        with journal.open("ab") as file:
            file.write(b'{"op_code":6,"worker_id":"a592f')
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
    found = json.loads(done.stdout)
    for trial in found["trials"]:
        del trial["seconds"]
    return found, time.monotonic() - started_s


def lines_of(path: Path) -> int:
    """How many there are."""
    return len(path.read_bytes().splitlines()) if path.exists() else 0


if __name__ == "__main__":
    main()
