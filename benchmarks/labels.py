"""What one model of two labels knows of each, beside a model for each label: heads, by paired seeds.

    python benchmarks/labels.py --folder labels --seeds 5

The log is synthetic, with clicks and purchases after them (`dlrm synthesize --labels 2`): effects of users, items and
pairs of both on the click, of which the purchase has three quarters. AUC is that of val and test, and differences from
the model of the single label are paired by seed; their intervals are of Student's t over the seeds. Each training
appends a line to runs.jsonl in the folder; those that are there already are not repeated.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

from scipy import stats

from torchdlrm import evaluate, load_config, load_schema, preprocess, synthesize, train

LABELS = ("click", "purchase")
BOTH = {"train.labels": ",".join(LABELS)}
ESMM = {"model.heads.after.purchase": "click"}
MMOE = {"model.heads.kind": "mmoe", "model.heads.expert_layer_sizes": "64,32"}
PLE = {"model.heads.kind": "ple", "model.heads.num_experts": "1", "model.heads.num_shared_experts": "1"}
PLE |= {"model.heads.expert_layer_sizes": "128"}
VARIANTS: Mapping[str, Mapping[str, str]] = {
    "click": {"train.label": "click"},
    "purchase": {"train.label": "purchase"},
    "shared": BOTH,
    "shared, after": BOTH | ESMM,
    "mmoe, after": BOTH | ESMM | MMOE,
    "ple, after": BOTH | ESMM | PLE,
    "shared, after, uncertainty": BOTH | ESMM | {"train.loss_weights": "uncertainty"},
}
# A cross net has the effects of users and items, and of pairs, without an over arch that must find them.
SETTINGS = {
    "model.embedding_dim": "16",
    "model.table_init_scale": "4",
    "model.interaction": "dcn",
    "model.dcn.low_rank_dim": "24",
    "model.dcn.num_layers": "2",
    "model.dense_arch_layer_sizes": "32,16",
    "model.over_arch_layer_sizes": "64,32,1",
    "train.batch_size_global": "256",
    "train.epochs": "3",
    "train.precision": "float32",
    "train.num_threads": "1",
    "dense_optimizer.learning_rate": "0.01",
    "logging.tensorboard": "false",
}


def main() -> None:
    """Train what is not there yet, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("labels"), help="for log, dataset and runs.jsonl")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the log")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each variant")
    parser.add_argument("--variants", nargs="+", default=[*VARIANTS], choices=[*VARIANTS], metavar="VARIANT")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, each in a thread of its own")
    parser.add_argument("--json", type=Path, help="write the table here, too")
    options = parser.parse_args()
    log, dataset, lines = (options.folder / name for name in ("log.tsv", "dataset", "runs.jsonl"))
    options.folder.mkdir(parents=True, exist_ok=True)
    if not log.exists():
        synthesize(log, rows=options.rows, extras=("purchase",))
    preprocess([log], dataset, load_schema(f"{log}.schema.toml"), progress=False)
    done = {(run["variant"], run["seed"]) for run in read(lines)}
    asked = itertools.product(range(options.seeds), options.variants)
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        left = [(variant, seed) for seed, variant in asked if (variant, seed) not in done]
        for future in as_completed([pool.submit(one_run, dataset, *task) for task in left]):
            with lines.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
    truth = json.loads(Path(f"{log}.truth.json").read_text())["splits"]
    table = [
        {"variant": "attainable", "click": truth["held_out"]["auc"], "purchase": truth["held_out.purchase"]["auc"]}
    ]
    table += rows_of([run for run in read(lines) if run["seed"] < options.seeds], options.variants)
    for row in table:
        print("  ".join(f"{name} {show(value)}" for name, value in row.items()))
    if options.json:
        options.json.write_text(json.dumps(table, indent=1) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The lines that are complete."""
    found = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in found if line.endswith("}")]


def one_run(dataset: Path, variant: str, seed: int) -> dict[str, Any]:
    """Train once; what the held-out rows say of each label."""
    config = load_config("criteo-small", {**SETTINGS, **VARIANTS[variant], "seed": str(seed)})
    with TemporaryDirectory() as place:
        started_s = time.process_time()
        history = train(config, dataset, Path(place) / "run", progress=False)
        cpu_s = time.process_time() - started_s
        found = evaluate(Path(place) / "run", split="val+test", progress=False)
    assert history is not None
    assert found is not None
    of_labels = {found["label"]: found, **found.get("labels", {})}
    metrics = {label: {"auc": of["auc"], "calibration": of["calibration"]} for label, of in of_labels.items()}
    return {"variant": variant, "seed": seed, "labels": metrics, "cpu_s": cpu_s}


def rows_of(runs: Sequence[Mapping[str, Any]], variants: Sequence[str]) -> Iterator[dict[str, Any]]:
    """A row for each variant: mean AUC of each label, and how far it is from that of the label alone."""
    aucs = {(run["variant"], label, run["seed"]): of["auc"] for run in runs for label, of in run["labels"].items()}
    for variant in variants:
        mine = [run for run in runs if run["variant"] == variant]
        row: dict[str, Any] = {"variant": variant, "seeds": len(mine)}
        for label in LABELS:
            seeds = [run["seed"] for run in mine if label in run["labels"]]
            pairs = [(aucs[variant, label, s], aucs[label, label, s]) for s in seeds if (label, label, s) in aucs]
            if pairs:
                differences = [one - alone for one, alone in pairs]
                row[label] = statistics.mean(one for one, _ in pairs)
                row[f"{label}, above one label"] = statistics.mean(differences)
                if len(pairs) > 1 and variant not in LABELS:
                    error = statistics.stdev(differences) / len(pairs) ** 0.5
                    row[f"{label}, +-"] = float(stats.t.ppf(0.975, len(pairs) - 1)) * error
        yield row | ({"cpu s": statistics.median(run["cpu_s"] for run in mine)} if mine else {})


def show(value: object) -> str:
    """A number with the digits that say something."""
    return (
        f"{value:.4f}"
        if isinstance(value, float) and abs(value) < 2
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )


if __name__ == "__main__":
    main()
