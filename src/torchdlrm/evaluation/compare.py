"""Compares models on the same rows: how much better one predicts than another, and how sure that is.

In: two runs, or labels [N] and the logits [N] of both models.  Out: a `Difference`, with standard errors of paired
differences: rows that are hard for both models say nothing about which is better, and drop out.

N rows, P of them clicked, Q = N - P not.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchdlrm.config import DeviceChoice, ShardingConfig
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.evaluation.evaluate import predict_split
from torchdlrm.metrics import Labels, Scores, auc
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.training.run import Run


@dataclass(frozen=True)
class Difference:
    """What the second model's metrics are above the first one's, each with its standard error.

    Attributes:
        auc: difference of the AUC; above 0 the second model is better. NaN when the labels hold one class only.
        auc_standard_error: by DeLong, DeLong and Clarke-Pearson (1988); NaN with fewer than two rows of a class.
        logloss: difference of the logloss in nats; below 0 the second model is better.
        logloss_standard_error: of the mean of the rows' differences; NaN with fewer than two rows.
    """

    auc: float
    auc_standard_error: float
    logloss: float
    logloss_standard_error: float


def compare(
    first: Run | str | Path,
    second: Run | str | Path,
    dataset: Dataset | str | Path | None = None,
    split: str = "test",
    *,
    batch_size_global: int = 8192,
    device: DeviceChoice = "auto",
    sharding: ShardingConfig | None = None,
    progress: ProgressListener = SILENT,
) -> Difference | None:
    """Compare two runs that were trained on the same dataset, each by its best checkpoint.

    Works in this process and all others that torch's launcher has started with it, as `evaluate` does.

    Args:
        first: the run to compare with, or its folder.
        second: the other run, or its folder.
        dataset: what both were trained on, or its folder; None where it is still where it was.
        split: `train`, `val` or `test`; several joined by + are judged together.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        device: where to compute, as for `evaluate`.
        sharding: of both runs' tables, as for `evaluate`.
        progress: receives the rows done on rank 0.

    Returns:
        On rank 0 what the second run's metrics are above the first one's; None elsewhere.

    Raises:
        RunError: as `evaluate`.
        DatasetError: as `evaluate`, or the runs were trained on different rows.
    """
    (_, taken), (_, other) = (
        predict_split(
            run,
            dataset,
            split,
            batch_size_global=batch_size_global,
            device=device,
            sharding=sharding,
            progress=progress,
        )
        for run in (first, second)
    )
    if taken is None or other is None:
        return None
    (labels, first_logits), (other_labels, second_logits) = taken, other
    if not np.array_equal(labels, other_labels):
        msg = f"the runs were trained on different datasets: the labels of their {split} splits are not the same"
        raise DatasetError(msg)
    return paired_difference(labels, first_logits, second_logits)


def paired_difference(labels: Labels, first: Scores, second: Scores) -> Difference:
    """Compare two models on the same rows.

    Args:
        labels: 0 or 1 [N].
        first: logits of the model to compare with [N].
        second: logits of the other model [N].
    """
    clicked = labels != 0
    losses = [np.logaddexp(0.0, np.where(clicked, -1.0, 1.0) * logits.astype(np.float64)) for logits in (first, second)]
    loss_difference = losses[1] - losses[0]
    (wins_P1, wins_Q1), (wins_P2, wins_Q2) = (_wins(scores[clicked], scores[~clicked]) for scores in (first, second))
    return Difference(
        auc=auc(labels, second) - auc(labels, first),
        auc_standard_error=math.hypot(_error_of_mean(wins_P2 - wins_P1), _error_of_mean(wins_Q2 - wins_Q1)),
        logloss=float(loss_difference.mean()) if loss_difference.size else math.nan,
        logloss_standard_error=_error_of_mean(loss_difference),
    )


def _wins(positives: Scores, negatives: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each positive the share of negatives below it [P], for each negative that of positives above it [Q]."""
    positives_sorted, negatives_sorted = np.sort(positives), np.sort(negatives)

    def share_below(scores: Scores, others_sorted: Scores) -> NDArray[np.float64]:
        twice = sum(np.searchsorted(others_sorted, scores, side=side) for side in ("left", "right"))
        return np.asarray(twice / (2 * max(1, others_sorted.size)), np.float64)

    return share_below(positives, negatives_sorted), 1.0 - share_below(negatives, positives_sorted)


def _error_of_mean(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else math.nan
