"""Defines how good predictions are: one list of metrics, which everything that measures or shows them iterates.

In: labels and logits of N rows as numpy arrays.  Out: `BinaryMetrics`, and an interval of each.  Exact: every row
counts once, ties count half, sums are float64.  Cost: one sort of the N scores and two passes in blocks.  Nothing is
binned or sampled, so that two runs can be compared to the last digit that floating point gives.

Rows may have weights: then every sum is of weights, a mean is a weighted mean, and a pair of AUC counts as the product
of its two rows' weights, as with `sample_weight` of scikit-learn.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from torchdlrm.judged import (
    Estimate,
    Influence,
    Judged,
    OfMeans,
    influence_on_auc,
    influence_on_means,
    interval,
    standard_error,
)
from torchdlrm.ranks import Groups, Labels, Scores, Weights, group_areas

# `log`: metrics.jsonl, callbacks and trackers, the line of a validation, the curves of a run's page. `bar`: below the
# bar of a training. `brief`: where there is room for few. `table`: tables of the terminal, and periods of a live model.
T = TypeVar("T")
Place = Literal["log", "bar", "brief", "table"]


class BinaryMetrics(SimpleNamespace):
    """Metrics of predicted click probabilities over `rows` rows: an attribute for each of `METRICS`.

    Attributes:
        rows: how many rows were judged.
        auc: area under the ROC curve: the fraction of (click, no click) pairs in the right order. NaN when the labels
            hold one class only.
        logloss: mean negative log-likelihood, in nats.
        ne: normalised entropy (He et al. 2014): `logloss` divided by that of always predicting the click rate; below
            1 is better than knowing nothing. NaN when the labels hold one class only.
        calibration: mean prediction divided by click rate; 1 is calibrated. NaN when nothing was clicked.
        accuracy: fraction of rows whose label is on the same side as the prediction, cut at 0.5 (0.5 itself: no click).
        gauc: where rows have groups, the mean AUC within a group that has clicks and others, by the groups' rows.

    All but `rows`, which counts also rows of weight 0, are NaN when there are no rows or all weights are 0.
    """

    rows: int
    auc: float
    logloss: float
    ne: float
    calibration: float
    accuracy: float

    def as_dict(self) -> dict[str, int | float]:
        """The metrics by name, `rows` first."""
        return dict(vars(self))

    def as_json(self) -> dict[str, int | float | None]:
        """The same where NaN, which JSON does not have, is None."""
        return {name: None if math.isnan(value) else value for name, value in vars(self).items()}


@dataclass(frozen=True)
class Metric:
    """How good predictions are, as a number. `dlrm evaluate`, a run's page and `--json` show every metric.

    Attributes:
        name: in files, in JSON and above the columns of the terminal.
        label: in lines of text and in pages.
        caption: of charts.
        of: its value over rows of which some weigh something; NaN where it is not defined.
        places: where else it shows.
        digits: after the point, in the page of a live model.
        target: what charts mark, since a good model is near it.
        influence: how much each row moves it, which says how sure it is. A live model keeps its interval then, as
            `name_low` and `name_high`.
        largest: a value that no model exceeds, and no interval either; the smallest is 0.
        needs_groups: whether it is of the groups that rows come in, and shows only where they have some.
        better: whether a larger value is better, a smaller one, or one nearer to `target`.
        matters: the smallest difference that people act on: a comparison that can exclude it says so.
        is_relative: whether it compares rows that are clicked at different rates, so that slices are judged by it; with
            a target it is a ratio to the click rate.
    """

    name: str
    label: str
    caption: str
    of: Callable[[Judged], float]
    places: Collection[Place] = ()
    digits: int = 4
    target: float | None = None
    influence: Callable[[Judged], Influence] | None = None
    largest: float = math.inf
    needs_groups: bool = False
    better: Literal["higher", "lower", "nearer"] = "lower"
    matters: float = 0.001
    is_relative: bool = False

    def estimate(self, judged: Judged) -> Estimate:
        """Its value over rows, and the interval of 95 % around it."""
        value, of = self.value(judged), self.influence
        if of is None or math.isnan(value):
            return interval(value, math.nan)
        return interval(value, standard_error(judged, of(judged)), 0.0, self.largest)

    def difference(self, first: Judged, second: Judged) -> Estimate:
        """Its value over a second model's predictions of the same rows above that over the first one's."""
        value, of = self.value(second) - self.value(first), self.influence
        if of is None or math.isnan(value):
            return interval(value, math.nan)
        before, after = of(first), of(second)
        return interval(value, standard_error(first, lambda block: after(block) - before(block)))

    def value(self, judged: Judged) -> float:
        """Its value over rows; NaN also where none of them weighs anything."""
        return self.of(judged) if judged.sums.weight else math.nan


def metrics_in(place: Place) -> list[Metric]:
    """The metrics that show in a place, in the order of `METRICS`."""
    return [metric for metric in METRICS.values() if place in metric.places]


def metrics_of_any(results: Collection[Mapping[str, object]]) -> list[Metric]:
    """The metrics of results by name, as files have them: those that need groups where one of the results has them."""
    return [metric for metric in METRICS.values() if not metric.needs_groups or any(metric.name in r for r in results)]


def why_undefined(metrics: Mapping[str, float | None]) -> str:
    """What is to be said where AUC and NE are not defined, for example `all labels are 0`; empty where they are.

    Args:
        metrics: of `BinaryMetrics`, by name; what is not defined is NaN or None.
    """

    def is_missing(name: str) -> bool:
        value = metrics[name]
        return value is None or math.isnan(value)

    if not metrics["rows"]:
        return "there are no rows"
    if is_missing("accuracy"):
        return "the weights of all rows are 0"
    if not is_missing("auc") or is_missing("logloss"):
        return ""
    return f"all labels are {0 if is_missing('calibration') else 1}"


def first_and_others(of_labels: Mapping[str, T], values: Callable[[T], dict[str, Any]]) -> dict[str, Any]:
    """What files say of labels: the values of the first, and under `labels` those of the others, if there are some."""
    first, *others = ((label, values(of)) for label, of in of_labels.items())
    return {**first[1], **({"labels": dict(others)} if others else {})}


def binary_metrics(labels: Labels, logits: Scores, weights: Weights = None) -> BinaryMetrics:
    """All metrics of these rows.

    Args:
        labels: 0 or 1 [N].
        logits: log-odds of a click, as the model gives them before the sigmoid [N]; of a probability p that is
            log(p / (1 - p)).
        weights: how much each row counts, at least 0 [N]; all the same by default.

    Raises:
        ValueError: the shapes differ, a label is neither 0 nor 1, or a weight is negative or not finite.
    """
    return metrics_of(Judged.of(labels, logits, weights))


def metrics_of(judged: Judged) -> BinaryMetrics:
    """All metrics of rows; NaN where none of them weighs anything."""
    values = {metric.name: metric.value(judged) for metric in metrics_for(judged.groups)}
    return BinaryMetrics(rows=judged.sums.rows, **values)


def estimates(judged: Judged) -> dict[str, Estimate]:
    """All metrics of rows with their intervals, by name."""
    return {metric.name: metric.estimate(judged) for metric in metrics_for(judged.groups)}


def metrics_for(groups: Groups) -> list[Metric]:
    """The metrics that rows have: some need groups."""
    return [metric for metric in METRICS.values() if groups is not None or not metric.needs_groups]


def _auc(judged: Judged) -> float:
    return judged.auc()  # not `Judged.auc`: bins of logits know a shorter way


def _gauc(judged: Judged) -> float:
    return math.nan if judged.groups is None else group_areas(*_grouped(judged)).mean


def _gauc_influence(judged: Judged) -> Influence:
    found = group_areas(*_grouped(judged))
    # A group moves the mean as a whole; its rows share that.
    moved = np.where(found.weights > 0, found.areas - found.mean, 0.0) / found.weights.sum()

    def of(block: slice) -> NDArray[np.float64]:
        shares = moved[_grouped(judged)[2][block]]
        return shares if judged.weights is None else shares * judged.weights[block]

    return of


def _grouped(judged: Judged) -> tuple[Labels, Scores, NDArray[np.integer], Weights]:
    assert judged.groups is not None, "a metric that needs groups"
    return judged.labels, judged.logits, judged.groups, judged.weights


def _of_means(
    name: str, label: str, caption: str, mean: OfMeans, places: Collection[Place] = (), **more: Any
) -> Metric:
    """A metric that is a function of the means of rows."""
    value, influence = (lambda judged: float(mean(*judged.sums.means))), influence_on_means(mean)
    return Metric(name, label, caption, value, places, influence=influence, **more)


def _normalised_entropy(rate: Any, _right: Any, _prediction: Any, loss: Any) -> Any:
    if not 0 < rate.real < 1:
        return math.nan
    return loss / -(rate * np.log(rate) + (1.0 - rate) * np.log(1.0 - rate))


BEST, LOSS = "auc", "logloss"  # what the best checkpoint is chosen by; what a training lowers, and its log calls `loss`
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            BEST, "AUC", "AUC", _auc, {"log", "brief", "table"}, influence=influence_on_auc, largest=1, better="higher"
        ),
        _of_means(LOSS, "logloss", "logloss, nats", lambda *of: of[3], {"log", "brief", "table"}, matters=0.0005),
        _of_means("ne", "NE", "normalised entropy", _normalised_entropy, {"log", "bar", "table"}, is_relative=True),
        _of_means(
            "calibration",
            "calibration",
            "calibration: mean prediction / click rate",
            lambda rate, _, prediction, __: prediction / rate if rate.real > 0 else math.nan,
            {"table"},
            digits=3,
            target=1.0,
            better="nearer",
            matters=0.01,
            is_relative=True,
        ),
        _of_means("accuracy", "accuracy", "accuracy", lambda *of: of[1], largest=1, better="higher"),
        Metric(
            "gauc",
            "GAUC",
            "AUC within groups",
            _gauc,
            influence=_gauc_influence,
            largest=1,
            needs_groups=True,
            better="higher",
        ),
    )
}
# Not in the list, since it judges no model: how often rows are clicked.
CLICK_RATE = _of_means("click_rate", "click rate", "click rate", lambda rate, *_: rate, largest=1)
