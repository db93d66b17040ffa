"""How well the models of a period predict, and whether the new one is published.

In: a log and the bundle of the previous model, which the log has taught nothing yet; then rows of it that were held
back from learning, and the candidate's bundle.  Out: `scores.parquet`, a row for each row of the log in its order:
labels, weight (if rows have one), `prediction`, `logit` and `has_unknown` (whether a value of the row has no id), of a
bad row all null; metrics, and a `GateRecord`.  Of several labels each has a prediction and a logit, and the first is
the one that models are judged by.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SPLIT_NAMES, RandomSplit
from torchdlrm.errors import LogError
from torchdlrm.evaluation.split_rows import predict_by_bundle
from torchdlrm.exporting.recalibrate import JUDGED
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.judged import Judged
from torchdlrm.judging.reliability import rows_of
from torchdlrm.live.record import GateRecord, PeriodMetrics, ProgressiveMetrics
from torchdlrm.live.settings import GateSettings
from torchdlrm.logs.files import LogFile
from torchdlrm.metrics import LOSS, METRICS, metrics_in, metrics_of
from torchdlrm.prediction.files import HAS_UNKNOWN_COLUMN, predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.prediction.scores_out import LOGIT_COLUMN
from torchdlrm.progress import ProgressListener
from torchdlrm.ranks import Labels, Scores, Weights

_ENDS = ("_low", "_high")
_STANDARD_ERRORS = 2.0  # outside a limit by this many is not chance


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
    logits = schema.label_columns(LOGIT_COLUMN)
    return pl.read_parquet(path, columns=[*schema.target_names, *logits, HAS_UNKNOWN_COLUMN]).drop_nulls()


def progressive_metrics(scores: pl.DataFrame, schema: FeatureSchema) -> ProgressiveMetrics:
    """How good the scores of a log are."""

    def of(rows: pl.DataFrame) -> PeriodMetrics | None:
        return metrics_of_scores(rows, schema) if rows.height else None

    # One after the other: each takes gigabytes where a log has 100 million rows.
    return ProgressiveMetrics(
        all=metrics_of_scores(scores, schema),
        known=of(scores.filter(~pl.col(HAS_UNKNOWN_COLUMN))),
        unseen=of(scores.filter(HAS_UNKNOWN_COLUMN)),
        labels={label.name: metrics_of_scores(scores, schema, label.name) for label in schema.learnt[1:]},
    )


def metrics_of_scores(scores: pl.DataFrame, schema: FeatureSchema, label: str | None = None) -> PeriodMetrics:
    """The metrics of scores, as `read_scores` gives them, of a label; the first when not given."""
    logit = LOGIT_COLUMN if label is None else f"{LOGIT_COLUMN}_{label}"
    weights = None if schema.weight is None else scores[schema.weight.name].to_numpy()
    return period_metrics(scores[label or schema.label.name].to_numpy(), scores[logit].to_numpy(), weights)


def period_names() -> list[str]:
    """What `period_metrics` has, in its order."""
    ends = {False: ("",), True: ("", *_ENDS)}
    metrics = metrics_in("table")
    names = [f"{metric.name}{end}" for metric in metrics for end in ends[metric.influence is not None]]
    return ["rows", "clicks", *names]


def period_metrics(labels: Labels, logits: Scores, weights: Weights = None) -> PeriodMetrics:
    """What a live model keeps of N rows: their metrics, and the intervals of those whose standard error is known.

    Args:
        labels: 0 or 1 [N].
        logits: log-odds of a click [N].
        weights: of the rows [N].
    """
    judged = Judged.of(labels, logits, weights)
    values = metrics_of(judged).as_json()
    found: PeriodMetrics = {"rows": values["rows"], "clicks": int(np.count_nonzero(labels))}
    for metric in metrics_in("table"):
        found[metric.name] = values[metric.name]
        if metric.influence is not None:
            _, _, *ends = metric.estimate(judged)
            found |= zip((metric.name + end for end in _ENDS), map(_defined, ends), strict=True)
    return found


def judge(
    candidate: Bundle, dataset: Dataset, scores: Path | None, settings: GateSettings, progress: ProgressListener
) -> GateRecord:
    """Compare a candidate with the previous model.

    Args:
        candidate: what may be published.
        dataset: of the period; the rows of its val split were held back, at random. Those that a recalibration was
            fitted on judge no candidate.
        scores: of the whole log by the previous model, as `score_log` writes them; None for the first period.
        settings: the limits.
        progress: receives the rows predicted.

    Raises:
        LogError: the log was another one when it was scored.
    """
    schema, kept = dataset.schema, JUDGED if candidate.manifest.recalibrations else slice(None)
    names = [label.name for label in schema.learnt]
    predictions = predict_by_bundle(candidate, dataset, "val", progress, phase="gate").by_label(names)
    judged, *others = (rows_of(Judged.of(*of), kept) for of in predictions.values())
    new = period_metrics(judged.labels, judged.logits, judged.weights)
    old = increase = increase_error = None
    if scores is not None:
        held_back = _held_back(read_scores(scores, schema), dataset)[kept]
        if not np.array_equal(held_back[schema.label.name].to_numpy(), judged.labels):
            msg = f"{scores}: its rows are not those of {dataset.path}: the log has changed meanwhile; give `restart`"
            raise LogError(msg)
        old = metrics_of_scores(held_back, schema)
        before = Judged.of(judged.labels, held_back[LOGIT_COLUMN].to_numpy(), judged.weights)
        increase, increase_error, *_ = map(_defined, METRICS[LOSS].difference(before, judged))
    gate = GateRecord(
        rows=judged.labels.size,
        old=old,
        new=new,
        calibration_standard_error=_defined(METRICS["calibration"].estimate(judged).standard_error),
        logloss_increase=increase,
        logloss_increase_standard_error=increase_error,
        passed=True,
        reasons=(),
        labels={
            name: period_metrics(of.labels, of.logits, of.weights) for name, of in zip(names[1:], others, strict=True)
        },
    )
    reasons = tuple(objections(gate, settings, names[0] if others else ""))
    return gate.model_copy(update={"passed": not reasons, "reasons": reasons})


def require_same_rows(scores: Path, dataset: Dataset) -> None:
    """See that the rows of a log that were scored are those that can be learnt from.

    Raises:
        LogError: they are not.
    """
    scored, rows = read_scores(scores, dataset.schema).height, sum(split.rows for split in dataset.splits.values())
    if scored != rows:
        msg = (
            f"{scored:,} rows of the log can be scored, and {rows:,} can be learnt from: of the others, what is no "
            "feature (another label, the time) cannot be read. Remove these rows from the log, and give `restart`"
        )
        raise LogError(msg)


def _held_back(scores: pl.DataFrame, dataset: Dataset) -> pl.DataFrame:
    """The scores of the rows of the val split, in its order, which is that of the log."""
    split = dataset.schema.split
    codes = RandomSplit(split.val, split.test, dataset.manifest.seed).split_of_rows(0, scores.height, None)
    return scores.filter(pl.Series(codes == SPLIT_NAMES.index("val")))


def objections(gate: GateRecord, settings: GateSettings, label: str = "") -> list[str]:
    """Sentences that say why a model is not published: what is outside a limit by more than two standard errors.

    That of a calibration is taken relative to it, on the scale of its logarithm: of few clicks it is as large as the
    calibration itself, and still a log without its clicks must not look like one with few rows. A standard error
    that is not known counts as 0.
    """
    found, clicks = [], gate.new["clicks"]
    rows = f"{gate.rows:,} held-back rows" + f" (label {label})" * bool(label)
    low, high = settings.calibration
    calibration, error = gate.new["calibration"], gate.calibration_standard_error or 0.0
    if clicks in (0, gate.rows):
        found.append(f"{'all' if clicks else 'none'} of the {rows} were clicked: rows of one class judge no model")
    elif calibration is None:
        found.append(f"the clicks of the {rows} have no weight, so the calibration is not known")
    else:
        factor = math.exp(_STANDARD_ERRORS * error / calibration) if calibration else 1.0
        if calibration * factor < low or calibration / factor > high:
            found.append(
                f"the calibration on {rows} is {calibration:.4f} (standard error {error:.4f}), outside {low:g} to "
                f"{high:g}"
            )
    increase, error = gate.logloss_increase, gate.logloss_increase_standard_error or 0.0
    if increase is not None and increase - _STANDARD_ERRORS * error > settings.max_logloss_increase:
        found.append(
            f"the logloss on {rows} is {gate.new[LOSS]:.5f}, {increase:.5f} (standard error {error:.5f}) above the "
            f"old model's; {settings.max_logloss_increase:g} is allowed"
        )
    return found


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
