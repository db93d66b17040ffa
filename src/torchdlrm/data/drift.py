"""How far the distribution of a column in one split is from that in another.

In: a column's values, encoded.  Out: a histogram of few enough bins to add up and keep, and from two of them the
Jensen-Shannon divergence in bits: 0 where they are the same, 1 where they have nothing in common.

Ids are binned by rank: 0 (unknown) and the 31 most frequent by themselves, the others by powers of two.  Dense values,
as the model reads them, are binned by sign, exponent and the first two bits of the mantissa.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Histogram = dict[int, int]  # bin -> values

_OWN_BINS = 32
_DENSE_SHIFT = 21


def id_bins(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The bin of each id: int64 [D]."""
    exponents = np.frexp(np.maximum(ids, 1).astype(np.float64))[1]
    return np.where(ids < _OWN_BINS, ids, _OWN_BINS + exponents).astype(np.int64)


def dense_bins(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The bin of each dense value: int64 [B]."""
    return ((values + np.float32(0)).view(np.uint32) >> _DENSE_SHIFT).astype(np.int64)


def histogram(bins: npt.NDArray[np.int64], weights: npt.NDArray[np.int64] | None = None) -> Histogram:
    """How many values, or how much weight, each bin has."""
    counts = np.bincount(bins, weights)
    found = np.flatnonzero(counts)
    return dict(zip(found.tolist(), counts[found].astype(np.int64).tolist(), strict=True))


def add(total: Histogram, more: Mapping[int, int]) -> None:
    """Add one histogram to another."""
    for key, count in more.items():
        total[key] = total.get(key, 0) + count


def divergence(found: Mapping[int, int], reference: Mapping[int, int]) -> float:
    """The Jensen-Shannon divergence of two histograms, in bits; 0 where one is empty."""
    keys = sorted({*found, *reference})
    p, q = (np.array([counts.get(key, 0) for key in keys], np.float64) for counts in (found, reference))
    if not p.sum() or not q.sum():
        return 0.0
    p, q = p / p.sum(), q / q.sum()
    middle = (p + q) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = [np.where(x > 0, x * np.log2(x / middle), 0.0).sum() for x in (p, q)]
    return round(max(0.0, float(sum(terms)) / 2), 6)
