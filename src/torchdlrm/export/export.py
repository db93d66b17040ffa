"""A run -> a bundle, which ends by checking itself.

In: a run and the dataset it was trained on.  Out: the bundle's folder, whole and checked, or nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from torchdlrm.data.dataset import Dataset
from torchdlrm.data.transforms import encode
from torchdlrm.errors import RunError
from torchdlrm.export.bundle import PREDICTION_COLUMN, Bundle
from torchdlrm.export.check import compare, tolerance
from torchdlrm.export.checkpoint_model import CheckpointModel
from torchdlrm.export.checkpoint_reader import CheckpointReader
from torchdlrm.export.encoded_rows import EncodedRows
from torchdlrm.export.held_out import held_out_rows, held_out_split
from torchdlrm.export.manifest import (
    MANIFEST_NAME,
    SAMPLE_NAME,
    WEIGHTS_NAME,
    BundleManifest,
    DensePrecision,
    FileRecord,
    SourceRecord,
    SparseRecord,
)
from torchdlrm.export.precision import TablePrecision
from torchdlrm.export.sample import raw_sample
from torchdlrm.export.served_model import ServedModel
from torchdlrm.export.weights_file import BLOCK_BYTES
from torchdlrm.export.write import (
    WrittenWeights,
    copy_vocabularies,
    file_record,
    require_space,
    weights_bytes,
    whole_folder,
    write_weights,
)
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.train.checkpoint import checkpoint_path, find_checkpoint, find_damage
from torchdlrm.train.run import Run

DEFAULT_CHECK_ROWS = 100_000
_SAMPLE_ROWS = 256


@dataclass(frozen=True)
class ExportOptions:
    """What to export.

    Attributes:
        name: the model's name, which the server shows.
        precisions: of each feature's table, in schema order.
        dense_precision: what the arches may compute in.
        checkpoint: `last`, `best` (of the val split) or a step.
        check_rows: predict at most so many held-out rows to check the bundle.
    """

    name: str
    precisions: Mapping[str, TablePrecision]
    dense_precision: DensePrecision = "float32"
    checkpoint: str = "last"
    check_rows: int = DEFAULT_CHECK_ROWS


def open_checkpoint(run: Run, name: str) -> tuple[int, CheckpointReader]:
    """A run's checkpoint, checked, and its step.

    Raises:
        RunError: the run has none of that name, or it is damaged.
    """
    step = find_checkpoint(run.checkpoints, name)
    path = checkpoint_path(run.checkpoints, step)
    damage = find_damage(path)
    if damage is not None:
        raise RunError(damage)
    return step, CheckpointReader(path)


def export(
    run: Run, dataset: Dataset, out: Path, options: ExportOptions, progress: ProgressListener = SILENT
) -> Bundle:
    """Write a bundle and check it.

    Args:
        run: trained before, on any number of ranks.
        dataset: what it was trained on.
        out: the bundle's folder; nothing may be there.
        options: what to export.
        progress: is told of bytes and rows.

    Raises:
        RunError: the run has no such checkpoint, or it is damaged.
        DatasetError: the dataset is damaged, or has no rows to check with.
        BundleError: `out` cannot be written, or the bundle predicts other than its precision explains.
    """
    split = held_out_split(dataset)
    step, checkpoint = open_checkpoint(run, options.checkpoint)
    with whole_folder(out) as folder:
        require_space(folder, weights_bytes(checkpoint, options.precisions))
        written = write_weights(checkpoint, options.precisions, folder / WEIGHTS_NAME, progress)
        vocabularies = copy_vocabularies(dataset, folder)
        files = {WEIGHTS_NAME: written.record}
        files |= {path: file_record(folder / path) for paths in vocabularies.values() for path in paths}
        manifest = _manifest(run, dataset, options, step, written, vocabularies, files)
        _write_manifest(folder, manifest)
        bundle = Bundle.open(folder, progress=progress)
        model = ServedModel(bundle)
        progress.start_phase("check", min(options.check_rows, dataset.splits[split].rows))
        record = compare(
            held_out_rows(dataset, split, options.check_rows),
            dataset.schema,
            split=split,
            checkpoint=CheckpointModel(checkpoint, run.config.model, dataset).logits,
            bundle=model.logits,
            allowed=tolerance(options.precisions.values(), options.dense_precision),
            progress=progress,
        )
        _write_sample(dataset, split, bundle, model)
        files[SAMPLE_NAME] = file_record(folder / SAMPLE_NAME)
        _write_manifest(folder, manifest.model_copy(update={"check": record, "files": files}))
    return Bundle.open(out, verify="lazy")


def _manifest(
    run: Run,
    dataset: Dataset,
    options: ExportOptions,
    step: int,
    written: WrittenWeights,
    vocabularies: Mapping[str, tuple[str, str]],
    files: dict[str, FileRecord],
) -> BundleManifest:
    environment = run.environment
    return BundleManifest(
        name=options.name,
        feature_schema=dataset.schema,
        dense={column.name: dataset.manifest.dense[column.name] for column in dataset.schema.dense},
        sparse={
            feature: SparseRecord(
                num_embeddings=num_embeddings,
                precision=options.precisions[feature],
                vocabulary=vocabularies[feature][0] if feature in vocabularies else None,
                index=vocabularies[feature][1] if feature in vocabularies else None,
            )
            for feature, num_embeddings in dataset.num_embeddings.items()
        },
        model=run.config.model,
        dense_precision=options.dense_precision,
        source=SourceRecord(
            run=run.path.resolve().name,
            step=step,
            dataset_sha256=environment["dataset"]["manifest_sha256"],
            versions={name: environment[name] for name in ("torchdlrm", "torch", "torchrec", "fbgemm_gpu")},
        ),
        check=None,
        files=files,
        block_bytes=BLOCK_BYTES,
        block_sha256=written.block_sha256,
    )


def _write_manifest(folder: Path, manifest: BundleManifest) -> None:
    (folder / MANIFEST_NAME).write_text(manifest.sealed().to_json(), encoding="utf-8")


def _write_sample(dataset: Dataset, split: str, bundle: Bundle, model: ServedModel) -> None:
    encoded = next(held_out_rows(dataset, split, 4 * _SAMPLE_ROWS))
    vocabularies = {
        name: dataset.vocabulary(name) if bundle.manifest.sparse[name].vocabulary is not None else lookup
        for name, lookup in bundle.vocabularies.items()
    }
    raw = raw_sample(encoded, bundle.schema, bundle.dense, vocabularies, max_rows=_SAMPLE_ROWS)
    rows = encode(raw, bundle.schema, bundle.dense, bundle.vocabularies)
    predictions = model.predict(EncodedRows.from_frame(rows, bundle.schema))
    raw.with_columns(pl.Series(PREDICTION_COLUMN, predictions)).write_parquet(bundle.path / SAMPLE_NAME)
