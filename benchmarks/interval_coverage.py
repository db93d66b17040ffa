"""Whether intervals and verdicts of comparisons are right as often as they say: draws whose truth is known.

    python benchmarks/interval_coverage.py --draws 1000 --json interval_coverage.json

Each draw is a log of `--rows` rows with known click probabilities and the predictions of models that are the truth
with noise: plain, with weights that depend on the row, and in clusters, whose rows share much of both. True metrics are
those of 4 million rows. Printed are how often intervals of 95 % hold the true difference; how often models, and recipes
of several seeds, that do not differ are called better or worse; and how often a difference is seen at the number of
rows, or seeds, that is said to show it 8 times in 10.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchdlrm.judged import Judged
from torchdlrm.judging.comparison import Comparison, Verdict
from torchdlrm.judging.paired import compare_rows
from torchdlrm.metrics import METRICS, Metric

Array = NDArray[np.float64]
_SEEN = {Verdict.BETTER, Verdict.WORSE}
PARTS = ("coverage", "alike", "recipes", "power")
_TRUE_ROWS = 4_000_000
_KINDS = ("plain", "weighted", "clustered")
# Of the noise in each model's logits, and what is added to them, so that calibrations are not where both are right.
_MODELS = ((1.0, 0.4), (0.8, 0.6))


class Log(NamedTuple):
    """Rows: the log-odds of a click, labels, weights and groups."""

    truth: Array
    labels: NDArray[np.uint8]
    weights: Array | None = None
    groups: NDArray[np.int64] | None = None

    def judged(self, logits: Array) -> Judged:
        """The rows, as a model predicts them."""
        return Judged.of(self.labels, logits.astype(np.float32), self.weights, self.groups)


def draw(kind: str, rng: np.random.Generator, num_rows: int) -> tuple[Log, Callable[[float], Array]]:
    """A log, and what draws the noise of a model with some deviation."""
    if kind == "clustered":
        groups = np.repeat(np.arange(num_rows), rng.poisson(4, num_rows) + 1)[:num_rows]
        number = int(groups[-1]) + 1
        truth = rng.normal(-1, 0.9, number)[groups] + rng.normal(0, 0.8, num_rows)

        def noise(deviation: float) -> Array:
            return deviation * (rng.normal(0, 0.7, number)[groups] + rng.normal(0, 0.7, num_rows))
    else:
        groups, truth = None, rng.normal(-1, 1.2, num_rows)

        def noise(deviation: float) -> Array:
            return rng.normal(0, deviation, num_rows)

    labels = (rng.random(num_rows) < 1 / (1 + np.exp(-truth))).astype(np.uint8)
    weights = None
    if kind == "weighted":
        weights = rng.choice([0.3, 1.0, 4.0], num_rows) * np.where(truth > 0, 0.5, 1.0)
    return Log(truth, labels, weights, groups), noise


def difference(metric: Metric, first: Judged, second: Judged) -> float:
    """Of a metric, as comparisons have it."""
    values = [metric.of(judged) for judged in (first, second)]
    if metric.better == "nearer" and metric.target is not None:
        values = [abs(value - metric.target) for value in values]
    return values[1] - values[0]


def coverage(kind: str, rng: np.random.Generator, draws: int, num_rows: int) -> dict[str, float]:
    """How often the interval of each metric's difference holds the true one."""

    def both(rows: int) -> list[Judged]:
        log, noise = draw(kind, rng, rows)
        return [log.judged(log.truth + noise(deviation) + offset) for deviation, offset in _MODELS]

    names = [name for name, metric in METRICS.items() if kind == "clustered" or not metric.needs_groups]
    big = both(_TRUE_ROWS)
    true = {name: difference(METRICS[name], *big) for name in names}
    held = dict.fromkeys(names, 0)
    for _ in range(draws):
        first, second = both(num_rows)
        found = compare_rows([("first", [first]), ("second", [second])]).differences["second"]
        for name in names:
            low, high = found[name].interval
            held[name] += low <= true[name] <= high
    return {name: number / draws for name, number in held.items()}


def seen(comparisons: Iterable[Comparison]) -> float:
    """In how many comparisons a candidate is called better or worse by their metric."""
    told = [any(of[one.metric].verdict in _SEEN for of in one.differences.values()) for one in comparisons]
    return sum(told) / len(told)


def alike(kind: str, rng: np.random.Generator, num_rows: int, number: int) -> Comparison:
    """Models that are equally good."""
    log, noise = draw(kind, rng, num_rows)
    return compare_rows([(str(i), [log.judged(log.truth + noise(0.7))]) for i in range(number)])


