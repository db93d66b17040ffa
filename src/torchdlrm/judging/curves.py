"""Draws how predictions tell clicks from other rows: the ROC curve, and how each class is predicted.

In: N predicted rows.  Out: `Curves`, a few hundred numbers.  Exact: a point counts every row on its side of a
threshold, as often as it weighs; which thresholds there are is taken from a sample.  Cost: two passes in blocks, in
memory that does not grow with N.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchdlrm.judged import Judged
from torchdlrm.judging.reliability import sums_between
from torchdlrm.ranks import Scores

_THRESHOLDS, _SAMPLE_ROWS = 190, 1 << 20
_BINS, _MOST_SURE = 50, 15.0  # of logits; what is beyond 15 is in the last bin


@dataclass(frozen=True)
class Curves:
    """How predictions tell clicks from other rows.

    Attributes:
        roc: by falling threshold, the fraction of the rows without a click that are predicted at or above it, and of
            those with one: from (0, 0) to (1, 1), at most 200 points.
        edges: of bins of the logit, rising [51]; the first and the last bin have all rows beyond their edge too.
        clicked: the fraction of the rows with a click that each bin has [50].
        others: of the rows without one [50].
        click_rate: c of all rows: with it a point (x, y) of the ROC curve has the recall y and the precision
            c y / (c y + (1 - c) x).
    """

    roc: list[tuple[float, float]]
    edges: list[float]
    clicked: list[float]
    others: list[float]
    click_rate: float


def curves(judged: Judged) -> Curves | None:
    """The curves of predicted rows; None where they have one class only, or a prediction is not a number."""
    sums = judged.sums
    if not 0 < sums.clicks < sums.weight or math.isnan(sums.prediction_sum):
        return None
    every = -(-judged.labels.size // _SAMPLE_ROWS)
    logits, clicked = judged.logits[::every], judged.labels[::every] != 0
    steps = np.linspace(0.0, 1.0, _THRESHOLDS // 2)
    classes = [of for of in (logits[clicked], logits[~clicked]) if of.size]
    thresholds = np.unique([np.quantile(of, steps, method="nearest") for of in classes])
    # At or above each threshold, from the largest to the least, and then all rows.
    others, clicks = np.cumsum(_of_classes(judged, thresholds)[:, ::-1], axis=1)
    low, high = np.clip(np.quantile(logits, [0.001, 0.999], method="nearest"), -_MOST_SURE, _MOST_SURE)
    edges = np.linspace(math.floor(low), math.ceil(high) if high > math.floor(low) else low + 1, _BINS + 1)
    of_class = _of_classes(judged, edges[1:-1].astype(judged.logits.dtype))
    of_others, of_clicked = of_class / of_class.sum(axis=1, keepdims=True)
    return Curves(
        [(0.0, 0.0), *zip((others / others[-1]).tolist(), (clicks / clicks[-1]).tolist(), strict=True)],
        edges.tolist(),
        of_clicked.tolist(),
        of_others.tolist(),
        sums.means[0],
    )


def _of_classes(judged: Judged, cuts: Scores) -> NDArray[np.float64]:
    """What the rows without and with a click weigh between each two of K cuts: float64 [2, K + 1]."""
    _, weight, clicks, *_ = sums_between(judged, cuts)
    return np.stack([weight - clicks, clicks])
