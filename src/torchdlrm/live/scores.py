"""Scores a log by the previous model, and says how good that was: the log has taught it nothing yet.

In: a log and a bundle.  Out: `scores.parquet`, a row for each row of the log in its order: label, weight (if rows have
one), `prediction`, `logit` and `has_unknown` (whether a value of the row has no id); of a bad row, all are null.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.live.record import PeriodMetrics, ProgressiveMetrics
from torchdlrm.logs.files import LogFile
from torchdlrm.metrics import Labels, Scores, Weights, binary_metrics, metrics_in
from torchdlrm.prediction.files import HAS_UNKNOWN_COLUMN, LOGIT_COLUMN, predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.progress import ProgressListener

SCORES_NAME = "scores.parquet"
_ENDS = ("_low", "_high")
_NORMAL_95 = 1.959964  # standard errors to each side that 95 % of a normal distribution are within


def score_log(
    predictor: Predictor, files: Sequence[LogFile], out: Path, *, max_bad_rows: int, progress: ProgressListener
) -> dict[str, float]:
    """Predict a log into a file of scores.

    Args:
        predictor: of the previous model.
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


def period_names() -> list[str]:
    """What `period_metrics` has, in its order."""
    ends = {False: ("",), True: ("", *_ENDS)}
    metrics = metrics_in("table")
    names = [f"{metric.name}{end}" for metric in metrics for end in ends[metric.standard_error is not None]]
    return ["rows", "clicks", *names]


def period_metrics(labels: Labels, logits: Scores, weights: Weights = None) -> PeriodMetrics:
    """What a live model keeps of N rows: their metrics, and the intervals of those whose standard error is known.

    Args:
        labels: 0 or 1 [N].
        logits: log-odds of a click [N].
        weights: of the rows [N].
    """
    values = binary_metrics(labels, logits, weights).as_json()
    found: PeriodMetrics = {"rows": values["rows"], "clicks": int(np.count_nonzero(labels))}
    for metric in metrics_in("table"):
        value = found[metric.name] = values[metric.name]
        if metric.standard_error is not None:
            reach = _NORMAL_95 * metric.standard_error(labels, logits, weights)
            ends: tuple[float | None, float | None] = (None, None)
            if value is not None and not math.isnan(reach):
                ends = max(0.0, value - reach), min(metric.largest, value + reach)
            found |= zip((metric.name + end for end in _ENDS), ends, strict=True)
    return found
