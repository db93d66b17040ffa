"""Defines how good predictions are: one list of metrics, which everything that measures or shows them iterates.

In: labels and logits of N rows as numpy arrays.  Out: `BinaryMetrics`.  Exact: every row counts once, ties count half,
sums are float64.  Cost: one sort of the N scores (8 s for 100 million rows on one core) and two passes in blocks.
Nothing is binned or sampled, so that two runs can be compared to the last digit that floating point gives.

Rows may have weights: then every sum is of weights, a mean is a weighted mean, and a pair of AUC counts as the product
of its two rows' weights, as with `sample_weight` of scikit-learn.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

# float32 or float64 [N].
Scores = NDArray[np.floating]
# 0 or 1, any number type [N].
Labels = NDArray[np.number] | NDArray[np.bool_]
# Of rows, at least 0: float32 or float64 [N]; None where all rows count the same.
Weights = NDArray[np.floating] | None
# `log`: metrics.jsonl, callbacks and trackers, the line of a validation, the curves of a run's page. `bar`: below the
# bar of a training. `brief`: where there is room for few. `table`: tables of the terminal, and periods of a live model.
Place = Literal["log", "bar", "brief", "table"]

# Standard errors to each side of its mean that 95 % of a normal distribution are within.
NORMAL_95 = 1.959964

_BLOCK_ROWS = 1 << 20  # float64 temporaries of a block stay at 8 MB each


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
class MetricSums:
    """Sums over `rows` rows, of which all metrics but AUC are made; each row counts as often as it weighs.

    Attributes:
        rows: how many.
        clicks: how many of them were clicked.
        right: whose label is on the same side as the prediction.
        prediction_sum: of the predicted probabilities.
        logloss_sum: of the negative log-likelihoods, in nats.
        weight_sum: of the rows' weights; None where they have none, and each counts as 1.
    """

    rows: int
    clicks: float
    right: float
    prediction_sum: float
    logloss_sum: float
    weight_sum: float | None = None

    @property
    def weight(self) -> float:
        """What all rows weigh."""
        return self.rows if self.weight_sum is None else self.weight_sum

    def mean(self, total: float) -> float:
        """One of the sums divided by what all rows weigh."""
        return total / self.weight


@dataclass(frozen=True)
class Judged:
    """Rows that were predicted and whose labels are known: what metrics are functions of.

    In a training's intervals these are bins of logits, with the rows in them as weights; sums are those of the rows.
    """

    labels: Labels
    logits: Scores
    weights: Weights
    sums: MetricSums

    def auc(self) -> float:
        """Area under the ROC curve."""
        return auc(self.labels, self.logits, self.weights)

    def metrics(self) -> BinaryMetrics:
        """All metrics of these rows; NaN where none of them weighs anything."""
        values = {name: metric.of(self) if self.sums.weight else math.nan for name, metric in METRICS.items()}
        return BinaryMetrics(rows=self.sums.rows, **values)


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
        standard_error: of its value, from labels, logits and weights; NaN where that is not known. A live model keeps
            an interval of the metric then, as `name_low` and `name_high`.
        largest: a value that no model exceeds, and no interval either; the smallest is 0.
    """

    name: str
    label: str
    caption: str
    of: Callable[[Judged], float]
    places: Collection[Place] = ()
    digits: int = 4
    target: float | None = None
    standard_error: Callable[[Labels, Scores, Weights], float] | None = None
    largest: float = math.inf


def metrics_in(place: Place) -> list[Metric]:
    """The metrics that show in a place, in the order of `METRICS`."""
    return [metric for metric in METRICS.values() if place in metric.places]


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


