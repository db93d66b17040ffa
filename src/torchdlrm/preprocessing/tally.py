"""Counts values of the rows of a split while they are encoded.

In: rows of chunks.  Out: a `Tally`, which adds up, and from it the split's record in the manifest.

How far a column's distribution is from that in `train` is computed from two histograms of its encoded values, of few
enough bins to add up and keep.  Ids are binned by rank: 0 (unknown) and the 31 most frequent by themselves, the others
by powers of two.  Dense values are binned by sign, exponent and the first two bits of the mantissa.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from torchdlrm.data.manifest import FileRecord, SplitRecord
from torchdlrm.features.columns import LabelColumn, SparseColumn
from torchdlrm.features.vocabulary import UNKNOWN_ID

Histogram = Counter[int]  # bin -> values

_OWN_BINS = 32
_DENSE_SHIFT = 21


@dataclass
class Tally:
    """What the manifest says of the rows of a split, clicks by label in the schema's order; histograms of columns."""

    rows: int = 0
    clicks: list[int] = field(default_factory=list)
    values: Counter[str] = field(default_factory=Counter)
    unknown_rows: Counter[str] = field(default_factory=Counter)
    missing_rows: Counter[str] = field(default_factory=Counter)
    histograms: dict[str, Histogram] = field(default_factory=dict)

    def add(self, other: Self) -> None:
        """Add the counts of more rows."""
        self.rows += other.rows
        self._add_clicks(other.clicks)
        self.values.update(other.values)
        self.unknown_rows.update(other.unknown_rows)
        self.missing_rows.update(other.missing_rows)
        for name, histogram in other.histograms.items():
            self._add_histogram(name, histogram)

    def add_labels(self, *labels: npt.NDArray[np.int8]) -> None:
        """Count rows by their labels, of which there may be several columns."""
        self.rows += len(labels[0])
        self._add_clicks([int(column.sum()) for column in labels])

    def _add_clicks(self, clicks: Sequence[int]) -> None:
        self.clicks = [sum(pair) for pair in zip_longest(self.clicks, clicks, fillvalue=0)]

    def add_dense(self, name: str, bins: npt.NDArray[np.int64], num_missing: int) -> None:
        """Count the values of a dense column by their bins."""
        self.missing_rows[name] += num_missing
        self._add_histogram(name, _histogram(bins))

    def add_sparse(
        self, column: SparseColumn, ids: npt.NDArray[np.int32], counts: npt.NDArray[np.int64], num_missing: int
    ) -> None:
        """Count values by their ids (int32 [D]) and how often each is there (int64 [D])."""
        self.unknown_rows[column.name] += 0 if column.hash is not None else int(counts[ids == UNKNOWN_ID].sum())
        self.missing_rows[column.name] += num_missing
        if column.is_multi_valued:
            self.values[column.name] += int(counts.sum())
        self._add_histogram(column.name, _histogram(id_bins(ids), counts))

    def _add_histogram(self, name: str, histogram: Histogram) -> None:
        self.histograms.setdefault(name, Counter()).update(histogram)

    def to_json(self) -> dict[str, Any]:
        """Return what a work folder keeps, as JSON has it."""
        return vars(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        values, unknown, missing = (Counter(content[name]) for name in ("values", "unknown_rows", "missing_rows"))
        found = content["histograms"].items()
        histograms = {name: Counter({int(key): count for key, count in counts.items()}) for name, counts in found}
        return cls(content["rows"], content["clicks"], values, unknown, missing, histograms)

    def record(self, files: tuple[FileRecord, ...], train: Self, labels: Sequence[LabelColumn]) -> SplitRecord:
        """The split as it stands in the manifest."""
        clicks, *others = self.clicks or [0] * len(labels)
        return SplitRecord(
            rows=self.rows,
            clicks=clicks,
            other_clicks=dict(zip((column.name for column in labels[1:]), others, strict=True)),
            unknown_rows=self.unknown_rows,
            missing_rows=self.missing_rows,
            values=self.values,
            drift={name: divergence(found, train.histograms.get(name, {})) for name, found in self.histograms.items()},
            files=files,
        )


def id_bins(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The bin of each id: int64 [D]."""
    exponents = np.frexp(np.maximum(ids, 1).astype(np.float64))[1]
    return np.where(ids < _OWN_BINS, ids, _OWN_BINS + exponents).astype(np.int64)


def dense_bins(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """The bin of each dense value: int64 [B]."""
    return ((values + np.float32(0)).view(np.uint32) >> _DENSE_SHIFT).astype(np.int64)


def _histogram(bins: npt.NDArray[np.int64], weights: npt.NDArray[np.int64] | None = None) -> Histogram:
    """How many values, or how much weight, each bin has."""
    counts = np.bincount(bins, weights)
    found = np.flatnonzero(counts)
    return Counter(dict(zip(found.tolist(), counts[found].astype(np.int64).tolist(), strict=True)))


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
