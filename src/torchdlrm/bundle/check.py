"""Checks that a bundle and its checkpoint predict the same, as far as the precision allows.

The same encoded rows go through four models: the checkpoint; the checkpoint with each embedding rounded as the bundle
stores it; the bundle computing in float32; the bundle as served.  Between the first two lies what rounding costs, and
between the last two what bfloat16 does.  Between the second and the third nothing may lie but the order of additions:
there a row of a table in the wrong place shows, however coarse the tables are.

A difference is looked at in itself and relative to the probability, which is what a bid is made of where clicks are
rare.  Rows that the same tables tell apart must stay apart: what rounds a logit makes ties, and ties decide a ranking.

The rise of the logloss is checked too.  It is a mean over rows whose errors have either sign, so few rows say little
about it: it counts as too high only if it exceeds the limit by more than three standard errors.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import CheckRecord, PredictionRecord
from torchdlrm.bundle.precision import DENSE_PRECISIONS, TABLE_PRECISIONS, DensePrecision, TablePrecision, Tolerance
from torchdlrm.errors import BundleError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.metrics import binary_metrics
from torchdlrm.progress import ProgressListener
from torchdlrm.ranks import Weights

_STANDARD_ERRORS = 3.0
_LEAST_DISTINCT = 0.99
_SMALLEST = 1e-6  # probability whose relative difference says something
_REMEDY = "nothing was left behind. Export with a higher `precision` or `dense_precision` float32"

Logits = Callable[[EncodedRows], NDArray[np.float32]]


def tolerance(tables: Iterable[TablePrecision], dense: DensePrecision) -> Tolerance:
    """What these precisions explain together."""
    worst = max((TABLE_PRECISIONS[name].tolerance for name in tables), key=lambda allowed: allowed.difference)
    return worst.plus(DENSE_PRECISIONS[dense])


def of_arithmetic(dense: DensePrecision) -> Tolerance:
    """What it explains where the tables are the same."""
    return tolerance(["float32"], dense)


@dataclass(frozen=True)
class Agreement:
    """How near predictions are to others of the same rows.

    Attributes:
        largest_difference: between the two probabilities of a row.
        median_relative: of the rows' differences, each relative to the probability.
        largest_relative: of the same.
        distinct: different probabilities among the predictions, as float32.
        distinct_before: among the others.
    """

    largest_difference: float
    median_relative: float
    largest_relative: float
    distinct: int
    distinct_before: int

    @classmethod
    def of(cls, before: NDArray[np.floating], after: NDArray[np.floating]) -> Self:
        """That of log-odds with others of the same rows, each [rows]."""
        one, other = _probability(before), _probability(after)
        difference = np.abs(other - one)
        relative = difference / np.maximum(one, _SMALLEST)
        distinct = (len(np.unique(found.astype(np.float32))) for found in (other, one))
        return cls(float(difference.max()), float(np.median(relative)), float(relative.max()), *distinct)

    def problem(self, allowed: Tolerance, *, same_tables: bool) -> str | None:
        """What precisions do not explain, for people; NaN, which they never do, included.

        Args:
            allowed: what they explain.
            same_tables: whether only the arithmetic differs, which leaves rows apart that differ.
        """
        if not self.largest_difference <= allowed.difference:
            return f"a probability differs by {self.largest_difference:.2g}, and {allowed.difference:.2g} is allowed"
        if not self.largest_relative <= allowed.relative_difference:
            return (
                f"a probability differs by {self.largest_relative:.2g} times itself, and "
                f"{allowed.relative_difference:.2g} is allowed"
            )
        if same_tables and self.distinct < _LEAST_DISTINCT * self.distinct_before - 1:
            return f"there are {self.distinct:,} different probabilities in place of {self.distinct_before:,}"
        return None


def compare(
    frames: Iterable[pl.DataFrame],
    schema: FeatureSchema,
    *,
    split: str,
    checkpoint: Logits,
    rounded: Logits | None,
    in_float32: Logits | None,
    bundle: Logits,
    allowed: Tolerance,
    progress: ProgressListener,
) -> tuple[CheckRecord, Agreement]:
    """Predict the same rows by checkpoint and bundle; returns what is recorded, and how near the bundle's are.

    Args:
        frames: encoded rows with their label, and their weight where rows have one.
        schema: of the columns.
        split: which rows they are, for the record.
        checkpoint: log-odds by the checkpoint.
        rounded: log-odds by the checkpoint with its embeddings rounded as the bundle's; None where they are not.
        in_float32: log-odds by the bundle computing in float32; None where it does so anyway.
        bundle: log-odds by the bundle as served.
        allowed: what precisions explain.
        progress: receives the rows done.

    Raises:
        BundleError: they differ by more than is allowed.
    """
    pieces, targets = list[tuple[NDArray[np.floating], ...]](), list[pl.DataFrame]()
    for frame in frames:
        rows = EncodedRows.from_frame(frame, schema)
        targets.append(frame.select(schema.target_names))
        before, after = checkpoint(rows), bundle(rows)
        expected = before if rounded is None else rounded(rows)
        pieces.append((before, expected, after if in_float32 is None else in_float32(rows), after))
        progress.advance(frame.height)
    logits = [schema.by_label(np.concatenate(path)) for path in zip(*pieces, strict=True)]
    columns = {name: column.to_numpy() for name, column in pl.concat(targets).to_dict().items()}
    weights = None if schema.weight is None else columns[schema.weight.name]
    dense: DensePrecision = "float32" if in_float32 is None else "bfloat16"
    records, agreements = dict[str, CheckRecord](), list[Agreement]()
    for name, before, expected, exact, after in zip(logits[0], *(path.values() for path in logits), strict=True):
        labels = columns[name]
        agreement, of_rounding = Agreement.of(before, after), Agreement.of(before, expected)
        explained = of_rounding.largest_difference + of_arithmetic(dense).difference
        record = CheckRecord(
            split=split,
            rows=len(labels),
            largest_difference=agreement.largest_difference,
            largest_allowed=min(explained, allowed.difference),
            checkpoint=_judged(labels, before, weights),
            bundle=_judged(labels, after, weights),
        )
        on_rows = f"on {len(labels):,} rows of {split}{f', {name}' * (len(logits[0]) > 1)}"
        if problem := Agreement.of(expected, exact).problem(of_arithmetic("float32"), same_tables=True):
            raise BundleError(
                f"the bundle predicts other than the checkpoint with the same embeddings {on_rows}: {problem}, where "
                "only the order of additions differs; nothing was left behind. Export again"
            )
        if problem := agreement.problem(allowed, same_tables=False):
            raise BundleError(f"the bundle predicts other than the checkpoint {on_rows}: {problem}; {_REMEDY}")
        if problem := Agreement.of(expected, after).problem(of_arithmetic(dense), same_tables=True):
            raise BundleError(f"bfloat16 costs more than it may {on_rows}: {problem}; {_REMEDY}")
        increase = logloss_increase(labels, before, after, weights)
        if not increase.is_within(allowed.logloss_increase):
            raise BundleError(
                f"the bundle's logloss {on_rows} is {increase.mean:.6f} higher than the "
                f"checkpoint's, and {allowed.logloss_increase:.6f} is allowed; {_REMEDY}"
            )
        records[name] = record
        agreements.append(agreement)
    first, *others = records
    return records[first].model_copy(update={"labels": {name: records[name] for name in others}}), agreements[0]


@dataclass(frozen=True)
class LoglossIncrease:
    """How much higher a logloss is than another on the same rows, in nats, and the standard error of that."""

    mean: float
    standard_error: float

    @property
    def least(self) -> float:
        """What it is surely."""
        return self.mean - _STANDARD_ERRORS * self.standard_error

    def is_within(self, allowed: float) -> bool:
        """Whether it is not surely higher than this."""
        return self.least <= allowed


def logloss_increase(
    labels: NDArray[np.floating],
    before: NDArray[np.floating],
    after: NDArray[np.floating],
    weights: Weights = None,
) -> LoglossIncrease:
    """How much higher the logloss of log-odds `after` is than that of `before`, each [rows]."""
    sign = np.where(labels != 0, -1.0, 1.0)
    increase = np.logaddexp(0, sign * after.astype(np.float64)) - np.logaddexp(0, sign * before.astype(np.float64))
    if weights is not None and weights.any():
        # Each row's part of a mean that is weighted: n times its weight over the sum of all.
        increase *= weights / weights.mean(dtype=np.float64)
    return LoglossIncrease(float(increase.mean()), float(increase.std()) / math.sqrt(len(increase)))


def _probability(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _judged(labels: NDArray[np.floating], logits: NDArray[np.floating], weights: Weights = None) -> PredictionRecord:
    # Rows that weigh nothing are better judged all alike than not at all.
    metrics = binary_metrics(labels, logits, None if weights is None or not weights.any() else weights)
    return PredictionRecord(auc=None if math.isnan(metrics.auc) else metrics.auc, logloss=metrics.logloss)
