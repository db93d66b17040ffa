"""Measures how far predicted probabilities are from what happened: reliability curves, expected calibration error.

In: N predicted rows.  Out: bins of rows by their prediction, each with its mean prediction and its click rate, and the
mean distance of the two.  Cost: one sort of the N logits, 4 bytes a row, and passes in blocks.

N rows, K bins.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from torchdlrm.judged import NORMAL_95, Estimate, Influence, Judged, standard_error
from torchdlrm.ranks import Scores

NUM_BINS = 20
_NUM_DRAWS, _NUM_TRUTHS, _SEED = 1_000, 25, 0


class ReliabilityBin(NamedTuple):
    """Rows whose predictions are next to each other; `low` to `high` is the click rate's interval of 95 %, Wilson's."""

    rows: int
    prediction: float
    click_rate: float
    low: float
    high: float


@dataclass(frozen=True)
class Reliability:
    """How far the predictions of rows are from what happened.

    Attributes:
        bins: by rising prediction, of about as many rows each.
        error: expected calibration error (Naeini, Cooper and Hauskrecht 2015): the mean distance of click rate and mean
            prediction in a bin, each bin counting as its rows weigh.
        by_chance: what it is on average where the predictions are right: an error near it is none.
    """

    bins: tuple[ReliabilityBin, ...]
    error: Estimate
    by_chance: float


def reliability(judged: Judged, num_bins: int = NUM_BINS) -> Reliability:
    """How far predictions are from what happened, bin by bin, and whether that is more than chance.

    Args:
        judged: N rows, of which some weigh something.
        num_bins: the most bins there are.
    """
    bins = Bins.of(judged, num_bins)
    rate, mean = bins.clicks / bins.weight, bins.predictions / bins.weight
    errors = np.array([standard_error(judged, bins.influence(judged, place)) for place in range(rate.size)])
    # As many rows of equal weight, each by itself, would give click rates that are as sure.
    size = np.where(errors > 0, rate * (1 - rate) / np.where(errors > 0, errors, 1.0) ** 2, bins.rows)
    z2 = NORMAL_95**2 / size
    centre, reach = rate + z2 / 2, np.sqrt(z2 * rate * (1 - rate) + z2**2 / 4)
    curve = np.stack([mean, rate, (centre - reach) / (1 + z2), (centre + reach) / (1 + z2)], axis=1).tolist()

    def mean_of_bins(distances: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.average(np.abs(distances), axis=-1, weights=bins.weight)

    deviation = rate - mean
    noise = np.random.default_rng(_SEED).standard_normal((_NUM_DRAWS, rate.size)) * reach / (1 + z2) / NORMAL_95
    error, by_chance = (float(mean_of_bins(of)) for of in (deviation, np.sqrt(2 / math.pi * mean * (1 - mean) / size)))
    # Which true errors, of bins that are all off by as much, give one like this 19 times in 20: 0 is among them where
    # the predictions are right, though no error that is measured is 0.
    truths = np.linspace(0.0, error + 4 * by_chance, _NUM_TRUTHS)
    drawn = np.array([mean_of_bins(truth + noise) for truth in truths])
    high, low = (
        np.interp(error, np.maximum.accumulate(of), truths) for of in np.quantile(drawn, (0.025, 0.975), axis=1)
    )
    return Reliability(
        tuple(ReliabilityBin(int(rows), *values) for rows, values in zip(bins.rows, curve, strict=True)),
        Estimate(error, float(mean_of_bins(deviation + noise).std()), float(low), float(high)),
        by_chance,
    )


def rows_of(judged: Judged, rows: NDArray[np.bool_] | NDArray[np.integer] | slice) -> Judged:
    """Some of the rows."""
    weights = None if judged.weights is None else judged.weights[rows]
    groups = None if judged.groups is None else judged.groups[rows]
    return Judged.of(judged.labels[rows], judged.logits[rows], weights, groups)


def sums_between(judged: Judged, cuts: Scores) -> NDArray[np.float64]:
    """Over the rows between each two of K cuts of the logit, the sums that `Bins` has: float64 [5, K + 1]."""
    sums = np.zeros((5, cuts.size + 1))
    for block in judged.blocks():
        place = np.searchsorted(cuts, judged.logits[block], side="right")
        logit, clicked = judged.logits[block].astype(np.float64), judged.labels[block] != 0
        weight = np.ones(logit.size) if judged.weights is None else judged.weights[block].astype(np.float64)
        parts = (weight > 0, weight, weight * clicked, weight * np.exp(-np.logaddexp(0.0, -logit)), weight * logit)
        sums += [np.bincount(place, part, cuts.size + 1) for part in parts]
    return sums


class Bins(NamedTuple):
    """Bins of rows of which some weigh something, and sums over these, weighted but for `rows`: float64 [K]."""

    low: NDArray[np.float64]  # the least logit, and that of the next bin
    high: NDArray[np.float64]
    rows: NDArray[np.float64]
    weight: NDArray[np.float64]
    clicks: NDArray[np.float64]
    predictions: NDArray[np.float64]
    logits: NDArray[np.float64]

    @classmethod
    def of(cls, judged: Judged, num_bins: int) -> Self:
        """Bins of equal rows by rising logit; fewer where logits are the same."""
        ordered = np.sort(judged.logits)
        edges = np.unique(ordered[np.arange(1, num_bins) * ordered.size // num_bins])
        edges = edges[edges > ordered[0]]
        bounds, sums = np.array([-math.inf, *edges, math.inf]), sums_between(judged, edges)
        return cls(*np.vstack([bounds[:-1], bounds[1:], sums])[:, sums[1] > 0])

    def influence(self, judged: Judged, place: int) -> Influence:
        """On the click rate of a bin."""
        low, high, weight, clicks = (of[place] for of in (self.low, self.high, self.weight, self.clicks))

        def of(block: slice) -> NDArray[np.float64]:
            is_in = (judged.logits[block] >= low) & (judged.logits[block] < high)
            moved = is_in * ((judged.labels[block] != 0) - clicks / weight) / weight
            return np.asarray(moved if judged.weights is None else moved * judged.weights[block])

        return of
