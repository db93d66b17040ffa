"""Makes logits whose probabilities come true: a rising map, fitted on rows that the model has not learnt from.

In: predicted rows.  Out: a `Recalibration`, which a bundle holds.  A map is linear between its knots and beyond them,
so it rises strictly: rows keep their order, and the model its AUC. Platt's (1999) has one knot; that of isotonic
regression (Zadrozny and Elkan 2002) one for each set of rows that it pools, that of histogram binning (2001) one for
each bin. The same bits in every process: elementary operations of numpy in float64, rounded once.

N rows, K knots or bins.
"""

import math
from collections.abc import Iterator
from functools import cached_property
from typing import Annotated, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat

from torchdlrm.judged import Judged
from torchdlrm.judging import RecalibrationMethod
from torchdlrm.judging.reliability import Bins, reliability, rows_of
from torchdlrm.metrics import LOSS, METRICS
from torchdlrm.records import Record

MIN_SEGMENT_CLICKS = 500  # and as many rows without
# Bins that are pooled, and the most knots that are left, each of a share of the rows and of some clicks.
_BINS = {"isotonic": (4_096, 64), "histogram": (32, 32)}
_MIN_KNOT_CLICKS, _MAX_SEGMENTS, _MAX_STEPS = 20, 64, 100
_STEEPEST = 10.0  # more would make differences of the last digits of a logit
_Pair = tuple[FiniteFloat, FiniteFloat]
_Logits = Annotated[tuple[Annotated[float, Field(ge=-1e6, le=1e6)], ...], Field(min_length=1, max_length=64)]


