"""Ranks rows by their scores: areas under ROC curves, of all rows and within groups, and what each row adds to one.

In: labels and scores of N rows, perhaps with weights and groups.  Out: areas, exact: every pair of a clicked row and
another counts once, or as the product of their weights; equal scores count half.  Cost: one sort of the N scores (8 s
for 100 million rows on one core), and 4 bytes a row besides them.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

# float32 or float64 [N].
Scores = NDArray[np.floating]
# 0 or 1, any number type [N].
Labels = NDArray[np.number] | NDArray[np.bool_]
# Of rows, at least 0: float32 or float64 [N]; None where all rows count the same.
Weights = NDArray[np.floating] | None
# Of rows: 0 to the number of groups - 1, integers [N]; None where each row is independent of all others.
Groups = NDArray[np.integer] | None

_PART_ROWS = 1 << 22  # of groups that are sorted at once
_BLOCK_ROWS = 1 << 20


def auc(labels: Labels, scores: Scores, weights: Weights = None) -> float:
    """Exact area under the ROC curve, by the Mann-Whitney statistic; equal scores count half.

    Args:
        labels: 0 or 1 [N].
        scores: any monotone function of the probability, such as a logit [N].
        weights: of the rows [N].

    Returns:
        A number from 0 to 1; NaN when the labels (of rows that weigh something) hold one class only or a score is NaN.
    """
    return RightPairs(labels, scores, weights).area()


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


class RightPairs:
    """Which fraction of the rows of the other class each row is on the right side of, ties as half.

    Their mean over either class is the AUC, and how they scatter around it says how sure that is.

    Args:
        labels: 0 or 1 [N].
        scores: [N].
        weights: of the rows [N], which the fractions are of then.
    """

    def __init__(self, labels: Labels, scores: Scores, weights: Weights = None) -> None:
        check_shapes(labels, scores)
        self._labels, self._scores, clicked = labels, scores, labels != 0
        self._positives, self._negatives = (
            _Class(scores[rows], None if weights is None else weights[rows]) for rows in (clicked, ~clicked)
        )

    def area(self) -> float:
        """The AUC, as `auc` has it."""
        few, many = sorted((self._positives, self._negatives), key=lambda of: of.scores.size)
        if not few.weight or not many.weight or np.isnan(few.scores[-1]) or np.isnan(many.scores[-1]):
            return math.nan
        # Where rows have no weights, these are integers, so nothing is rounded: with 10**9 rows of each class the sum
        # is still below 2**63.
        twice_below = 0
        for start in range(0, few.scores.size, _BLOCK_ROWS):
            block = slice(start, start + _BLOCK_ROWS)
            of_each = many.twice_below(few.scores[block])
            twice_below += (of_each if few.weights is None else of_each * few.weights[block]).sum().item()
        fraction_below = float(twice_below / (2 * few.weight * many.weight))
        return fraction_below if few is self._positives else 1.0 - fraction_below

    def of(self, block: slice) -> NDArray[np.float64]:
        """The fractions of some of the rows, float64 [rows of the block]."""
        clicked, scores = self._labels[block] != 0, self._scores[block]
        order = np.argsort(scores)  # to look up what is sorted is ten times as fast in millions of rows
        clicked, scores, found = clicked[order], scores[order], np.empty(order.size, np.float64)
        for of, others, sign in ((clicked, self._negatives, 1), (~clicked, self._positives, -1)):
            found[order[of]] = (sign < 0) + sign * others.twice_below(scores[of]) / (2 * (others.weight or 1))
        return found


class _Class:
    """The rows of a class by rising score, which are sorted where they are; `weight` is what all of them weigh."""

    def __init__(self, scores: Scores, weights: Weights) -> None:
        self.scores, self.weights, self.weight = scores, weights, float(scores.size)
        if weights is None:
            scores.sort()  # vectorised in numpy: takes half the time and memory of argsort
            self.weight = scores.size
        else:
            order = np.argsort(scores)
            self.scores, self.weights = scores[order], weights[order]
            self._cumulated = np.zeros(order.size + 1)
            np.cumsum(self.weights, out=self._cumulated[1:])
            self.weight = float(self._cumulated[-1])

    def twice_below(self, scores: Scores) -> NDArray[np.number]:
        """Twice what the rows of the class with a lower score than each of these weigh, ties as half [K]."""
        low, high = (np.searchsorted(self.scores, scores, side=side) for side in ("left", "right"))
        return low + high if self.weights is None else self._cumulated[low] + self._cumulated[high]


class GroupAreas(NamedTuple):
    """The area under the ROC curve of each of C groups; NaN where its rows are of one class [C].

    `weights` is what all rows of a group weigh, and 0 where it has no area [C].
    """

    areas: NDArray[np.float64]
    weights: NDArray[np.float64]

    @property
    def mean(self) -> float:
        """Of the areas, each counting as its rows do: GAUC (Zhou et al. 2018, arXiv:1706.06978); NaN without any."""
        has_area = self.weights > 0
        return float(np.average(self.areas[has_area], weights=self.weights[has_area])) if has_area.any() else math.nan


def group_areas(labels: Labels, scores: Scores, groups: NDArray[np.integer], weights: Weights = None) -> GroupAreas:
    """The AUC within each group.

    Args:
        labels: 0 or 1 [N].
        scores: [N].
        groups: of the rows, 0 to C - 1 [N].
        weights: of the rows [N].
    """
    num_groups = int(groups.max(initial=-1)) + 1
    if groups.size <= _PART_ROWS:
        return _group_areas(labels, scores, groups, weights, num_groups)
    rows_of = np.zeros(num_groups, np.int64)
    for start in range(0, groups.size, _PART_ROWS):
        rows_of += np.bincount(groups[start : start + _PART_ROWS], minlength=num_groups)
    # Groups that have some millions of rows together, at a time: a sort of all would take 50 bytes a row.
    parts = np.cumsum(rows_of) // _PART_ROWS
    edges = [0, *(np.flatnonzero(np.diff(parts)) + 1), num_groups]
    found = []
    for first, end in pairwise(edges):
        rows = np.flatnonzero((groups >= first) & (groups < end))
        of_rows = None if weights is None else weights[rows]
        found.append(_group_areas(labels[rows], scores[rows], groups[rows] - first, of_rows, int(end - first)))
    return GroupAreas(*map(np.concatenate, zip(*found, strict=True)))


def _group_areas(
    labels: Labels, scores: Scores, groups: NDArray[np.integer], weights: Weights, num_groups: int
) -> GroupAreas:
    if scores.dtype == np.float32:  # as one integer: numpy sorts these several times as fast
        bits = (scores + np.float32(0)).view(np.int32)  # 0 in place of -0, which is equal
        order = np.argsort((groups.astype(np.int64) << 32) + (bits ^ ((bits >> 31) & 0x7FFFFFFF)))
    else:
        order = np.lexsort((scores, groups))
    group, score, clicked = groups[order], scores[order], labels[order] != 0
    weight = np.ones(order.size) if weights is None else weights[order].astype(np.float64)
    is_first = np.r_[True, (group[1:] != group[:-1]) | (score[1:] != score[:-1])][: group.size]
    first = np.flatnonzero(is_first)  # of the rows of a group that have the same score
    below = np.concatenate([[0.0], np.cumsum(np.where(clicked, 0.0, weight))])  # weight of the rows before, not clicked
    at_start = below[np.searchsorted(group, group[first])]
    at_end = below[np.append(first[1:], group.size)]
    # Half of those with the same score count, and none of the groups before.
    under = np.repeat((below[first] + at_end) / 2 - at_start, np.diff(np.append(first, group.size)))
    right = np.bincount(group[clicked], (weight * under)[clicked], num_groups)
    clicks, total = (np.bincount(group[rows], weight[rows], num_groups) for rows in (clicked, slice(None)))
    pairs = clicks * (total - clicks)
    with np.errstate(invalid="ignore", divide="ignore"):
        areas = np.where(pairs > 0, right / pairs, math.nan)
    return GroupAreas(areas, np.where(pairs > 0, total, 0.0))


def check_shapes(labels: Labels, scores: Scores) -> None:
    """See that there is a score for each label.

    Raises:
        ValueError: there is not.
    """
    if labels.ndim != 1 or labels.shape != scores.shape:
        msg = f"labels and scores: must be of one dimension and as many, got shapes {labels.shape} and {scores.shape}"
        raise ValueError(msg)
