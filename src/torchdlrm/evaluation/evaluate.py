"""Evaluates predicted rows: exact metrics that count every row once, or as often as it weighs, and how sure each is."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchdlrm.config import DeviceChoice, ShardingConfig
from torchdlrm.errors import ConfigError, UserError
from torchdlrm.evaluation.pictures import picture_of
from torchdlrm.evaluation.predictions import OWN_COLUMNS, Asked, predicted_rows, write_predictions
from torchdlrm.judged import Judged
from torchdlrm.judging.slices import columns_of, slices
from torchdlrm.metrics import BinaryMetrics, estimates, first_and_others
from torchdlrm.prediction.scores_out import check_name
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage.places import located

if TYPE_CHECKING:
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.model.model_class import ModelClass
    from torchdlrm.training.run import Run


def evaluate(
    source: "Run | Bundle | str | Path",
    dataset: "Dataset | str | Path | None" = None,
    split: str = "test",
    *,
    group: str | None = None,
    predictions: str | Path | None = None,
    columns: Sequence[str] = (),
    label: str | None = None,
    weight: str | None = None,
    by: str | None = None,
    against: str | None = None,
    model_class: "ModelClass | None" = None,
    allow_changed_model_class: bool = False,
    checkpoint: str = "best",
    batch_size_global: int = 8192,
    device: DeviceChoice = "auto",
    sharding: ShardingConfig | None = None,
    pictures: bool = False,
    progress: ProgressListener | bool = True,
) -> dict[str, Any] | None:
    """Metrics of a model's weights over the rows of one split, or of several together, or of rows that were predicted.

    Works in this process and all others that torch's launcher has started with it. A process group that exists is used;
    where there is none, one is joined and left again. Process-wide settings are afterwards what they were.

    Args:
        source: a run, trained on any number of ranks; a bundle; the folder of a period of a live model, whose log the
            model before predicted; or a file of predictions. A folder, or what was opened.
        dataset: what it was trained on, or its folder; None where it is still where it was.
        split: `train`, `val` or `test`; several joined by + are judged together, as in `val+test`.
        group: a column of which rows with the same value depend on each other, as those of one user: intervals are
            those of groups, and there is a `gauc`.
        predictions: where to write the rows: .parquet, .csv or .csv.gz.
        columns: of the log, to be written with them.
        label: which of the labels that a run or a bundle has learnt is judged, the first when not given; of a file of
            predictions: the column of labels, `label` when not given.
        weight: of a file of predictions: the column of weights; `weight` when not given, where there is one.
        by: slices to judge: columns, and crossed ones, as in `cat_5,int_2,cat_5*int_2`.
        against: another split: which slices are predicted worse than there.
        model_class: that the run was trained with, where it is not the DLRM.
        allow_changed_model_class: take it though its file has changed since.
        checkpoint: `best` of the val split (the last where nothing was validated), `last`, or a step.
        batch_size_global: rows per forward pass over all ranks; does not change the result.
        device: where to compute, as `train.device` has it, whatever the run was trained on.
        sharding: how to spread the tables over the processes of this evaluation; `sharding_elsewhere` of the run's
            config when not given.
        pictures: whether the result has `pictures` too: what a page draws of the rows (`evaluation/pictures.py`).
        progress: receives the rows done on rank 0; True and False as for `train`.

    Returns:
        On rank 0 `label` and, of a run or a bundle, `split`, `step` and `checkpoint` (`best`, `last` or `step`: what it
        was chosen for); `rows`, `auc`, `logloss`, `ne`, `calibration`, `accuracy`, with groups `gauc` (None where not
        defined, as the AUC of rows of one label); `clicks`, of the rows; with groups how many `groups`; and
        `intervals`: by metric [low, high], which holds the true value 19 times in 20, None where it is not known; of
        several labels `labels`, the same for each of the others; with `by` also `slices`, as `Slice.as_json` has them,
        the one that is most surely predicted worse first. Elsewhere None.

    Raises:
        RunError: there is no such run, it is of another dataset or model class, or it lacks an undamaged checkpoint.
        DatasetError: the dataset, a split or a column is not there, or is empty.
        ConfigError: the GPUs that `device` demands are not there, the source does not know what was asked, or the
            machines of the evaluation were started with different arguments.
        PlanError: the tables do not fit the machine, or `sharding` asks for what it does not have.
        UserError: a file cannot be read or written.
    """
    out = None if predictions is None else located(predictions)
    if out is not None:
        check_name(out, "predictions")
    for name in {*columns} & {*OWN_COLUMNS}:
        raise UserError(f"`columns`: {name} is what a column of the predictions' own is called")
    if against is not None and by is None:
        raise ConfigError("`against`: compares slices; say with `by` which")
    asked = Asked(
        dataset=dataset,
        split=split,
        columns=list(dict.fromkeys([*columns, *(columns_of(by) if by else ())])),
        group=group,
        label=label,
        weight=weight,
        checkpoint=checkpoint,
        model_class=model_class,
        allow_changed_model_class=allow_changed_model_class,
        batch_size_global=batch_size_global,
        device=device,
        sharding=sharding,
    )
    with watched(progress) as listener:
        rows = predicted_rows(source, asked, listener)
        before = None if against is None else predicted_rows(source, replace(asked, split=against), listener)
    if rows is None:
        return None
    if out is not None:
        write_predictions(replace(rows, columns=rows.columns.select(c for c in columns if c not in rows.others)), out)
    judged = rows.judged
    result = {**rows.about, **first_and_others({"": judged, **rows.others}, _metrics)}
    if by is not None:
        was = None if before is None else (before.judged, before.columns)
        result["slices"] = [part.as_json() for part in slices(judged, rows.columns, by, before=was)]
    if pictures:
        result["pictures"] = picture_of(judged)
    return result


def _metrics(judged: Judged) -> dict[str, Any]:
    """All metrics of rows, what was counted, and intervals."""
    found = estimates(judged)
    metrics = BinaryMetrics(rows=judged.sums.rows, **{name: estimate.value for name, estimate in found.items()})
    counted = {"clicks": int(np.count_nonzero(judged.labels))}
    if judged.groups is not None:
        counted["groups"] = int(np.count_nonzero(np.bincount(judged.groups)))
    return {**metrics.as_json(), **counted, "intervals": {name: estimate.ends for name, estimate in found.items()}}
