"""Logs of some days whose values and clicks drift a little, and what a live model needs besides: schema and config."""

import random

from helpers import days
from torchdlrm import GateSettings
from torchdlrm.config import load_config
from torchdlrm.features.columns import SparseColumn

NUM_DAYS = 5
# The held-back rows are few: what is random in their metrics is not what is tested here.
WIDE = GateSettings(calibration=(0.3, 3.0), max_logloss_increase=0.5)
SCHEMA = days.SCHEMA.model_copy(
    update={"columns": (*days.SCHEMA.columns, SparseColumn(name="page", kind="string", hash=50))}
)
CONFIG = load_config(
    "criteo-small",
    {
        "train.batch_size_global": "128",
        "model.embedding_dim": "8",
        "model.dense_arch_layer_sizes": "16,8",
        "model.over_arch_layer_sizes": "16,1",
        "logging.tensorboard": "false",
        "checkpoint.keep_last": "1",
        "warm_start.accumulator_decay": "0.9",
    },
)


def write_day(folder, day, num_rows=2_000):
    """The log of a day: a fifth of its items are new, and as many are gone."""
    rng = random.Random(day)
    lines = []
    for _ in range(num_rows):
        item, city = rng.randrange(20 * day, 20 * day + 100), rng.choice(("Ulm", "Bonn", "Jena", f"Ort {day}"))
        price = rng.gauss(5, 1)
        clicked = rng.random() < (0.6 if item % 3 == 0 else 0.15) * (1.2 if city == "Ulm" else 0.9)
        lines.append(f"{int(clicked)}\t{price:.8f}\t{item:x}\t{city}\t{item % 7}\n")
    path = folder / f"log-{day}.tsv"
    path.write_text("".join(lines))
    return path


# What tells of times, or of the folders that a run's dataset lies in.
_NEVER_THE_SAME = {"times.json", "metrics.jsonl", "environment.json"}


def files_of(folder):
    """The bytes of all files of a folder that are the same whenever they are written, and where links lead."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file():
            found[name] = None if path.name in _NEVER_THE_SAME else path.read_bytes()
    return found
