"""A model that is made overconfident on purpose, recalibrated by each method, on a synthetic log whose truth is known.

    python benchmarks/recalibration.py --rows 1000000 --out recalibration.json

The model of `criteo-small` learns the log; then all its logits are taken `--surer` times, as those of a model that has
seen its rows too often. Each method is fitted on the val split by `dlrm export` and judged here on the test split, with
what it must show: the calibration error at least halved, the AUC the same (platt: to 1e-6), the logloss not higher, and
no skew between checkpoint and bundle. The last part draws rows of known probabilities: how often the interval of the
calibration error holds the true one.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchdlrm import (
    ExportOptions,
    export,
    export_as,
    import_weights,
    load_config,
    preprocess,
    synthesize,
    train,
    verify,
)
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.served_model import ServedModel, predict_by_model
from torchdlrm.data.dataset import Dataset
from torchdlrm.features.schema import criteo_schema
from torchdlrm.judged import Judged
from torchdlrm.judging.reliability import reliability
from torchdlrm.metrics import metrics_of
from torchdlrm.processor import processor_name
from torchdlrm.progress import SILENT

WAYS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "platt": {"recalibrate": "platt"},
    "isotonic": {"recalibrate": "isotonic"},
    "histogram": {"recalibrate": "histogram"},
    "platt by cat_5": {"recalibrate": "platt", "recalibrate_by": "cat_5"},
}


def prepared(folder: Path, num_rows: int, surer: float) -> tuple[Path, Dataset]:
    """The overconfident run, and its dataset."""
    synthesize(folder / "log.tsv", rows=num_rows, progress=False)
    dataset = preprocess([folder / "log.tsv"], folder / "dataset", criteo_schema(), progress=False)
    train(load_config("criteo-small", {"logging.tensorboard": "false"}), dataset, folder / "trained", progress=False)
    export_as(folder / "trained", folder / "model.pt", "torchrec")
    weights = torch.load(folder / "model.pt")
    for name in ("over_arch.model.1.weight", "over_arch.model.1.bias"):
        weights[name] *= surer
    return import_weights(weights, dataset, folder / "run").path, dataset


def judge(folder: Path, run: Path, dataset: Dataset) -> list[dict[str, Any]]:
    """Each way's metrics on the test split."""
    found = []
    for way, options in WAYS.items():
        out, started_s = folder / way.replace(" ", "-"), time.perf_counter()
        export(run, out, options=ExportOptions(name="clicks", **options), progress=False)
        seconds = time.perf_counter() - started_s
        served, names = ServedModel(Bundle.open(out)), dataset.schema.target_names
        logits, labels = predict_by_model(served, dataset, "test", names, SILENT, phase="judge")
        judged = Judged.of(labels, logits)
        curve, metrics = reliability(judged), metrics_of(judged)
        agrees = verify(out, dataset, run=run, max_rows=20_000, progress=False)
        found.append(
            {
                "way": way,
                "rows": metrics.rows,
                "calibration_error": curve.error.value,
                "by_chance": curve.by_chance,
                "auc": metrics.auc,
                "logloss": metrics.logloss,
                "mean_ratio": metrics.calibration,
                "agrees": agrees.agrees,
                "largest_difference": max(path.agreement.largest_difference for path in agrees.paths),
                "export_s": seconds,
            }
        )
    return found


def coverage(num_draws: int, num_rows: int, scale: float) -> float:
    """How often the interval of the calibration error of a model with `scale` times the true logits holds the truth."""
    rng, held = np.random.default_rng(1), 0
    for _ in range(num_draws):
        truth = rng.normal(-2, 1.2, num_rows)
        rates = 1 / (1 + np.exp(-truth))
        labels, logits = rng.random(num_rows) < rates, (scale * truth).astype(np.float32)
        found = reliability(Judged.of(labels, logits))
        order = np.argsort(logits)
        means = (1 / (1 + np.exp(-scale * truth)))[order]
        in_bins = zip(np.array_split(rates[order], 20), np.array_split(means, 20), strict=True)
        true_error = np.mean([abs(rate.mean() - mean.mean()) for rate, mean in in_bins])
        held += found.error.low <= true_error <= found.error.high
    return held / num_draws


def main() -> None:
    """Judge the ways, then the intervals."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--surer", type=float, default=2.5)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ways = judge(folder, *prepared(folder, options.rows, options.surer))
    print(f"{'':16}{'error':>9}{'chance':>9}{'AUC':>10}{'logloss':>10}{'ratio':>8}{'skew':>9}{'export, s':>11}")
    for one in ways:
        print(
            f"{one['way']:16}{one['calibration_error']:9.5f}{one['by_chance']:9.5f}{one['auc']:10.6f}{one['logloss']:10.5f}"
            f"{one['mean_ratio']:8.3f}{one['largest_difference']:9.1g}{one['export_s']:11.1f}"
        )
    held = {
        f"{num_rows:,} rows, logits {scale:g} times": coverage(options.draws, num_rows, scale)
        for num_rows in (2_000, 20_000)
        for scale in (1.0, 1.2, 2.0)
    }
    for what, share in held.items():
        print(f"{what}: {share:.1%} of {options.draws} intervals hold the true calibration error")
    content = {
        "processor": processor_name(),
        "rows": options.rows,
        "surer": options.surer,
        "ways": ways,
        "coverage": held,
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
