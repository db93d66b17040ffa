"""Decides whether a new model is published: on rows of the period that were held back from learning.

In: the scores of the model of before, the held-back rows as the dataset has them, the candidate's bundle.  Out: a
`GateRecord`.
"""

from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SPLIT_NAMES, RandomSplit
from torchdlrm.errors import LogError
from torchdlrm.exporting.export import held_out_rows
from torchdlrm.live.record import GateRecord, PeriodMetrics
from torchdlrm.live.scores import metrics_of, period_metrics, read_scores
from torchdlrm.live.settings import GateSettings
from torchdlrm.progress import ProgressListener


def judge(
    candidate: Bundle, dataset: Dataset, scores: Path | None, settings: GateSettings, progress: ProgressListener
) -> GateRecord:
    """Compare a candidate with the model of before.

    Args:
        candidate: what may be published.
        dataset: of the period; the rows of its val split were held back, at random.
        scores: of the whole log by the model of before, as `score_log` writes them; None for the first period.
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
    old = None
    if scores is not None:
        held_back = _held_back(read_scores(scores, schema), dataset)
        if not np.array_equal(held_back[schema.label.name].to_numpy(), labels):
            msg = f"{scores}: its rows are not those of {dataset.path}: the log has changed meanwhile; give `restart`"
            raise LogError(msg)
        old = metrics_of(held_back, schema)
    reasons = tuple(_objections(old, new, settings))
    return GateRecord(rows=rows, old=old, new=new, passed=not reasons, reasons=reasons)


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


def _objections(old: PeriodMetrics | None, new: PeriodMetrics, settings: GateSettings) -> list[str]:
    """Sentences that say why a model is not published."""
    found = []
    low, high = settings.calibration
    if new.calibration is None:
        found.append(f"none of the {new.rows:,} held-back rows was clicked, so the calibration is not known")
    elif not low <= new.calibration <= high:
        found.append(
            f"the calibration on {new.rows:,} held-back rows is {new.calibration:.4f}, outside {low:g} to {high:g}"
        )
    if old is None or old.logloss is None or new.logloss is None:
        return found
    increase = new.logloss - old.logloss
    if increase > settings.max_logloss_increase:
        found.append(
            f"the logloss on {new.rows:,} held-back rows is {new.logloss:.5f}, {increase:.5f} above the old model's "
            f"{old.logloss:.5f}; {settings.max_logloss_increase:g} is allowed"
        )
    return found
