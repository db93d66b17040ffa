"""Exports a run to a bundle, and ends by checking it.

In: a run and the dataset it was trained on.  Out: the bundle's folder, complete and checked, or nothing.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from torchdlrm.bundle import DensePrecision, TablePrecision, check_model_name
from torchdlrm.bundle.apply import DELTA_NAMES, FULL_NAME, write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.check import Agreement, compare, tolerance
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import (
    MANIFEST_NAME,
    SAMPLE_NAME,
    WEIGHTS_NAME,
    WITH_RECALIBRATION,
    BundleManifest,
    CheckRecord,
    Origin,
    ServedFeature,
    StoredFile,
    oldest_version,
)
from torchdlrm.bundle.precision import Tolerance
from torchdlrm.bundle.sample import PREDICTION_COLUMN, raw_sample
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.weights_file import BLOCK_BYTES
from torchdlrm.bundle.write import (
    complete_folder,
    copy_vocabularies,
    require_space,
    weights_bytes,
    write_weights,
)
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import BundleError, DatasetError, RunError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.complete import require_same
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.exporting.recalibrate import check_recalibration, recalibrations_of
from torchdlrm.exporting.sensitivity import SENSITIVITY_ROWS, PrecisionSearch, choose_precisions
from torchdlrm.features.encode import ValueLookup, encode
from torchdlrm.features.tables import Table
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.model_class import ModelClass, record_of, reported
from torchdlrm.progress import SILENT, ProgressListener, watched
from torchdlrm.storage import mirror, places
from torchdlrm.training.checkpoint import ChosenCheckpoint, checkpoint_path, find_checkpoint, find_damage
from torchdlrm.training.checkpoint_reader import CheckpointReader
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.run import Run

AUTO_LOGLOSS_INCREASE = 1e-4
# For a row. From here on bfloat16 about halves the time of a batch (docs/lab/predictions.md); smaller models predict
# half a million rows a second in float32, and what bfloat16 rounds away is more than int8 tables do.
MIN_BFLOAT16_MULTIPLY_ADDS = 200_000
_SAMPLE_ROWS = 256


def open_checkpoint(
    run: Run, name: str, progress: ProgressListener = SILENT
) -> tuple[ChosenCheckpoint, CheckpointReader]:
    """A run's checkpoint, checked, and which it is.

    Raises:
        RunError: the run has none of that name, or it is damaged.
    """
    chosen = find_checkpoint(run.checkpoints, name)
    path = checkpoint_path(run.checkpoints, chosen.step)
    if (damage := find_damage(path, progress)) is not None:
        raise RunError(damage)
    return chosen, CheckpointReader(path)


@dataclass(frozen=True)
class Exported:
    """A bundle, and why it is as it is.

    Attributes:
        bundle: opened.
        checkpoint: that it was made of.
        search: what tables cost and save, where they were chosen by it.
        dense_reason: why the arches may compute in what they do, for people.
        agreement: how near its predictions are to the checkpoint's; None where nothing was written.
        delta: what was written instead of the bundle, whose folder is gone then.
        was_complete: the same bundle was there already, and nothing was written.
    """

    bundle: Bundle
    checkpoint: ChosenCheckpoint
    search: PrecisionSearch | None
    dense_reason: str
    agreement: Agreement | None = None
    delta: Delta | None = None
    was_complete: bool = False


def export(
    run: Run | str | Path,
    out: str | Path,
    *,
    delta_to: str | Path | None = None,
    options: ExportOptions = ExportOptions(),  # noqa: B008 - frozen
    dataset: Dataset | str | Path | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    overwrite: bool = False,
    progress: ProgressListener | bool = True,
) -> Exported:
    """Write a bundle: one folder that predicts from raw rows.  Check that it predicts what the checkpoint predicts.

    Where the same weights were exported to `out` with the same options before, nothing is left to do.

    Args:
        run: a run or its folder, trained on any number of ranks.
        out: the bundle's folder; nothing else may be there.
        delta_to: the folder of a bundle; then `out` is a delta, by which `apply_delta` makes the bundle of that one.
            The model has its name, unless the options say another.
        options: what to export.
        dataset: what the run was trained on, or its folder; None: where it was then.
        model_class: that the run was trained with, where it was one of the user's.
        allow_changed_model_class: take it though its file has changed since.
        overwrite: export also where a bundle or a delta is there; it is replaced when the new one is complete.
        progress: receives the bytes and rows done. True draws a bar on a terminal, and writes lines in a notebook;
            False is silent.

    Raises:
        ConfigError: the name cannot be a model's, or there is no such model class or feature.
        RunError: the run has no such checkpoint, it is damaged, or of another model class; or its dataset has moved.
        DatasetError: the dataset is damaged, or has no rows to check with.
        BundleError: `out` cannot be written or holds something else, the bundle predicts other than its precision
            explains, a recalibration is not better by more than chance, or `delta_to` is damaged.
    """
    with watched(progress) as listener:
        write = partial(
            _export,
            run,
            dataset=dataset,
            model_class=model_class,
            allow_changed_model_class=allow_changed_model_class,
            progress=listener,
        )
        if delta_to is None:
            return write(places.located(out), options=options, overwrite=overwrite)
        base = Bundle.open(places.located(delta_to), progress=listener)
        with complete_folder(places.located(out), DELTA_NAMES, overwrite=overwrite) as folder:
            full = folder / FULL_NAME
            exported = write(full, options=replace(options, name=options.name or base.name), overwrite=False)
            write_delta(base.path, full, folder, listener)
            shutil.rmtree(full)
        return replace(exported, delta=Delta.open(places.located(out)))


@silenced_libraries()
def _export(
    run: Run | str | Path,
    out: Path,
    *,
    options: ExportOptions,
    dataset: Dataset | str | Path | None,
    model_class: ModelClass | None,
    allow_changed_model_class: bool,
    overwrite: bool,
    progress: ProgressListener,
) -> Exported:
    run = run if isinstance(run, Run) else Run.open(run)
    if not isinstance(dataset, Dataset):
        dataset = run.open_dataset(dataset)
    name = options.name or out.resolve().name
    check_model_name(name)
    check_recalibration(dataset, options)
    split = held_out_split(dataset)
    mirror.settle(out, MANIFEST_NAME)
    chosen, checkpoint = open_checkpoint(run, options.checkpoint, progress)
    shape = run.shape(dataset, model_class, allow_changed_model_class=allow_changed_model_class)
    model = CheckpointModel(checkpoint, shape)
    if options.precision == "auto":
        with reported(shape.architecture):
            search = _search(model, dataset, options, progress)
        precisions = {column.name: search.precisions[column.owner] for column in dataset.schema.sparse}
    else:
        search, precisions = None, dict.fromkeys(dataset.sparse_names, options.precision)
    dense_precision, reason = _dense_precision(shape, options, precisions)
    by_key = {table.table_key: precisions[table.feature] for table in model.tables}
    about = {"name": name, "dense_precision": dense_precision, **_about(run, dataset, shape, chosen)}
    if os.path.lexists(out) and not overwrite:
        check_rows, is_auto = min(options.check_rows, dataset.splits[split].rows), options.dense_precision == "auto"
        wanted = about | {"recalibrated": (options.recalibrate, options.recalibrate_by)}
        require_same(out, wanted, check_rows, checkpoint, by_key, may_be_float32=is_auto)
        bundle = Bundle.open(out, model_class=model_class, verify="lazy")
        if bundle.manifest.dense_precision != dense_precision:
            reason = "as it was exported"
        return Exported(bundle, chosen, search, reason, was_complete=True)
    with reported(shape.architecture), complete_folder(out, overwrite=overwrite) as folder:
        require_space(folder, weights_bytes(checkpoint, by_key))
        stored, block_sha256 = write_weights(checkpoint, by_key, folder / WEIGHTS_NAME, progress)
        vocabularies = copy_vocabularies(dataset, folder)
        files = {WEIGHTS_NAME: stored}
        files |= {path: StoredFile.of(folder / path) for paths in vocabularies.values() for path in paths}
        manifest = BundleManifest(
            **about,
            sparse={
                feature: ServedFeature(
                    num_embeddings=num_embeddings,
                    precision=precisions[feature],
                    vocabulary=vocabularies[feature][0] if feature in vocabularies else None,
                    index=vocabularies[feature][1] if feature in vocabularies else None,
                )
                for feature, num_embeddings in dataset.num_embeddings.items()
            },
            format_version=oldest_version(
                dataset.schema,
                run.config.model,
                record_of(shape.architecture),
                dataset.period,
                has_groups=bool(about["groups"]),
                has_never_missing=any(fitted.never_missing for fitted in dataset.manifest.dense.values()),
            ),
            check=None,
            files=files,
            block_bytes=BLOCK_BYTES,
            block_sha256=block_sha256,
        )
        manifest.write(folder)
        bundle = Bundle.open(folder, model_class=model_class, progress=progress)
        served, record, agreement, failure = _check(bundle, model, dataset, split, options, progress)
        if failure is not None:
            dense_precision, reason = "float32", failure
        elif served.dense_precision != dense_precision:
            reason += f"; here float32: {served.precision.reason}"
        served.recalibrations = recalibrations_of(served, dataset, options, progress)
        _write_sample(dataset, split, bundle, served)
        files[SAMPLE_NAME] = StoredFile.of(folder / SAMPLE_NAME)
        update = {"check": record, "files": files, "dense_precision": dense_precision}
        if served.recalibrations:
            first, *others = dataset.schema.learnt
            update |= {
                "recalibration": served.recalibrations if others else served.recalibrations[first.name],
                "format_version": max(manifest.format_version, WITH_RECALIBRATION),
            }
        manifest.model_copy(update=update).write(folder)
    opened = Bundle.open(out, model_class=model_class, verify="lazy")
    return Exported(opened, chosen, search, reason, agreement)


def _about(run: Run, dataset: Dataset, shape: ModelShape, chosen: ChosenCheckpoint) -> dict[str, Any]:
    """What the manifest says of the model, whatever it is called and whatever its precisions are."""
    return {
        "feature_schema": dataset.schema,
        "dense": {column.name: dataset.manifest.dense[column.name] for column in dataset.schema.dense},
        "model": run.config.model.as_served,
        "model_class": record_of(shape.architecture),
        "groups": tuple(Table(of.feature, of.dim, of.group) for of in shape.architecture.tables(shape.features)),
        "period": dataset.period,
        "source": Origin(
            run=run.path.resolve().name,
            step=chosen.step,
            checkpoint=chosen.kind,
            dataset_sha256=run.environment["dataset"]["manifest_sha256"],
            versions={name: run.environment[name] for name in ("torchdlrm", "torch", "torchrec", "fbgemm_gpu")},
        ),
    }


def _check(
    bundle: Bundle,
    model: CheckpointModel,
    dataset: Dataset,
    split: str,
    options: ExportOptions,
    progress: ProgressListener,
) -> tuple[ServedModel, CheckRecord, Agreement, str | None]:
    """The model as it will be served, how it predicts, and why it is not in bfloat16 where it might have been."""
    precisions = [record.precision for record in bundle.manifest.sparse.values()]

    def judged(served: ServedModel) -> tuple[CheckRecord, Agreement]:
        progress.start_phase("check", min(options.check_rows, dataset.splits[split].rows))
        return compare(
            rows_of_split(dataset, split, options.check_rows),
            dataset.schema,
            split=split,
            checkpoint=model.logits,
            rounded=None if set(precisions) == {"float32"} else partial(model.logits, precisions=precisions),
            in_float32=None if served.dense_precision == "float32" else ServedModel(bundle, "float32").logits,
            bundle=served.logits,
            allowed=_allowed(options, precisions, served.dense_precision),
            progress=progress,
        )

    served = ServedModel(bundle)
    try:
        return served, *judged(served), None
    except BundleError as error:
        if options.dense_precision != "auto" or served.dense_precision == "float32":
            raise
        failure = str(error).partition("; ")[0]
    served = ServedModel(bundle, "float32")
    return served, *judged(served), failure


def _search(
    model: CheckpointModel, dataset: Dataset, options: ExportOptions, progress: ProgressListener
) -> PrecisionSearch:
    # The rows of the check stay unseen where there are others.
    split = "val" if dataset.splits["val"].rows else held_out_split(dataset)
    return choose_precisions(
        model,
        rows_of_split(dataset, split, min(options.check_rows, SENSITIVITY_ROWS)),
        dataset.schema,
        dataset.table_rows,
        max_logloss_increase=_max_increase(options),
        progress=progress,
    )


def _max_increase(options: ExportOptions) -> float:
    return AUTO_LOGLOSS_INCREASE if options.max_logloss_increase is None else options.max_logloss_increase


def _dense_precision(
    shape: ModelShape, options: ExportOptions, precisions: Mapping[str, TablePrecision]
) -> tuple[DensePrecision, str]:
    """What the arches may compute in, and why."""
    if options.dense_precision != "auto":
        return options.dense_precision, "as asked"
    if set(precisions.values()) == {"float32"}:
        return "float32", "so that predictions equal the checkpoint's, as with float32 tables they can"
    if shape.multiply_adds < MIN_BFLOAT16_MULTIPLY_ADDS:
        return "float32", "the arches are small: float32 is fast enough, and more exact"
    return "bfloat16", "where the processor has it"


def _allowed(
    options: ExportOptions, precisions: Sequence[TablePrecision], dense_precision: DensePrecision
) -> Tolerance:
    allowed = tolerance(precisions, dense_precision)
    if options.max_logloss_increase is None and options.precision != "auto":
        return allowed
    return replace(allowed, logloss_increase=_max_increase(options))


def _write_sample(dataset: Dataset, split: str, bundle: Bundle, model: ServedModel) -> None:
    encoded = next(rows_of_split(dataset, split, 4 * _SAMPLE_ROWS))
    raw = raw_sample(encoded, bundle.schema, bundle.dense, trained_vocabularies(dataset, bundle), max_rows=_SAMPLE_ROWS)
    rows = encode(raw, bundle.schema, bundle.dense, bundle.vocabularies)
    predictions = model.predict(EncodedRows.from_frame(rows, bundle.schema))
    own = bundle.schema.by_label(predictions, PREDICTION_COLUMN)
    raw.with_columns(pl.Series(name, values) for name, values in own.items()).write_parquet(bundle.path / SAMPLE_NAME)


def trained_vocabularies(dataset: Dataset, bundle: Bundle) -> dict[str, ValueLookup]:
    """What gave values their ids in training, by sparse feature that is not hashed; where it is none, the bundle's."""
    return {
        name: served if dataset.manifest.sparse[name].vocabulary is None else dataset.vocabulary(name)
        for name, served in bundle.vocabularies.items()
    }


def held_out_split(dataset: Dataset) -> str:
    """`test`, or `val` where there is none, or `train` where nothing was held out.

    Raises:
        DatasetError: the dataset has no rows.
    """
    for name in ("test", "val", "train"):
        if name in dataset.splits and dataset.splits[name].rows:
            return name
    msg = f"{dataset.path}: the dataset has no rows to check the bundle on"
    raise DatasetError(msg)
