"""Checks that a bundle and its checkpoint predict the same, as far as the precision allows.

The same encoded rows go through four models: the checkpoint; the checkpoint with each embedding rounded as the bundle
stores it; the bundle computing in float32; the bundle as served.  Between the first two lies what rounding costs, and
between the last two what bfloat16 does.  Between the second and the third nothing may lie but the order of additions:
there a row of a table in the wrong place shows, however coarse the tables are.

The rise of the logloss is checked too.  It is a mean over rows whose errors have either sign, so few rows say little
about it: it counts as too high only if it exceeds the limit by more than three standard errors.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import CheckRecord, PredictionRecord
from torchdlrm.errors import BundleError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.metrics import Weights, binary_metrics
from torchdlrm.progress import ProgressListener

_STANDARD_ERRORS = 3.0
_REMEDY = "nothing was left behind. Export with a higher `precision` or `dense_precision` float32"

Logits = Callable[[EncodedRows], NDArray[np.float32]]


@dataclass(frozen=True)
class Tolerance:
    """What a precision explains.

    Attributes:
        difference: between two probabilities of a row.
        logloss_increase: over many rows, in nats.
    """

    difference: float
    logloss_increase: float


# float32 differs by the order of additions alone. The others are several times what trained models have shown.
_OF_TABLES: dict[TablePrecision, Tolerance] = {
    "float32": Tolerance(1e-5, 1e-6),
    "float16": Tolerance(5e-3, 2e-5),
    "int8": Tolerance(0.05, 2e-4),
    "int4": Tolerance(0.4, 5e-3),
}
_OF_DENSE: dict[DensePrecision, Tolerance] = {"float32": Tolerance(0.0, 0.0), "bfloat16": Tolerance(0.05, 2e-4)}


def tolerance(tables: Iterable[TablePrecision], dense: DensePrecision) -> Tolerance:
    """What these precisions explain together."""
    worst = max((_OF_TABLES[precision] for precision in tables), key=lambda allowed: allowed.difference)
    return Tolerance(
        worst.difference + _OF_DENSE[dense].difference, worst.logloss_increase + _OF_DENSE[dense].logloss_increase
    )


def arithmetic_difference(dense: DensePrecision) -> float:
    """Between two probabilities of a row, the tables being the same."""
    return tolerance(["float32"], dense).difference


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
) -> CheckRecord:
    """Predict the same rows by checkpoint and bundle.

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
    pieces: list[tuple[NDArray[np.floating], ...]] = []
    for frame in frames:
        rows = EncodedRows.from_frame(frame, schema)
        targets = [frame[name].to_numpy() for name in schema.target_names]
        before, after = checkpoint(rows), bundle(rows)
        expected = before if rounded is None else rounded(rows)
        pieces.append((before, expected, after if in_float32 is None else in_float32(rows), after, *targets))
        progress.advance(frame.height)
    before, expected, exact, after, labels, *weights = map(np.concatenate, zip(*pieces, strict=True))
    difference = _largest_difference(before, after)
    dense: DensePrecision = "float32" if in_float32 is None else "bfloat16"
    explained = _largest_difference(before, expected) + arithmetic_difference(dense)
    record = CheckRecord(
        split=split,
        rows=len(labels),
        largest_difference=difference,
        largest_allowed=min(explained, allowed.difference),
        checkpoint=_judged(labels, before, *weights),
        bundle=_judged(labels, after, *weights),
    )
    unexplained = _largest_difference(expected, exact)
    if not unexplained <= arithmetic_difference("float32"):  # also where it is NaN
        msg = (
            f"the bundle predicts other than the checkpoint with the same embeddings: a probability differs by "
            f"{unexplained:.2g} on {len(labels):,} rows of {split}, and the order of additions explains "
            f"{arithmetic_difference('float32'):.2g}; nothing was left behind. Export again"
        )
        raise BundleError(msg)
    if not difference <= allowed.difference:
        msg = (
            f"the bundle predicts other than the checkpoint: a probability differs by {difference:.2g} on "
            f"{len(labels):,} rows of {split}, and {allowed.difference:.2g} is allowed; {_REMEDY}"
        )
        raise BundleError(msg)
    increase = logloss_increase(labels, before, after, *weights)
    if not increase.is_within(allowed.logloss_increase):
        msg = (
            f"the bundle's logloss on {len(labels):,} rows of {split} is {increase.mean:.6f} higher than the "
            f"checkpoint's, and {allowed.logloss_increase:.6f} is allowed; {_REMEDY}"
        )
        raise BundleError(msg)
    return record


@dataclass(frozen=True)
class LoglossIncrease:
    """How much higher a logloss is than another on the same rows, in nats, and the standard error of that."""

    mean: float
    standard_error: float

    def is_within(self, allowed: float) -> bool:
        """Whether it is not surely higher than this."""
        return self.mean - _STANDARD_ERRORS * self.standard_error <= allowed


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


def _largest_difference(one: NDArray[np.floating], other: NDArray[np.floating]) -> float:
    return float(np.abs(_probability(one) - _probability(other)).max())


def _probability(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    return 1 / (1 + np.exp(-logits.astype(np.float64)))


def _judged(labels: NDArray[np.floating], logits: NDArray[np.floating], weights: Weights = None) -> PredictionRecord:
    # Rows that weigh nothing are better judged all alike than not at all.
    metrics = binary_metrics(labels, logits, None if weights is None or not weights.any() else weights)
    return PredictionRecord(auc=None if math.isnan(metrics.auc) else metrics.auc, logloss=metrics.logloss)
