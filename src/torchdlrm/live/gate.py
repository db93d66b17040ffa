"""How well the models of a period predict, and whether the new one is published.

In: a log and the bundle of the previous model, which the log has taught nothing yet; then rows of it that were held
back from learning, and the candidate's bundle.  Out: `scores.parquet`, a row for each row of the log in its order:
labels, weight (if rows have one), `prediction`, `logit` and `has_unknown` (whether a value of the row has no id), of a
bad row all null; metrics, and a `GateRecord`.  Of several labels each has a prediction and a logit, and models are
judged by each.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SPLIT_NAMES, RandomSplit
from torchdlrm.errors import LogError
from torchdlrm.evaluation.split_rows import predict_by_bundle
from torchdlrm.exporting.recalibrate import JUDGED
from torchdlrm.features.columns import LabelColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.judged import Judged
from torchdlrm.judging.reliability import rows_of
from torchdlrm.live.record import GateRecord, JudgedLabel, PeriodMetrics, ProgressiveMetrics
from torchdlrm.live.settings import GateSettings
from torchdlrm.logs.files import LogFile
from torchdlrm.metrics import LOSS, METRICS, metrics_in, metrics_of
from torchdlrm.prediction.files import HAS_UNKNOWN_COLUMN, predict_file
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.prediction.scores_out import LOGIT_COLUMN
from torchdlrm.progress import ProgressListener

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
        return period_metrics(_judged_scores(rows, schema, schema.label)) if rows.height else None

    # One after the other: each takes gigabytes where a log has 100 million rows.
    return ProgressiveMetrics(
        all=period_metrics(_judged_scores(scores, schema, schema.label)),
        known=of(scores.filter(~pl.col(HAS_UNKNOWN_COLUMN))),
        unseen=of(scores.filter(HAS_UNKNOWN_COLUMN)),
        labels={label.name: period_metrics(_judged_scores(scores, schema, label)) for label in schema.learnt[1:]},
    )


def _judged_scores(scores: pl.DataFrame, schema: FeatureSchema, label: LabelColumn) -> Judged:
    """Scores, as `read_scores` gives them, with one of the labels."""
    logit = LOGIT_COLUMN if label == schema.label else f"{LOGIT_COLUMN}_{label.name}"
    weights = None if schema.weight is None else scores[schema.weight.name].to_numpy()
    return Judged.of(scores[label.name].to_numpy(), scores[logit].to_numpy(), weights)


def period_names() -> list[str]:
    """What `period_metrics` has, in its order."""
    ends = {metric.name: ("", *_ENDS) if metric.influence else ("",) for metric in metrics_in("table")}
    return ["rows", "clicks", *(f"{name}{end}" for name in ends for end in ends[name])]


def period_metrics(judged: Judged) -> PeriodMetrics:
    """What a live model keeps of rows: their metrics, and the intervals of those whose standard error is known."""
    values = metrics_of(judged).as_json()
    found: PeriodMetrics = {"rows": values["rows"], "clicks": int(np.count_nonzero(judged.labels))}
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
    names, found = [label.name for label in schema.learnt], dict[str, JudgedLabel]()
    predictions = predict_by_bundle(candidate, dataset, "val", progress, phase="gate").by_label(names)
    held_back = None if scores is None else _held_back(read_scores(scores, schema), dataset)[kept]
    for label, of in zip(schema.learnt, predictions.values(), strict=True):
        after = rows_of(Judged.of(*of), kept)
        before = None if held_back is None else _judged_scores(held_back, schema, label)
        if before is not None and not np.array_equal(before.labels, after.labels):
            raise LogError(
                f"{scores}: its rows are not those of {dataset.path}: the log has changed meanwhile; give `restart`"
            )
        found[label.name] = judged_label(before, after)
    reasons = tuple(objections(found, settings))
    return GateRecord(**dict(found.pop(names[0])), passed=not reasons, reasons=reasons, labels=found)


def judged_label(before: Judged | None, after: Judged) -> JudgedLabel:
    """What a candidate is judged by: how it predicts rows, and how the previous model does, if there is one."""
    change = (math.nan, math.nan) if before is None else METRICS[LOSS].difference(before, after)
    increase, increase_error, *_ = map(_defined, change)
    return JudgedLabel(
        rows=after.labels.size,
        old=None if before is None else period_metrics(before),
        new=period_metrics(after),
        calibration_standard_error=_defined(METRICS["calibration"].estimate(after).standard_error),
        logloss_increase=increase,
        logloss_increase_standard_error=increase_error,
    )


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


def objections(found: Mapping[str, JudgedLabel], settings: GateSettings) -> Iterator[str]:
    """Yield why a model is not published, by any label: what is outside a limit by more than two standard errors.

    That of a calibration is taken relative to it, on the scale of its logarithm: of few clicks it is as large as the
    calibration itself, and still a log without its clicks must not look like one with few rows. A standard error
    that is not known counts as 0. Rows of one class judge no model by the first label; of another one, which may be
    rare, they are surely wrong where a Poisson count of what is expected is above 0 by two standard errors.
    """
    low, high = settings.calibration
    for place, (label, judged) in enumerate(found.items()):
        rows = f"{judged.rows:,} held-back rows" + f" (label {label})" * (len(found) > 1)
        clicks, calibration = judged.new["clicks"], judged.new["calibration"]
        error = judged.calibration_standard_error or 0.0
        if clicks in (0, judged.rows):
            # A model gives them the probability exp(-rows * logloss), that of none where so many are expected.
            expected = judged.rows * max(of[LOSS] or 0.0 for of in (judged.old, judged.new) if of) / high
            but = f", and at least {expected:.1f} {'others' if clicks else 'clicks'} were expected" * (place > 0)
            if place == 0 or expected > _STANDARD_ERRORS**2:
                yield f"{'all' if clicks else 'none'} of the {rows} were clicked{but}: rows of one class judge no model"
        elif calibration is None:
            yield f"the clicks of the {rows} have no weight, so the calibration is not known"
        else:
            factor = math.exp(_STANDARD_ERRORS * error / calibration) if calibration else 1.0
            if calibration * factor < low or calibration / factor > high:
                yield (
                    f"the calibration on {rows} is {calibration:.4f} (standard error {error:.4f}), outside {low:g} to "
                    f"{high:g}"
                )
        increase, error = judged.logloss_increase, judged.logloss_increase_standard_error or 0.0
        if increase is not None and increase - _STANDARD_ERRORS * error > settings.max_logloss_increase:
            yield (
                f"the logloss on {rows} is {judged.new[LOSS]:.5f}, {increase:.5f} (standard error {error:.5f}) above "
                f"the old model's; {settings.max_logloss_increase:g} is allowed"
            )


def _defined(value: float) -> float | None:
    return None if math.isnan(value) else value
