"""Recalibrates a served model by rows that it has not learnt from, where others show that this makes it better.

In: a served model, the dataset of its run.  Out: a `Recalibration` for its bundle, or why there is none.
"""

import numpy as np
from numpy.typing import NDArray

from torchdlrm.bundle.served_model import ServedModel, predict_by_model
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import BundleError, ConfigError, DatasetError
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.judged import Judged
from torchdlrm.judging.recalibration import Recalibration, Verdict, fit
from torchdlrm.judging.reliability import rows_of
from torchdlrm.progress import ProgressListener

# Where no split is left to judge a recalibration on, every other row of the one that there is.
FITTED, JUDGED = slice(0, None, 2), slice(1, None, 2)


def check_recalibration(dataset: Dataset, options: ExportOptions) -> None:
    """See that a model can be recalibrated as the options say.

    Raises:
        ConfigError: the options do not go together, or there is no such feature.
        DatasetError: all rows were learnt from.
    """
    by, features = options.recalibrate_by, [c.name for c in dataset.schema.sparse if not c.is_multi_valued]
    if by is not None and (options.recalibrate is None or by not in features):
        wrong = "needs `recalibrate`" if options.recalibrate is None else f"{by} is none of {', '.join(features)}"
        msg = f"`recalibrate_by`: {wrong}"
        raise ConfigError(msg)
    if options.recalibrate is not None and not _held_out(dataset):
        msg = f"`recalibrate`: {dataset.path} has only rows that were learnt from; preprocess it with a val split"
        raise DatasetError(msg)
    if options.recalibrate is not None and len(dataset.schema.learnt) > 1:
        raise ConfigError("`recalibrate`: is for a model of one label, and this one has learnt several")


def recalibration_of(
    model: ServedModel, dataset: Dataset, options: ExportOptions, progress: ProgressListener
) -> Recalibration | None:
    """A recalibration that was fitted on the val split and judged on the test split, as the options say.

    Where one of them is empty, every other row of the other one is for the one, and the rest for the other. None where
    it is not asked for, or may be left out and is, of which the listener hears.

    Raises:
        BundleError: it is not better by more than chance.
    """
    method, by = options.recalibrate, options.recalibrate_by
    if method is None:
        return None
    rows: dict[str, tuple[Judged, NDArray[np.integer] | None]] = {}
    for split in _held_out(dataset):
        names = [*dataset.schema.target_names, *([] if by is None else [by])]
        columns = predict_by_model(model, dataset, split, names, progress, phase=f"recalibrate: {split}")
        ids = None if by is None else columns.pop()
        logits, labels, *weights = columns
        rows[f"{labels.size:,} rows of {split}"] = Judged.of(labels, logits, *weights), ids
    if len(rows) == 1:
        ((name, (judged, ids)),) = rows.items()
        halves = {f"half of {name}": FITTED, f"the other half of {name}": JUDGED}
        rows = {of: (rows_of(judged, part), None if ids is None else ids[part]) for of, part in halves.items()}
    (fitted_on, (fitted, ids)), (judged_on, (before, other_ids)) = rows.items()
    found = fit(fitted, method, by, ids)
    why = f"on {fitted_on} more clicks do not go with higher predictions: no recalibration helps"
    if found is not None and before.sums.rows > 1 and before.sums.weight > 0:
        ids_of = (lambda _: None) if other_ids is None else other_ids.__getitem__
        pieces = [found.apply(before.logits[block], ids_of(block)) for block in before.blocks()]
        after = Judged.of(before.labels, np.concatenate(pieces), before.weights)
        verdict = Verdict.of(f"{judged_on} (fitted on {fitted_on})", before, after)
        if verdict.is_better:
            return found.model_copy(update={"verdict": verdict})
        why = f"{found} is not better by more than chance: {verdict}"
    if not options.recalibrate_if_better:
        msg = f"`recalibrate`: {why}; export without it"
        raise BundleError(msg)
    progress.note(f"not recalibrated: {why}")
    return None


def _held_out(dataset: Dataset) -> list[str]:
    return [name for name in ("val", "test") if name in dataset.splits and dataset.splits[name].rows]
