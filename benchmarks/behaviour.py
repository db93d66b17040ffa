"""How much of what a history says each pooling finds, on the log of a shop whose true probabilities are known.

    python benchmarks/behaviour.py --rows 400000 --seeds 3 --json behaviour.json

`dlrm synthesize --history` writes the log; its items share one table with the histories. Every pooling trains on it
with the same settings, those of `--config` and `--set`, and each seed trains all of them. The AUC is that of the test
split. What is attainable there, with the history and without it, is in the truth beside the log. `closed` is how much
of the distance from sum pooling to the attainable AUC a pooling covers, in the mean over seeds.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

from torchdlrm import evaluate, load_config, preprocess, synthesize, train
from torchdlrm.processor import describe_processor
from torchdlrm.synthetic.log import truth_path

POOLINGS: Mapping[str, Mapping[str, str]] = {
    "sum": {},
    "mean": {"pooling": "mean"},
    "last": {"pooling": "last"},
    "din": {"pooling": "attention", "target": "item"},
    "dot": {"pooling": "attention", "target": "item", "attention": "dot"},
}
SETTINGS = ("train.batch_size_global=64", "train.epochs=2", "dense_optimizer.learning_rate=0.02")


def main() -> None:
    """Train all, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=400_000, help="of the log")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each")
    parser.add_argument("--config", default="criteo-small", help="what each trains, apart from the pooling")
    parser.add_argument("--set", nargs="*", default=list(SETTINGS), help="further settings of all, as KEY=VALUE")
    parser.add_argument("--poolings", nargs="+", default=list(POOLINGS), choices=list(POOLINGS))
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    print(describe_processor())
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log.tsv"
        synthesize(log, rows=options.rows, extras=["history"], progress=False)
        dataset = preprocess(log, Path(scratch) / "dataset", f"{log}.schema.toml", progress=False)
        splits = json.loads(truth_path(log).read_text())["splits"]
        aucs: dict[str, list[float]] = {name: [] for name in options.poolings}
        for seed in range(options.seeds):
            for name, found in aucs.items():
                settings = dict(text.split("=", 1) for text in options.set)
                settings |= {f"model.features.history.{key}": value for key, value in POOLINGS[name].items()}
                settings |= {"seed": str(seed), "logging.tensorboard": "false"}
                run = Path(scratch) / f"{name}-{seed}"
                train(load_config(options.config, settings), dataset, run, progress=False)
                metrics = evaluate(run, split="test", progress=False)
                assert metrics is not None, "the first and only process"
                found.append(metrics["auc"])
                print(f"{name}, seed {seed}: {metrics['auc']:.4f}", flush=True)
    attainable, without = splits["test"]["auc"], splits["test.without_history"]["auc"]
    print(f"attainable {attainable:.4f}, without the history {without:.4f}")
    print(f"{'pooling':10} {'mean AUC':>9} {'worst':>7} {'closed':>7}")
    rows: list[dict[str, Any]] = []
    base = statistics.mean(aucs.get("sum") or [without])
    for name, found in aucs.items():
        mean = statistics.mean(found)
        closed = (mean - base) / (attainable - base)
        print(f"{name:10} {mean:9.4f} {min(found):7.4f} {closed:7.1%}")
        rows.append({"pooling": name, "aucs": found, "mean_auc": mean, "closed": closed})
    if options.json:
        report = {"processor": describe_processor(), "rows": options.rows, "settings": options.set}
        report |= {"attainable_auc": attainable, "without_history_auc": without, "measured": rows}
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
