"""What the interaction architectures reach on a log, with its numbers as they are and also as categories.

    python benchmarks/architectures.py train.txt --json architectures.json

The log is preprocessed by the schemas `criteo` and `criteo-bucketed`, and each architecture trains on both with
`configs/criteo-small.toml` and five seeds. The AUC is that of all rows that are not trained on (val and test), the rows
per second are of the training, which validates and saves at its end alone. Each seed trains all, one after the other,
so that a noisy moment of the machine meets all of them; medians of rows per second are printed.
"""

import argparse
import json
import os
import statistics
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads

from torchdlrm import evaluate, load_config, preprocess, train
from torchdlrm.processor import describe_processor

_SCHEMAS = {"plain": "criteo", "bucketed": "criteo-bucketed"}
_FINALNET = str(Path(__file__).parents[1] / "examples" / "finalnet.py") + ":FinalNet"
_CROSS_NET = {"model.interaction": "dcn", "model.dcn.num_layers": "2", "model.dcn.low_rank_dim": "64"}
_BRANCHES = {"model.projection.branch1_layer_sizes": "128,64", "model.projection.branch2_layer_sizes": "128,64"}
_ARCHITECTURES: Mapping[str, tuple[Mapping[str, str], str | None]] = {
    "dot": ({}, None),
    "dcn": (_CROSS_NET, None),
    "gated dcn": ({**_CROSS_NET, "model.dcn.gated": "true"}, None),
    "projection": ({"model.interaction": "projection", **_BRANCHES}, None),
    "FinalNet": ({}, _FINALNET),
}


def main() -> None:
    """Measure all, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("log", nargs="+", help="files of a log in Criteo's layout")
    parser.add_argument("--seeds", type=int, default=5, help="trainings of each")
    parser.add_argument("--config", default="criteo-small", help="what each trains, apart from the interaction")
    parser.add_argument("--architectures", nargs="*", default=list(_ARCHITECTURES), choices=list(_ARCHITECTURES))
    parser.add_argument("--json", type=Path, help="write the measurements here, too")
    options = parser.parse_args()
    print(describe_processor())
    with TemporaryDirectory() as folder:
        for name, schema in _SCHEMAS.items():
            preprocess(options.log, Path(folder) / name, schema)
        aucs: dict[tuple[str, str], list[float]] = {}
        speeds: dict[tuple[str, str], list[float]] = {}
        for seed in range(1, options.seeds + 1):
            for architecture in options.architectures:
                for dataset in _SCHEMAS:
                    run = Path(folder) / f"run-{architecture}-{dataset}-{seed}"
                    auc, rows_per_s = _train(options.config, architecture, seed, Path(folder) / dataset, run)
                    aucs.setdefault((architecture, dataset), []).append(auc)
                    speeds.setdefault((architecture, dataset), []).append(rows_per_s)
    found: list[dict[str, Any]] = []
    print(f"{'architecture':12} {'dataset':9} {'mean AUC':>9} {'worst':>7} {'rows/s':>8}")
    for (architecture, dataset), values in aucs.items():
        row: dict[str, Any] = {"architecture": architecture, "dataset": dataset, "aucs": values}
        row |= {"mean_auc": statistics.mean(values), "worst_auc": min(values)}
        row["rows_per_s"] = statistics.median(speeds[architecture, dataset])
        found.append(row)
        print("{architecture:12} {dataset:9} {mean_auc:9.4f} {worst_auc:7.4f} {rows_per_s:8,.0f}".format(**row))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


def _train(config_name: str, architecture: str, seed: int, dataset: Path, run: Path) -> tuple[float, float]:
    """The AUC of a run on the held-out rows, and its training rows per second."""
    settings, model_class = _ARCHITECTURES[architecture]
    config = load_config(config_name, {**settings, "seed": str(seed), "logging.tensorboard": "false"})
    history = train(config, dataset, run, model_class=model_class)
    metrics = evaluate(run, split="val+test", model_class=model_class)
    assert history is not None
    assert metrics is not None, "the first and only process"
    return metrics["auc"], history.summary.rows_per_s


if __name__ == "__main__":
    main()