def auc(labels: Labels, scores: Scores, weights: Weights = None) -> float:
    """Exact area under the ROC curve, by the Mann-Whitney statistic; equal scores count half.

    Args:
        labels: 0 or 1 [N].
        scores: any monotone function of the probability, such as a logit [N].
        weights: of the rows [N].

    Returns:
        A number from 0 to 1; NaN when the labels (of rows that weigh something) hold one class only or a score is NaN.
    """
    _check_shapes(labels, scores)
    clicked = labels != 0
    if weights is not None:
        below_P, _ = wins(clicked, scores, weights)
        positives = weights[clicked].astype(np.float64)
        if not positives.sum() or not weights[~clicked].any() or np.isnan(scores).any():
            return math.nan
        return float((positives * below_P).sum() / positives.sum())
    # Two plain sorts are vectorised in numpy, and take half the time and memory of one argsort.
    positives, negatives = np.sort(scores[clicked]), np.sort(scores[~clicked])
    if not positives.size or not negatives.size or np.isnan(positives[-1]) or np.isnan(negatives[-1]):
        return math.nan
    few, many = sorted((positives, negatives), key=len)
    # For each of the few: twice how many of the many lie below it, ties as half. Integers, so no rounding: with 10**9
    # rows of each class the sum is still below 2**63.
    twice_below = sum(int(np.searchsorted(many, few, side=side).sum()) for side in ("left", "right"))
    fraction_below = twice_below / (2 * few.size * many.size)
    return fraction_below if few is positives else 1.0 - fraction_below


