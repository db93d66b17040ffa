"""Compares models on the same rows: how much better one predicts than another, and how sure that is.

In: two runs, or labels [N], the logits [N] of both models and perhaps weights [N] of the rows.  Out: a `Difference`,
with standard errors of paired differences: rows that are hard for both models say nothing about which is better, and
drop out.

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
from torchdlrm.metrics import Labels, Scores, Weights, auc, weighted_wins
from torchdlrm.model.model_class import ModelClass
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

    Where rows have weights, differences and means are weighted, and standard errors are those of weighted means of
    independent rows: weights say how much a row matters, and not how often it was seen.
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
    model_classes: tuple[ModelClass | None, ModelClass | None] = (None, None),
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
        model_classes: of each run, where it was trained with a class of somebody's own.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        device: where to compute, as for `evaluate`.
        sharding: of both runs' tables, as for `evaluate`.
        progress: receives the rows done on rank 0.

    Returns:
        On rank 0 what the second run's metrics are above the first one's; None elsewhere.

    Raises:
        RunError: as `evaluate`.
        DatasetError: as `evaluate`, or the runs were trained on different rows or labels.
    """
    runs = [run if isinstance(run, Run) else Run.open(Path(run)) for run in (first, second)]
    labels = [run.open_dataset(dataset).label_name for run in runs]
    if labels[0] != labels[1]:
        msg = f"the runs predict different labels, {labels[0]} and {labels[1]}: they cannot be compared"
        raise DatasetError(msg)
    (_, taken), (_, other) = (
        predict_split(
            run,
            dataset,
            split,
            model_class=model_class,
            batch_size_global=batch_size_global,
            device=device,
            sharding=sharding,
            progress=progress,
        )
        for run, model_class in zip(runs, model_classes, strict=True)
    )
    if taken is None or other is None:
        return None
    if not np.array_equal(taken.labels, other.labels):
        msg = f"the runs were trained on different datasets: the labels of their {split} splits are not the same"
        raise DatasetError(msg)
    return paired_difference(taken.labels, taken.logits, other.logits, taken.weights)


def paired_difference(labels: Labels, first: Scores, second: Scores, weights: Weights = None) -> Difference:
    """Compare two models on the same rows.

    Args:
        labels: 0 or 1 [N].
        first: logits of the model to compare with [N].
        second: logits of the other model [N].
        weights: of the rows [N].
    """
    if weights is not None:
        counts = weights > 0
        labels, first, second, weights = labels[counts], first[counts], second[counts], weights[counts]
    clicked = labels != 0
    losses = [np.logaddexp(0.0, np.where(clicked, -1.0, 1.0) * logits.astype(np.float64)) for logits in (first, second)]
    loss_difference = losses[1] - losses[0]
    (wins_P1, wins_Q1), (wins_P2, wins_Q2) = (
        _wins(scores[clicked], scores[~clicked]) if weights is None else weighted_wins(clicked, scores, weights)
        for scores in (first, second)
    )
    weights_P, weights_Q = (None, None) if weights is None else (weights[clicked], weights[~clicked])
    return Difference(
        auc=auc(labels, second, weights) - auc(labels, first, weights),
        auc_standard_error=math.hypot(
            _error_of_mean(wins_P2 - wins_P1, weights_P), _error_of_mean(wins_Q2 - wins_Q1, weights_Q)
        ),
        logloss=float(np.average(loss_difference, weights=weights)) if loss_difference.size else math.nan,
        logloss_standard_error=_error_of_mean(loss_difference, weights),
    )


def auc_standard_error(labels: Labels, scores: Scores, weights: Weights = None) -> float:
    """Standard error of a model's AUC, by DeLong, DeLong and Clarke-Pearson (1988).

    Args:
        labels: 0 or 1 [N].
        scores: any monotone function of the probability, such as a logit [N].
        weights: of the rows [N].

    Returns:
        NaN with fewer than two rows of a class.
    """
    if weights is not None:
        counts = weights > 0
        labels, scores, weights = labels[counts], scores[counts], weights[counts]
    clicked = labels != 0
    if weights is None:
        wins_P, wins_Q = _wins(scores[clicked], scores[~clicked])
        return math.hypot(_error_of_mean(wins_P, None), _error_of_mean(wins_Q, None))
    wins_P, wins_Q = weighted_wins(clicked, scores, weights)
    return math.hypot(_error_of_mean(wins_P, weights[clicked]), _error_of_mean(wins_Q, weights[~clicked]))


def calibration_standard_error(labels: Labels, logits: Scores, weights: Weights = None) -> float:
    """Standard error of a model's calibration, a ratio of two means of the same rows, by the delta method.

    Args:
        labels: 0 or 1 [N].
        logits: log-odds of a click [N].
        weights: of the rows [N].

    Returns:
        NaN with fewer than two rows, and when nothing was clicked.
    """
    if weights is not None:
        counts = weights > 0
        labels, logits, weights = labels[counts], logits[counts], weights[counts]
    clicked = (labels != 0).astype(np.float64)
    if not clicked.any():
        return math.nan
    predictions = np.exp(-np.logaddexp(0.0, -logits.astype(np.float64)))
    click_rate = float(np.average(clicked, weights=weights))
    calibration = float(np.average(predictions, weights=weights)) / click_rate
    return _error_of_mean(predictions - calibration * clicked, weights) / click_rate


def _wins(positives: Scores, negatives: Scores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For each positive the share of negatives below it [P], for each negative that of positives above it [Q]."""
    positives_sorted, negatives_sorted = np.sort(positives), np.sort(negatives)

    def share_below(scores: Scores, others_sorted: Scores) -> NDArray[np.float64]:
        twice = sum(np.searchsorted(others_sorted, scores, side=side) for side in ("left", "right"))
        return np.asarray(twice / (2 * max(1, others_sorted.size)), np.float64)

    return share_below(positives, negatives_sorted), 1.0 - share_below(negatives, positives_sorted)


def _error_of_mean(values: NDArray[np.float64], weights: Weights) -> float:
    if values.size < 2:
        return math.nan
    if weights is None:
        return float(values.std(ddof=1) / math.sqrt(values.size))
    shares = weights.astype(np.float64) / weights.sum(dtype=np.float64)
    spread = shares * (values - (shares * values).sum())
    return math.sqrt(values.size / (values.size - 1) * float((spread**2).sum()))