def recipes(
    rng: np.random.Generator, num_rows: int, seeds: Sequence[int], scatter: float, gain: float = 0.0
) -> Comparison:
    """Recipes of several seeds: each model sees a part of the truth, and how much depends on its seed.

    Args:
        rng: draws all.
        num_rows: of the log.
        seeds: of each recipe.
        scatter: deviation, between seeds, of what a model misjudges in every log.
        gain: by how much less noise the last recipe has.
    """
    log, noise = draw("plain", rng, num_rows)
    covariates = rng.normal(size=(4, num_rows))

    def model(deviation: float) -> Judged:
        misjudged = rng.normal(0, scatter, 4) @ covariates
        return log.judged(log.truth + misjudged + noise(deviation))

    deviations = [0.4] * (len(seeds) - 1) + [0.4 - gain]
    every = [[model(of) for _ in range(number)] for number, of in zip(seeds, deviations, strict=True)]
    return compare_rows([(str(i), models) for i, models in enumerate(every)])


def power(rng: np.random.Generator, draws: int, num_rows: int) -> dict[str, float]:
    """How often a difference is seen at the number of rows, or of seeds, that is said to show it."""
    deviations = (0.85, 0.7)
    names = [*map(str, deviations)]

    def pair(rows: int) -> Comparison:
        log, noise = draw("plain", rng, rows)
        return compare_rows([(str(of), [log.judged(log.truth + noise(of))]) for of in deviations])

    log, noise = draw("plain", rng, _TRUE_ROWS)
    gain = difference(METRICS["auc"], *(log.judged(log.truth + noise(of)) for of in deviations))
    rows = round(float(np.median([pair(num_rows).power(gain)[names[1]].rows for _ in range(50)])))
    found: dict[str, float] = {
        "difference": gain,
        "rows": rows,
        "seen at these rows": seen(pair(rows) for _ in range(draws)),
    }
    # The true difference of recipes, whose models differ much by seed: between models that misjudge the same.
    gains = []
    for _ in range(400):
        log, noise = draw("plain", rng, 20_000)
        misjudged = log.truth + rng.normal(0, 0.3, 4) @ rng.normal(size=(4, 20_000))
        gains.append(difference(METRICS["auc"], *(log.judged(misjudged + noise(of)) for of in (0.4, 0.2))))
    gain = float(np.mean(gains))
    pilots = [recipes(rng, num_rows, (8, 8), 0.3, 0.2).power(gain)["1"].seeds or 0 for _ in range(50)]
    seeds = round(float(np.median(pilots)))
    told = seen(recipes(rng, num_rows, (seeds, seeds), 0.3, 0.2) for _ in range(draws // 2))
    return {**found, "difference of recipes": gain, "seeds": seeds, "seen with these seeds": told}


def main() -> None:
    """Draw, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=1000, help="of each kind of log; of pairs alike twice as many")
    parser.add_argument("--rows", type=int, default=4000, help="of each log")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to try")
    parser.add_argument("--json", type=Path, help="write the results here, too")
    options = parser.parse_args()
    draws, rows, rng = options.draws, options.rows, np.random.default_rng(options.seed)
    found: dict[str, dict[str, float]] = {}

    def show(title: str, figures: dict[str, float]) -> None:
        found[title] = figures
        line = "  ".join(f"{name} {value:,.4f}".removesuffix(".0000") for name, value in figures.items())
        print(f"{title}: {line}", flush=True)

    for kind in _KINDS:
        if "coverage" in options.parts:
            show(f"intervals hold the true difference, {kind}", coverage(kind, rng, draws, rows))
        if "alike" in options.parts:
            told = {"one pair": seen(alike(kind, rng, rows, 2) for _ in range(2 * draws))}
            told["any of ten"] = seen(alike(kind, rng, rows, 10) for _ in range(draws))
            show(f"alike and called better or worse, {kind}", told)
    if "recipes" in options.parts:
        told = {
            f"{seeds} seeds, scatter {scatter:g}": seen(
                recipes(rng, rows, (seeds, seeds), scatter) for _ in range(draws)
            )
            for seeds in (2, 3, 5)
            for scatter in (0.0, 0.1, 0.4)
        }
        show("recipes alike and called better or worse", told)
    if "power" in options.parts:
        show("power for 0.8", power(rng, draws, rows))
    if options.json:
        options.json.write_text(json.dumps({"draws": draws, "rows": rows, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
