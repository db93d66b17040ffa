"""How often intervals of 95 % hold the true value, over synthetic draws whose truth is known.

    python benchmarks/metric_coverage.py --draws 500 --json metric_coverage.json

Rows are drawn again and again from one population: rows that are independent of each other, the same with weights, and
rows of users, each with a rate of its own, so that a user's rows are alike. What is true of the population is the value
over a sample a thousand times as large. Of 500 draws 93 to 97 % are what 95 % gives.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from torchdlrm.judged import Judged
from torchdlrm.metrics import estimates, metrics_of

DESIGNS = ("plain", "weighted", "clustered", "weighted, clustered")
_TRUTH_SAMPLES = 1_000
_LARGEST_USER = 20


def main() -> None:
    """Draw, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--rows", type=int, default=4_000, help="of a draw, about")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    found = []
    for design in DESIGNS:
        for name, figures in coverage(design, options.draws, options.rows, options.seed).items():
            found.append({"design": design, "metric": name, "draws": options.draws, **figures})
            is_right = 0.93 <= figures["holds"] <= 0.97
            print(
                f"{design:<20} {name:<12} holds {figures['holds']:.3f}{'' if is_right else ' *'}  true "
                f"{figures['true']:.5f}  mean {figures['mean']:.5f}  scatter {figures['scatter']:.5f}  standard error "
                f"{figures['standard_error']:.5f}"
            )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def coverage(design: str, draws: int, rows: int, seed: int = 0) -> dict[str, dict[str, float]]:
    """Of each metric how often its interval holds what is true, and how its estimates scatter."""
    rng = np.random.default_rng(seed)
    true = metrics_of(draw(rng, design, rows * _TRUTH_SAMPLES)).as_dict()
    several = [estimates(draw(rng, design, rows)) for _ in range(draws)]
    found = {}
    for name in several[0]:
        values, errors, low, high = np.array([one[name] for one in several]).T
        found[name] = {
            "holds": float(((low <= true[name]) & (true[name] <= high)).mean()),
            "true": true[name],
            "mean": float(values.mean()),
            "scatter": float(values.std(ddof=1)),
            "standard_error": float(errors.mean()),
        }
    return found


def draw(rng: np.random.Generator, design: str, rows: int) -> Judged:
    """Rows of a population that a model predicts with noise, a bit too high."""
    groups: Any = None
    shared: Any = 0.0
    if "clustered" in design:
        sizes = rng.integers(1, _LARGEST_USER + 1, 2 * rows // (_LARGEST_USER + 1))
        groups = np.repeat(np.arange(sizes.size, dtype=np.int32), sizes)
        shared, rows = rng.normal(0, 1, sizes.size)[groups], groups.size
    truth = -1.2 + shared + rng.normal(0, 1, rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    logits = (truth + 0.1 + 0.5 * rng.normal(0, 1, rows)).astype(np.float32)
    weights = rng.choice(np.array([0.5, 1, 2, 4], np.float32), rows) if "weighted" in design else None
    return Judged.of(labels, logits, weights, groups)


if __name__ == "__main__":
    main()
