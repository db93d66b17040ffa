"""Scores a log by the model of before, and says how good that was: the log has taught it nothing yet.

In: a log and a bundle.  Out: `scores.parquet`, a row for each row of the log in its order: label, weight (if rows have
one), `prediction`, `logit` and `has_unknown` (whether a value of the row has no id); of a bad row, all are null.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.evaluation.compare import auc_standard_error
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.live.record import PeriodMetrics, ProgressiveMetrics
from torchdlrm.logs.files import LogFile
from torchdlrm.metrics import Labels, Scores, Weights, binary_metrics
from torchdlrm.prediction.files import HAS_UNKNOWN_COLUMN, LOGIT_COLUMN, predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.progress import ProgressListener

SCORES_NAME = "scores.parquet"
_NORMAL_95 = 1.959964  # standard errors to each side that 95 % of a normal distribution are within


def score_log(
    predictor: Predictor, files: Sequence[LogFile], out: Path, *, max_bad_rows: int, progress: ProgressListener
) -> dict[str, float]:
    """Predict a log into a file of scores.

    Args:
        predictor: of the model of before.
        files: of the log, as they were found.
        out: the file, which appears when it is complete.
        max_bad_rows: 0: the first bad row is an error; else each has a row of nulls.
        progress: receives the bytes read.

    Returns:
        For each feature with a vocabulary, the fraction of its values that have no id.

    Raises:
        LogError: the log cannot be read, has changed, has no label, or has bad rows that are refused.
    """
    rows = RowsIn(
        [file.path for file in files], predictor.schema, passthrough=predictor.schema.target_names, files=tuple(files)
    )
    summary = predict_file(
        predictor,
        rows,
        out,
        bad_rows="null" if max_bad_rows else "refuse",
        with_details=True,
        bad_rows_remedy="Fix the log, or skip such rows with `max_bad_rows` N.",
        with_metrics=False,  # the scores have all rows that are judged
        progress=progress,
    )
    return summary.unknown_rate


def read_scores(path: Path, schema: FeatureSchema) -> pl.DataFrame:
    """The good rows of a file of scores, N in the order of the log, without their predictions as probabilities."""
    return pl.read_parquet(path, columns=[*schema.target_names, LOGIT_COLUMN, HAS_UNKNOWN_COLUMN]).drop_nulls()


def progressive_metrics(scores: pl.DataFrame, schema: FeatureSchema) -> ProgressiveMetrics:
    """How good the scores of a log are."""

    def of(rows: pl.DataFrame) -> PeriodMetrics | None:
        return metrics_of(rows, schema) if rows.height else None

    # One after the other: each takes gigabytes where a log has 100 million rows.
    return ProgressiveMetrics(
        all=metrics_of(scores, schema),
        known=of(scores.filter(~pl.col(HAS_UNKNOWN_COLUMN))),
        unseen=of(scores.filter(HAS_UNKNOWN_COLUMN)),
    )


def metrics_of(scores: pl.DataFrame, schema: FeatureSchema) -> PeriodMetrics:
    """The metrics of scores, as `read_scores` gives them."""
    labels, *weights = (scores[name].to_numpy() for name in schema.target_names)
    return period_metrics(labels, scores[LOGIT_COLUMN].to_numpy(), *weights)


def period_metrics(labels: Labels, logits: Scores, weights: Weights = None) -> PeriodMetrics:
    """All metrics of N rows, and the interval of the AUC.

    Args:
        labels: 0 or 1 [N].
        logits: log-odds of a click [N].
        weights: of the rows [N].
    """
    metrics = binary_metrics(labels, logits, weights)
    error = auc_standard_error(labels, logits, weights)
    values = {
        "auc": metrics.auc,
        "auc_low": max(0.0, metrics.auc - _NORMAL_95 * error),
        "auc_high": min(1.0, metrics.auc + _NORMAL_95 * error),
        "logloss": metrics.logloss,
        "ne": metrics.ne,
        "calibration": metrics.calibration,
    }
    undefined = {name for name, value in values.items() if math.isnan(value)}
    undefined |= {"auc_low", "auc_high"} if math.isnan(error) else set()
    defined = {name: None if name in undefined else value for name, value in values.items()}
    return PeriodMetrics(rows=metrics.rows, clicks=int(np.count_nonzero(labels)), **defined)
