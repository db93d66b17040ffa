"""Decides whether a new model is published: on rows of the period that were held back from learning.

In: the scores of the previous model, the held-back rows as the dataset has them, the candidate's bundle.  Out: a
`GateRecord`.
"""

import math
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SPLIT_NAMES, RandomSplit
from torchdlrm.errors import LogError
from torchdlrm.evaluation.compare import calibration_standard_error, paired_difference
from torchdlrm.exporting.export import held_out_rows
from torchdlrm.live.record import GateRecord
from torchdlrm.live.scores import metrics_of, period_metrics, read_scores
from torchdlrm.live.settings import GateSettings
from torchdlrm.metrics import LOSS
from torchdlrm.prediction.files import LOGIT_COLUMN
from torchdlrm.progress import ProgressListener

_STANDARD_ERRORS = 2.0  # outside a limit by this many is not chance


def judge(
    candidate: Bundle, dataset: Dataset, scores: Path | None, settings: GateSettings, progress: ProgressListener
) -> GateRecord:
    """Compare a candidate with the previous model.

    Args:
        candidate: what may be published.
        dataset: of the period; the rows of its val split were held back, at random.
        scores: of the whole log by the previous model, as `score_log` writes them; None for the first period.
        settings: the limits.
        progress: receives the rows predicted.

    Raises:
        LogError: the log was another one when it was scored.
    """
    rows = dataset.splits["val"].rows
    model, schema = ServedModel(candidate), dataset.schema
    progress.start_phase("gate", rows)
    pieces = []
    for frame in held_out_rows(dataset, "val", rows):
        logits = model.logits(EncodedRows.from_frame(frame, schema))
        pieces.append([*(frame[name].to_numpy() for name in schema.target_names), logits])
        progress.advance(frame.height)
    *targets, logits = map(np.concatenate, zip(*pieces, strict=True))
    labels, *weights = targets
    new = period_metrics(labels, logits, *weights)
    old = increase = increase_error = None
    if scores is not None:
        held_back = _held_back(read_scores(scores, schema), dataset)
        if not np.array_equal(held_back[schema.label.name].to_numpy(), labels):
            msg = f"{scores}: its rows are not those of {dataset.path}: the log has changed meanwhile; give `restart`"
            raise LogError(msg)
        old = metrics_of(held_back, schema)
        difference = paired_difference(labels, held_back[LOGIT_COLUMN].to_numpy(), logits, *weights)
        increase, increase_error = _defined(difference.logloss), _defined(difference.logloss_standard_error)
    gate = GateRecord(
        rows=rows,
        old=old,
        new=new,
        calibration_standard_error=_defined(calibration_standard_error(labels, logits, *weights)),
        logloss_increase=increase,
        logloss_increase_standard_error=increase_error,
        passed=True,
        reasons=(),
    )
    reasons = tuple(objections(gate, settings))
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


def objections(gate: GateRecord, settings: GateSettings) -> list[str]:
    """Sentences that say why a model is not published: what is outside a limit by more than two standard errors.

    That of a calibration is taken relative to it, on the scale of its logarithm: of few clicks it is as large as the
    calibration itself, and still a log without its clicks must not look like one with few rows. A standard error
    that is not known counts as 0.
    """
    found, rows, clicks = [], f"{gate.rows:,} held-back rows", gate.new["clicks"]
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