def wins(
    clicked: NDArray[np.bool_], scores: Scores, weights: Weights = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each clicked row the fraction of the others that lies below it [P], ties as half; and vice versa [Q].

    Args:
        clicked: which rows were [N].
        scores: [N].
        weights: of the rows [N], which the fractions are of then.
    """

    def fraction_below(scores: Scores, others: Scores, weights: Weights) -> NDArray[np.float64]:
        if weights is None:
            others = np.sort(others)
            ends = [np.searchsorted(others, scores, side=side) for side in ("left", "right")]
            return np.asarray(sum(ends) / (2 * max(1, others.size)), np.float64)
        order = np.argsort(others)
        cumulated = np.concatenate([[0.0], np.cumsum(weights[order], dtype=np.float64)])
        ends = [np.searchsorted(others, scores, side=side, sorter=order) for side in ("left", "right")]
        return np.asarray(sum(cumulated[end] for end in ends) / (2 * (cumulated[-1] or 1.0)), np.float64)

    positives, negatives = scores[clicked], scores[~clicked]
    weights_P, weights_Q = (None, None) if weights is None else (weights[clicked], weights[~clicked])
    return fraction_below(positives, negatives, weights_Q), 1.0 - fraction_below(negatives, positives, weights_P)


def auc_standard_error(labels: Labels, scores: Scores, weights: Weights = None) -> float:
    """Standard error of a model's AUC, by DeLong, DeLong and Clarke-Pearson (1988); all as for `auc`.

    Returns:
        NaN with fewer than two rows of a class.
    """
    labels, scores, weights = that_weigh(weights, labels, scores)
    clicked = labels != 0
    return error_of_both(clicked, *wins(clicked, scores, weights), weights)


def that_weigh(weights: Weights, *columns: NDArray[Any]) -> Any:
    """The columns, and after them the weights, of the rows that weigh something."""
    return (*columns, None) if weights is None else tuple(column[weights > 0] for column in (*columns, weights))


def error_of_both(
    clicked: NDArray[np.bool_], values_P: NDArray[np.float64], values_Q: NDArray[np.float64], weights: Weights
) -> float:
    """Standard error of a mean over the clicked rows and the others, whose values are independent of each other."""
    weights_P, weights_Q = (None, None) if weights is None else (weights[clicked], weights[~clicked])
    return math.hypot(error_of_mean(values_P, weights_P), error_of_mean(values_Q, weights_Q))


def error_of_mean(values: NDArray[np.float64], weights: Weights) -> float:
    """Standard error of the weighted mean of independent values; NaN of fewer than two."""
    if values.size < 2:
        return math.nan
    if weights is None:
        return float(values.std(ddof=1) / math.sqrt(values.size))
    parts = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    spread = parts * (values - (parts * values).sum())
    return math.sqrt(values.size / (values.size - 1) * float((spread**2).sum()))


def auc_from_counts(clicks: NDArray[np.number], others: NDArray[np.number]) -> float:
    """`auc` where only K different scores occur, given how many rows have each: memory does not grow with the rows.

    Args:
        clicks: rows that were clicked, by rising score, integers [K]; or the sums of their weights, float64 [K].
        others: of rows that were not [K].

    Returns:
        As `auc`.
    """
    num_clicks, num_others = clicks.sum().item(), others.sum().item()
    if not num_clicks or not num_others:
        return math.nan
    twice_below = (clicks * (2 * np.cumsum(others) - others)).sum().item()
    return float(twice_below / (2 * num_clicks * num_others))


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
    _check_shapes(labels, logits)
    for start in range(0, labels.size, _BLOCK_ROWS):
        block = labels[start : start + _BLOCK_ROWS]
        others = block[(block != 0) & (block != 1)]
        if others.size:
            msg = f"labels: must be 0 or 1, got {others[0]}; the order is binary_metrics(labels, logits)"
            raise ValueError(msg)
    if weights is not None and weights.shape != labels.shape:
        msg = f"weights: must be as many as labels, got shapes {weights.shape} and {labels.shape}"
        raise ValueError(msg)
    if weights is not None and (wrong := weights[~((weights >= 0) & (weights < math.inf))]).size:
        msg = f"weights: must be finite and at least 0, got {wrong[0]}"
        raise ValueError(msg)
    return Judged(labels, logits, weights, _sums(labels, logits, weights)).metrics()


def _sums(labels: Labels, logits: Scores, weights: Weights) -> MetricSums:
    blocks = []
    for start in range(0, max(1, labels.size), _BLOCK_ROWS):
        clicked = labels[start : start + _BLOCK_ROWS] != 0
        logit = logits[start : start + _BLOCK_ROWS].astype(np.float64)
        shrunk = np.exp(-np.abs(logit))  # in (0, 1]: neither this nor what follows can overflow
        prediction = np.where(logit >= 0, 1.0, shrunk) / (1.0 + shrunk)
        # -log(p of what happened) = log(1 + exp(-margin)); the margin is the logit, signed by the label.
        margin = np.where(clicked, logit, -logit)
        loss = np.maximum(-margin, 0.0) + np.log1p(shrunk)
        summed = [clicked, (logit > 0) == clicked, prediction, loss]  # in the order of MetricSums
        if weights is not None:
            weight = weights[start : start + _BLOCK_ROWS].astype(np.float64)
            summed = [*(weight * values for values in summed), weight]
        blocks.append([float(values.sum()) for values in summed])
    return MetricSums(labels.size, *map(math.fsum, zip(*blocks, strict=True)))


def _check_shapes(labels: Labels, scores: Scores) -> None:
    if labels.ndim != 1 or labels.shape != scores.shape:
        msg = f"labels and scores: must be of one dimension and as many, got shapes {labels.shape} and {scores.shape}"
        raise ValueError(msg)


def _auc(judged: Judged) -> float:
    return judged.auc()  # not `Judged.auc`: bins of logits know a shorter way


def _logloss(judged: Judged) -> float:
    return judged.sums.mean(judged.sums.logloss_sum)


def _normalised_entropy(judged: Judged) -> float:
    rate = judged.sums.mean(judged.sums.clicks)
    entropy = -sum(p * math.log(p) for p in (rate, 1.0 - rate) if p > 0)  # of always predicting the click rate
    return _logloss(judged) / entropy if entropy > 0 else math.nan


def _calibration(judged: Judged) -> float:
    sums = judged.sums
    rate = sums.mean(sums.clicks)
    return sums.mean(sums.prediction_sum) / rate if rate > 0 else math.nan


_CALIBRATION = "calibration: mean prediction / click rate"
BEST, LOSS = "auc", "logloss"  # what the best checkpoint is chosen by; what a training lowers, and its log calls `loss`
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(BEST, "AUC", "AUC", _auc, {"log", "brief", "table"}, standard_error=auc_standard_error, largest=1),
        Metric(LOSS, "logloss", "logloss, nats", _logloss, {"log", "brief", "table"}),
        Metric("ne", "NE", "normalised entropy", _normalised_entropy, {"log", "bar", "table"}),
        Metric("calibration", "calibration", _CALIBRATION, _calibration, {"table"}, digits=3, target=1.0),
        Metric("accuracy", "accuracy", "accuracy", lambda judged: judged.sums.mean(judged.sums.right)),
    )
}
