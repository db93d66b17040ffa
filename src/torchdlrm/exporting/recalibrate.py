"""Recalibrates a served model by rows that it has not learnt from, where others show that this makes it better.

In: a served model, the dataset of its run.  Out: a `Recalibration` of each label for its bundle, or why there is none.
"""

import numpy as np
from numpy.typing import NDArray

from torchdlrm.bundle.served_model import ServedModel, predict_by_model
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import BundleError, ConfigError, DatasetError
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.judged import Judged
from torchdlrm.judging import RecalibrationMethod
from torchdlrm.judging.recalibration import Recalibration, Verdict, fit
from torchdlrm.judging.reliability import rows_of
from torchdlrm.progress import ProgressListener

# Where no split is left to judge a recalibration on, every other row of the one that there is.
FITTED, JUDGED = slice(0, None, 2), slice(1, None, 2)
_Ids = NDArray[np.integer] | None  # of the feature whose frequent values have maps of their own


def check_recalibration(dataset: Dataset, options: ExportOptions) -> None:
    """See that a model can be recalibrated as the options say.

    Raises:
        ConfigError: the options do not go together, or there is no such feature.
        DatasetError: all rows were learnt from.
    """
    by, features = options.recalibrate_by, [c.name for c in dataset.schema.sparse if not c.is_multi_valued]
    if by is not None and (options.recalibrate is None or by not in features):
        wrong = "needs `recalibrate`" if options.recalibrate is None else f"{by} is none of {', '.join(features)}"
        raise ConfigError(f"`recalibrate_by`: {wrong}")
    if options.recalibrate is not None and not _held_out(dataset):
        msg = f"`recalibrate`: {dataset.path} has only rows that were learnt from; preprocess it with a val split"
        raise DatasetError(msg)


def recalibrations_of(
    model: ServedModel, dataset: Dataset, options: ExportOptions, progress: ProgressListener
) -> dict[str, Recalibration]:
    """A recalibration of each label, fitted on the val split and judged on the test split, as the options say.

    Where one of them is empty, every other row of the other one is for the one, and the rest for the other. Labels that
    are left out are those whose probabilities it does not improve, of which the listener hears.

    Raises:
        BundleError: it is better for no label by more than chance, and may not be left out.
    """
    method, by, schema = options.recalibrate, options.recalibrate_by, dataset.schema
    if method is None:
        return {}
    rows = {label.name: dict[str, tuple[Judged, _Ids]]() for label in schema.learnt}
    for split in _held_out(dataset):
        names = [*schema.target_names, *([] if by is None else [by])]
        logits, *columns = predict_by_model(model, dataset, split, names, progress, phase=f"recalibrate: {split}")
        ids, name = None if by is None else columns.pop(), f"{len(logits):,} rows of {split}"
        for labels, (label, of) in zip(columns, schema.by_label(logits).items(), strict=False):
            rows[label][name] = Judged.of(labels, of, *columns[len(rows) :]), ids
    found, reasons = dict[str, Recalibration](), []
    for label, of_label in rows.items():
        if isinstance(one := _recalibration(of_label, method, by), str):
            reasons.append(f"{label}: {one}" if len(rows) > 1 else one)
        else:
            found[label] = one
    if not (found or options.recalibrate_if_better):
        raise BundleError(f"`recalibrate`: {'; '.join(reasons)}; export without it")
    for why in reasons:
        progress.note(f"not recalibrated: {why}")
    return found


def _recalibration(
    rows: dict[str, tuple[Judged, _Ids]], method: RecalibrationMethod, by: str | None
) -> Recalibration | str:
    """That of a label, or why there is none."""
    if len(rows) == 1:
        ((name, (judged, ids)),) = rows.items()
        halves = {f"half of {name}": FITTED, f"the other half of {name}": JUDGED}
        rows = {of: (rows_of(judged, part), None if ids is None else ids[part]) for of, part in halves.items()}
    (fitted_on, (fitted, ids)), (judged_on, (before, other_ids)) = rows.items()
    found = fit(fitted, method, by, ids)
    if found is None or before.sums.rows < 2 or before.sums.weight <= 0:
        return f"on {fitted_on} more clicks do not go with higher predictions: no recalibration helps"
    ids_of = (lambda _: None) if other_ids is None else other_ids.__getitem__
    pieces = [found.apply(before.logits[block], ids_of(block)) for block in before.blocks()]
    after = Judged.of(before.labels, np.concatenate(pieces), before.weights)
    verdict = Verdict.of(f"{judged_on} (fitted on {fitted_on})", before, after)
    better = found.model_copy(update={"verdict": verdict})
    return better if verdict.is_better else f"{found} is not better by more than chance: {verdict}"


def _held_out(dataset: Dataset) -> list[str]:
    return [name for name in ("val", "test") if name in dataset.splits and dataset.splits[name].rows]