class LogitMap(Record):
    """A rising map of logits: K knots, rising, and the values there; below and above them it has this slope."""

    knots: _Logits
    values: _Logits
    slope: Annotated[float, Field(gt=0, le=_STEEPEST)] = 1.0

    def _contradictions(self) -> Iterator[str]:
        run, rise = np.diff(self.knots), np.diff(self.values)
        if run.size != rise.size or not ((rise > 0) & (rise <= _STEEPEST * run)).all():
            yield f"knots and values must be as many, and rise, values at most {_STEEPEST:g} times as fast"

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], ...]:
        x, y = np.array(self.knots), np.array(self.values)
        slopes = np.concatenate([[self.slope], np.diff(y) / np.diff(x), [self.slope]])
        return x, y, slopes, np.append(y, math.inf)

    def apply(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """What logits become [N]."""
        x, y, slopes, most = self._arrays
        place = np.searchsorted(x, logits, side="right")
        start = np.maximum(place - 1, 0)
        # No rounding lifts a value above that of the next knot.
        return np.minimum(y[start] + slopes[place] * (logits - x[start]), most[place]).astype(np.float32)


class Verdict(Record):
    """What a recalibration changes on rows that it was not fitted on: before and after, and ends of an interval."""

    rows: str  # which these are, for people
    loss: _Pair  # in nats
    loss_difference: _Pair  # from and to, of paired rows
    calibration_error: _Pair  # expected calibration error
    by_chance: FiniteFloat  # what that is on average where predictions are right

    @classmethod
    def of(cls, rows: str, before: Judged, after: Judged) -> Self:
        """Of the same rows by the model, and recalibrated."""
        metric, (one, other) = METRICS[LOSS], map(reliability, (before, after))
        return cls(
            rows=rows,
            loss=(metric.of(before), metric.of(after)),
            loss_difference=metric.difference(before, after)[2:],
            calibration_error=(one.error.value, other.error.value),
            by_chance=other.by_chance,
        )

    @property
    def is_better(self) -> bool:
        """Whether the loss is lower by more than chance, and the calibration error not higher."""
        return self.loss_difference[1] < 0 and self.calibration_error[1] <= self.calibration_error[0]

    def __str__(self) -> str:
        (loss, new_loss), (low, high), (error, new_error) = self.loss, self.loss_difference, self.calibration_error
        return (
            f"on {self.rows} the logloss goes from {loss:.5f} to {new_loss:.5f} ({new_loss - loss:+.5f}, 95 % interval "
            f"{low:+.5f} to {high:+.5f}), the expected calibration error from {error:.5f} to {new_error:.5f} "
            f"({self.by_chance:.5f} by chance)"
        )


class Recalibration(Record):
    """How logits become those that a bundle predicts, by which method, and what it is worth."""

    method: RecalibrationMethod
    by: str | None = None  # the sparse feature whose frequent values, by their ids, have maps of their own
    map: LogitMap  # of all other rows
    segments: dict[int, LogitMap] = Field({}, max_length=_MAX_SEGMENTS)
    verdict: Verdict | None = None

    def __str__(self) -> str:
        return self.method + (f" by {self.by} ({len(self.segments)} values, and the others)" if self.by else "")

    def apply(self, logits: NDArray[np.float32], ids: NDArray[Any] | None = None) -> NDArray[np.float32]:
        """What logits become [N]; where there is a feature `by`, its ids are given [N]."""
        found = self.map.apply(logits)
        for value, own in self.segments.items():
            rows = np.flatnonzero(ids == value)
            found[rows] = own.apply(logits[rows])
        return found


def fit(
    judged: Judged, method: RecalibrationMethod, by: str | None = None, ids: NDArray[Any] | None = None
) -> Recalibration | None:
    """Fit a recalibration on N rows; None where more clicks do not go with higher logits, so that no map rises.

    Args:
        judged: rows that the model has not learnt from.
        method: how.
        by: the sparse feature whose frequent values have a map each: those with `MIN_SEGMENT_CLICKS`.
        ids: its ids [N].
    """
    whole = _fit_map(judged, method)
    if whole is None or ids is None:
        return None if whole is None else Recalibration(method=method, map=whole)
    clicks = np.bincount(ids[judged.labels != 0], minlength=ids.max() + 1)
    fewest = np.minimum(clicks, np.bincount(ids) - clicks)
    frequent = np.sort(np.argsort(-fewest, kind="stable")[:_MAX_SEGMENTS])
    maps = {
        int(value): found
        for value in frequent
        if fewest[value] >= MIN_SEGMENT_CLICKS and (found := _fit_map(rows_of(judged, ids == value), method))
    }
    rest = rows_of(judged, ~np.isin(ids, [*maps]))
    own = _fit_map(rest, method) if np.count_nonzero(rest.labels) >= MIN_SEGMENT_CLICKS else None
    return Recalibration(method=method, by=by, map=own or whole, segments=maps)


def _fit_map(judged: Judged, method: RecalibrationMethod) -> LogitMap | None:
    if not 0 < judged.sums.clicks < judged.sums.weight:
        return None
    return _line(judged) if method == "platt" else _pooled(judged, *_BINS[method])


def _line(judged: Judged) -> LogitMap | None:
    """The most likely slope and shift, by Newton's method; a step that would raise the loss is halved."""
    at, least, step = np.zeros(2), math.inf, np.array([0.0, _log_odds(judged.sums.clicks / judged.sums.weight)])
    for _ in range(_MAX_STEPS):
        loss, gradient, curvature = 0.0, np.zeros(2), np.zeros((2, 2))
        for block in judged.blocks():
            x = np.stack([judged.logits[block].astype(np.float64), np.ones(block.stop - block.start)])
            weight = 1.0 if judged.weights is None else judged.weights[block].astype(np.float64)
            clicked, logit = judged.labels[block] != 0, (at + step)[0] * x[0] + (at + step)[1]
            probability = np.exp(-np.logaddexp(0.0, -logit))
            loss += float((weight * np.logaddexp(0.0, np.where(clicked, -logit, logit))).sum())
            # Not by BLAS, whose sums depend on the number of threads.
            gradient += np.einsum("in,n->i", x, weight * (probability - clicked))
            curvature += np.einsum("in,jn,n->ij", x, x, weight * probability * (1 - probability))
        if loss <= least:
            at, least = at + step, loss
            if not np.linalg.cond(curvature) < 1e12:  # all logits are the same, or tell the clicks exactly
                return None
            step = -np.linalg.solve(curvature, gradient)
        else:
            step = step / 2
        if np.abs(step).max() < 1e-10:
            break
    slope, shift = at.tolist()
    return LogitMap(knots=(0.0,), values=(shift,), slope=slope) if 0 < slope <= _STEEPEST else None


def _pooled(judged: Judged, num_bins: int, most_knots: int) -> LogitMap:
    """A knot at the mean logit of rows that are next to each other, and the log-odds of their click rate as its value.

    Bins are pooled until their click rates rise, then until each has a share of the rows.
    """
    bins, rate = Bins.of(judged, num_bins), judged.sums.clicks / judged.sums.weight
    sums = np.stack([bins.weight, bins.clicks, bins.logits]) * (judged.sums.rows / judged.sums.weight)
    num_shares = min(most_knots, max(1.0, sums[1].sum() / _MIN_KNOT_CLICKS))
    sums = _risen(sums, rate)
    share = np.floor((np.cumsum(sums[0]) / sums[0].sum() - sums[0] / sums[0].sum() / 2) * num_shares)
    sums = _risen(np.add.reduceat(sums, np.flatnonzero(np.diff(share, prepend=-1.0)), axis=1), rate)
    knots, values = sums[2] / sums[0], _log_odds((sums[1] + rate) / (sums[0] + 1))
    kept = [0]
    for place in range(1, knots.size):
        if 0 < values[place] - values[kept[-1]] <= _STEEPEST * (knots[place] - knots[kept[-1]]):
            kept.append(place)
    return LogitMap(knots=tuple(knots[kept].tolist()), values=tuple(values[kept].tolist()))


def _risen(sums: NDArray[np.float64], rate: float) -> NDArray[np.float64]:
    """Weights, clicks and logits of bins [3, K], pooled where click rates, with one more row like all, do not rise."""
    from scipy.optimize import isotonic_regression  # noqa: PLC0415 - takes a while to load

    starts = isotonic_regression((sums[1] + rate) / (sums[0] + 1), weights=sums[0] + 1).blocks[:-1]
    return np.add.reduceat(sums, starts, axis=1)


def _log_odds(rate: Any) -> Any:
    return np.log(rate) - np.log1p(-rate)
