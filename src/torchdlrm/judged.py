"""Holds rows that were predicted and whose labels are known, and says how sure a metric of them is.

In: labels and logits of N rows as numpy arrays, perhaps weights and groups.  Out: sums, and standard errors.  Exact:
every row counts once, sums are float64.  Cost: passes in blocks.

A metric's standard error is that of the sum of its rows' influences: by how much the metric would move if a row
counted a little more, times what the row weighs. For a mean that is the textbook's error, for AUC it is DeLong's
(DeLong, DeLong and Clarke-Pearson 1988), for a ratio the delta method's. Where rows come in groups, as those of one
user, the influences of a group are added first (Obuchowski 1997 for AUC). What differs between two models is the
difference of their influences, row by row, so that rows that are hard for both drop out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchdlrm.ranks import Groups, Labels, RightPairs, Scores, Weights, check_shapes

# How much each row of a block moves a metric's value, float64 [rows of the block]; over all rows they add up to 0.
Influence = Callable[[slice], NDArray[np.float64]]
# A number made of the means of rows, in the order of `MetricSums.means`; also where these are complex.
OfMeans = Callable[..., Any]

# Standard errors to each side of its mean that 95 % of a normal distribution are within.
NORMAL_95 = 1.959964

_TINY = 1e-200
_BLOCK_ROWS = 1 << 20  # float64 temporaries of a block stay at 8 MB each


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

    @property
    def means(self) -> tuple[float, float, float, float]:
        """The click rate, the accuracy, the mean prediction and the logloss."""
        sums = (self.clicks, self.right, self.prediction_sum, self.logloss_sum)
        clicks, right, prediction, loss = (total / self.weight for total in sums)
        return clicks, right, prediction, loss


@dataclass(frozen=True)
class Judged:
    """Rows that were predicted and whose labels are known: what metrics are functions of.

    In a training's intervals these are bins of logits, with the rows in them as weights; sums are those of the rows.

    Attributes:
        labels: 0 or 1 [N].
        logits: log-odds of a click [N].
        weights: how much each row counts [N]; None where all count the same.
        sums: of the rows.
        groups: which of them depend on each other, as rows of one user do [N]; None where none do.
    """

    labels: Labels
    logits: Scores
    weights: Weights
    sums: MetricSums
    groups: Groups = None

    @classmethod
    def of(cls, labels: Labels, logits: Scores, weights: Weights = None, groups: Groups = None) -> "Judged":
        """Rows, with their sums; all as for `binary_metrics`.

        Raises:
            ValueError: as `binary_metrics`.
        """
        _check(labels, logits, weights)
        return cls(labels, logits, weights, _sums(labels, logits, weights), groups)

    @cached_property
    def right_pairs(self) -> RightPairs:
        """What the AUC is made of; they are kept, 4 bytes a row, since to sort them takes most of its time."""
        return RightPairs(self.labels, self.logits, self.weights)

    def auc(self) -> float:
        """Area under the ROC curve."""
        return self.right_pairs.area()

    def blocks(self) -> Iterator[slice]:
        """The rows, in parts that are worked on at once."""
        yield from (slice(i, min(i + _BLOCK_ROWS, self.labels.size)) for i in range(0, self.labels.size, _BLOCK_ROWS))


class Estimate(NamedTuple):
    """A value that some rows give of what all rows would: NaN where it is not known.

    Attributes:
        value: of these rows.
        standard_error: how much such values scatter.
        low: where the interval begins that holds the true value 19 times in 20.
        high: where it ends.
    """

    value: float
    standard_error: float
    low: float
    high: float

    @property
    def ends(self) -> list[float] | None:
        """Where the interval begins and ends, as JSON has it; None where it is not known."""
        return None if math.isnan(self.low) else [self.low, self.high]


def interval(value: float, standard_error: float, least: float = -math.inf, most: float = math.inf) -> Estimate:
    """A value and its interval of 95 %, as normal as sums of many rows are, cut at what is possible."""
    reach = NORMAL_95 * standard_error
    if math.isnan(reach):
        return Estimate(value, standard_error, math.nan, math.nan)
    return Estimate(value, standard_error, max(least, value - reach), min(most, value + reach))


def standard_error(judged: Judged, influence: Influence) -> float:
    """How much a metric scatters whose rows have these influences; NaN with fewer than two rows, or groups of rows.

    Args:
        judged: the rows, N of them; those of one group are one observation.
        influence: of each of them on the metric, or the difference of two models' influences.
    """
    if judged.groups is None:
        squares = math.fsum(float(np.square(influence(block)).sum()) for block in judged.blocks())
        count = judged.labels.size if judged.weights is None else int(np.count_nonzero(judged.weights))
    else:
        num_groups = int(judged.groups.max(initial=-1)) + 1
        sums, is_there = np.zeros(num_groups), np.zeros(num_groups, np.bool_)
        for block in judged.blocks():
            groups = judged.groups[block]
            sums += np.bincount(groups, influence(block), num_groups)
            is_there[groups if judged.weights is None else groups[judged.weights[block] > 0]] = True
        squares, count = float(np.square(sums).sum()), int(np.count_nonzero(is_there))
    return math.sqrt(count / (count - 1) * squares) if count > 1 else math.nan


def _check(labels: Labels, logits: Scores, weights: Weights) -> None:
    check_shapes(labels, logits)
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights: must be as many as labels, got shapes {weights.shape} and {labels.shape}")
    for start in range(0, labels.size, _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        label, weight = labels[block], np.ones(1) if weights is None else weights[block]
        if (wrong := label[(label != 0) & (label != 1)]).size:
            raise ValueError(f"labels: must be 0 or 1, got {wrong[0]}; the order is binary_metrics(labels, logits)")
        if (wrong := weight[~((weight >= 0) & (weight < math.inf))]).size:
            raise ValueError(f"weights: must be finite and at least 0, got {wrong[0]}")


class _Rows(NamedTuple):
    """What metrics are means of, of each row of a block: in the order of `MetricSums`."""

    clicked: NDArray[np.bool_]
    right: NDArray[np.bool_]
    prediction: NDArray[np.float64]
    loss: NDArray[np.float64]

    @classmethod
    def of(cls, labels: Labels, logits: Scores) -> "_Rows":
        clicked, logit = labels != 0, logits.astype(np.float64)
        shrunk = np.exp(-np.abs(logit))  # in (0, 1]: neither this nor what follows can overflow
        prediction = np.where(logit >= 0, 1.0, shrunk) / (1.0 + shrunk)
        # -log(p of what happened) = log(1 + exp(-margin)); the margin is the logit, signed by the label.
        margin = np.where(clicked, logit, -logit)
        return cls(clicked, (logit > 0) == clicked, prediction, np.maximum(-margin, 0.0) + np.log1p(shrunk))


def _sums(labels: Labels, logits: Scores, weights: Weights) -> MetricSums:
    sums = []
    for start in range(0, max(1, labels.size), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        summed: list[NDArray[np.float64] | NDArray[np.bool_]] = [*_Rows.of(labels[block], logits[block])]
        if weights is not None:
            weight = weights[block].astype(np.float64)
            summed = [*(weight * values for values in summed), weight]
        sums.append([float(values.sum()) for values in summed])
    return MetricSums(labels.size, *map(math.fsum, zip(*sums, strict=True)))


def influence_on_means(value_of: OfMeans) -> Callable[[Judged], Influence]:
    """Influences on a function of means, by the delta method: how it grows with the mean of each part of `_Rows`."""

    def influence(judged: Judged) -> Influence:
        means = judged.sums.means
        # Exact: the imaginary part of a function at a point with a tiny one (Squire and Trapp 1998).
        slopes = [complex(value_of(*at)).imag / _TINY for at in np.array(means) + 1j * _TINY * np.eye(len(means))]

        def of(block: slice) -> NDArray[np.float64]:
            rows = _Rows.of(judged.labels[block], judged.logits[block])
            moved = sum(
                slope * np.subtract(part, mean) for slope, part, mean in zip(slopes, rows, means, strict=True) if slope
            )
            weights = 1.0 if judged.weights is None else judged.weights[block].astype(np.float64)
            return np.asarray(moved) * (weights / judged.sums.weight)

        return of

    return influence


def influence_on_auc(judged: Judged) -> Influence:
    """Influences on AUC, whose squares add up to DeLong's variance."""
    area, right = judged.auc(), judged.right_pairs
    counted = judged.labels if judged.weights is None else judged.labels[judged.weights > 0]
    num_rows, num_clicks = counted.size, int(np.count_nonzero(counted))
    clicks = judged.sums.clicks
    # DeLong's variances are of each class by itself, with n - 1 of the class in place of that of all rows.
    scale = [
        math.sqrt(n / (n - 1) * (num_rows - 1) / num_rows) / weight if n > 1 else math.nan
        for n, weight in ((num_rows - num_clicks, judged.sums.weight - clicks), (num_clicks, clicks))
    ]

    def of(block: slice) -> NDArray[np.float64]:
        moved = (right.of(block) - area) * np.where(judged.labels[block] != 0, scale[1], scale[0])
        return moved if judged.weights is None else moved * judged.weights[block]

    return of
