"""Predicts the rows of a dataset's split by a run or by a bundle, and reads their columns as the log has them.

The machine need not be the one that trained, nor one that could: no state of an optimizer is kept, nothing is rounded
to send or multiply it faster, and the tables are planned again for the processes that are there.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.served_model import ServedModel, predict_by_model
from torchdlrm.config import Config, ShardingConfig
from torchdlrm.data.dataset import Dataset, rows_of_split
from torchdlrm.errors import ConfigError, DatasetError, RunError
from torchdlrm.evaluation.predictions import MOST_UNKNOWN, Asked, PredictedRows
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, WeightColumn
from torchdlrm.features.vocabulary import UNKNOWN_ID
from torchdlrm.judged import Judged
from torchdlrm.loader.loader import Loader
from torchdlrm.model.model_class import reported
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.toml import did_you_mean
from torchdlrm.training.checkpoint import ChosenCheckpoint, find_checkpoint
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.environment import manifest_sha256
from torchdlrm.training.pipeline import Predictions, predict_loaders
from torchdlrm.training.processes.agreement import Setting, Settings, settings_of
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.training.run import Run
from torchdlrm.training.sharded import build_empty_model

UNKNOWN_VALUE = "(unknown)"  # of a feature: its values without an id

_Column = DenseColumn | SparseColumn | LabelColumn | WeightColumn


def rows_of_run(run: Run | Path, asked: Asked, progress: ProgressListener) -> PredictedRows | None:
    """The rows of a split as a checkpoint of a run predicts them."""
    trained = run if isinstance(run, Run) else Run.open(run)
    encoded = trained.open_dataset(asked.dataset)
    chosen, predictions = predict_split(trained, encoded, asked, progress)
    return None if predictions is None else _rows(trained.path, encoded, asked, predictions, chosen)


def rows_of_bundle(bundle: Bundle | Path, asked: Asked, progress: ProgressListener) -> PredictedRows:
    """The rows of a split as a bundle predicts them."""
    if not isinstance(bundle, Bundle):
        how = (asked.model_class, asked.allow_changed_model_class)
        bundle = Bundle.open(bundle, model_class=how[0], allow_changed_model_class=how[1], progress=progress)
    encoded, source = dataset_of(bundle, asked.dataset), bundle.manifest.source
    check_columns(encoded, asked)
    predictions = predict_by_bundle(bundle, encoded, asked.split, progress)
    return _rows(bundle.path, encoded, asked, predictions, ChosenCheckpoint(source.step, source.checkpoint or "step"))


def dataset_of(bundle: Bundle, dataset: Dataset | str | Path | None) -> Dataset:
    """What the run of a bundle was trained on: this, or where the run was is found by its name; raises RunError."""
    source = bundle.manifest.source
    if dataset is None:
        place = bundle.path.resolve()
        of_live = place.parents[1] / "days" / place.name
        run = Run.find(source.run, [place.parent, Path(), of_live])
        if run is None:
            msg = f"{bundle.path}: was made of a run called {source.run!r}, which is neither beside it nor here, so "
            msg += "its dataset is not known; say with `dataset` where it is"
            raise RunError(msg)
        dataset = run.open_dataset()
    encoded = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    if manifest_sha256(encoded) != source.dataset_sha256:
        msg = f"`dataset`: {encoded.path} is not what the run of the bundle {bundle.path} was trained on"
        msg += " (its dataset.json differs), so the ids do not mean the same"
        raise RunError(msg)
    return encoded.with_labels([label.name for label in bundle.schema.learnt])


def predict_by_bundle(
    bundle: Bundle, dataset: Dataset, split: str, progress: ProgressListener, *, phase: str = "evaluate"
) -> Predictions:
    """Labels, logits and weights of a split's rows as a bundle predicts them; of L labels [N, L]."""
    model, targets = ServedModel(bundle), dataset.schema.target_names
    with reported(bundle.shape.architecture):
        logits, *found = predict_by_model(model, dataset, split, targets, progress, phase=phase)
    columns = [values.astype(np.float32) for values in found]
    num_labels = len(dataset.schema.learnt)
    labels = columns[0] if num_labels == 1 else np.stack(columns[:num_labels], axis=1)
    return Predictions(labels, logits, *columns[num_labels:])


def predict_split(
    run: Run, dataset: Dataset, asked: Asked, progress: ProgressListener = SILENT
) -> tuple[ChosenCheckpoint, Predictions | None]:
    """The checkpoint that was chosen, and on rank 0 the labels, logits and weights of a split, in its order."""
    check_columns(dataset, asked)
    shape = run.shape(dataset, asked.model_class, allow_changed_model_class=asked.allow_changed_model_class)
    config = run.config.model_copy(update={"sharding": asked.sharding or sharding_elsewhere(run.config)})

    def describe() -> Settings:
        same = {name: str(getattr(asked, name)) for name in ("split", "checkpoint", "batch_size_global")}
        ours = {f"`{name}`": Setting(value, value) for name, value in same.items()}
        return {**settings_of(config, dataset, shape.architecture, restart=False), **ours}

    with join_process_group(config.train.timeout_s, describe, device=asked.device, setting="`device`") as ranks:
        model = build_empty_model(config, shape, ranks=ranks)
        chosen = find_checkpoint(run.checkpoints, asked.checkpoint)
        listener = progress if ranks.is_first else SILENT
        Checkpointer(run.checkpoints, model, None, ranks).load(chosen.step, progress=listener)
        loaders = [
            Loader(
                dataset,
                name,
                batch_size_global=asked.batch_size_global,
                rank=ranks.rank,
                world_size=ranks.world_size,
                tables=shape.tables,
                pin_memory=ranks.device.type == "cuda",
                all_gather=ranks.all_gather,
            )
            for name in asked.split.split("+")
        ]
        listener.start_phase("evaluate", sum(loader.rows for loader in loaders))
        predictions = predict_loaders(model, loaders, ranks, listener).take(ranks)
        return chosen, None if predictions is None else _in_order(predictions, loaders, ranks.world_size)


def _in_order(predictions: Predictions, loaders: Sequence[Loader], world_size: int) -> Predictions:
    """The rows as they stand in their splits; they come rank by rank."""
    columns = [column for column in predictions if column is not None]
    ordered, taken = [np.empty_like(column) for column in columns], 0
    for rank in range(world_size):
        first = 0
        for loader in loaders:
            for rows in loader.rows_of(rank):
                here = slice(first + rows.start, first + rows.stop)
                for column, whole in zip(columns, ordered, strict=True):
                    whole[here] = column[taken : taken + len(rows)]
                taken += len(rows)
            first += loader.rows
    return Predictions(*ordered)


def sharding_elsewhere(config: Config) -> ShardingConfig:
    """How to spread a run's tables over another machine than the one that trained: without its rules, plan and sizes.

    What is kept says how much of a device is not for tables, and whether some may stay in host memory.
    """
    trained = config.sharding
    return ShardingConfig(reserved_fraction=trained.reserved_fraction, cache_fraction=trained.cache_fraction)


def check_columns(dataset: Dataset, asked: Asked) -> dict[str, _Column]:
    """The columns of a dataset, and that of the groups, by what was asked for: names in the log or in the schema.

    Raises:
        DatasetError: it does not have them, or what it has of the values makes no groups.
        ConfigError: a split is named twice, or the label is none of those that were learnt.
    """
    schema, splits = dataset.schema, asked.split.split("+")
    learnt = [column.name for column in schema.learnt]
    if asked.label not in {None, *learnt}:
        msg = f"`label`: {asked.label} was not learnt; there is {', '.join(learnt)}"
        raise ConfigError(msg + did_you_mean(asked.label or "", learnt))
    if len({*splits}) < len(splits):
        msg = f"`split`: {asked.split} names a split twice, and each row counts once; name each once"
        raise ConfigError(msg)
    for name in splits:
        Loader(dataset, name)  # refuses what is not there, or is empty
    stored = [column for column in (*schema.labels, schema.weight, *schema.dense, *schema.sparse) if column is not None]
    named: dict[str, _Column] = {column.log_name: column for column in stored}
    named |= {column.name: column for column in stored}
    groups = [] if asked.group is None else [asked.group]
    for name, is_group in [*((name, False) for name in asked.columns), *((name, True) for name in groups)]:
        column, why = named.get(name), ""
        if column is None:
            why = f"is not in {dataset.path}, which has {', '.join(of.name for of in stored)}"
        elif not isinstance(column, SparseColumn):
            why = "is no category" if is_group else ""
        elif column.hash is not None or column.is_multi_valued:
            why = "has several values a row" if column.hash is None else "was hashed, so that values share an id"
        elif is_group:
            unknown = max(
                of.unknown_rate(column.name) for part, of in dataset.manifest.splits.items() if part in splits
            )
            if unknown > MOST_UNKNOWN:
                why = f"has no id for {unknown:.1%} of its values in {asked.split}, which are no group"
        if why:
            remedy = f"dlrm predict BUNDLE LOG --columns {asked.label or learnt[0]},{name} --out p.parquet"
            msg = f"{'`group`:' if is_group else 'column'} {name} {why}; `{remedy}` writes a log's values beside its "
            msg += "predictions, and p.parquet can be given in place of the model"
            raise DatasetError(msg)
    return {name: named[name] for name in (*asked.columns, *groups)}


def _rows(
    path: Path, dataset: Dataset, asked: Asked, predictions: Predictions, chosen: ChosenCheckpoint
) -> PredictedRows:
    columns, encoded = check_columns(dataset, asked), pl.DataFrame()
    if columns:
        needed = list({column.name: None for column in columns.values()})
        splits = asked.split.split("+")
        encoded = pl.concat(of for split in splits for of in rows_of_split(dataset, split, columns=needed))
    groups = None if asked.group is None else encoded[columns[asked.group].name].to_numpy()
    names = [column.name for column in dataset.schema.learnt]
    judged = {
        name: Judged.of(of.labels.astype(np.uint8), of.logits, of.weights, groups)
        for name, of in predictions.by_label(names).items()
    }
    raw = encoded.select(_raw(dataset, columns[name]).alias(name) for name in asked.columns)
    label = asked.label or names[0]
    about = {"split": asked.split, "label": label, "step": chosen.step, "checkpoint": chosen.kind}
    return replace(PredictedRows.of(path.resolve().name, judged.pop(label), raw, about), others=judged)


def _raw(dataset: Dataset, column: _Column) -> pl.Expr:
    """A column as the log has it, of encoded rows."""
    encoded = pl.col(column.name)
    if isinstance(column, DenseColumn):
        fitted, kind = dataset.manifest.dense[column.name], column.value_kind
        return encoded.map_batches(
            lambda x: kind.from_floats(fitted.inverse(x.cast(pl.Float64).to_numpy())), return_dtype=column.dtype
        )
    if not isinstance(column, SparseColumn):
        return encoded
    if not column.has_vocabulary:
        return encoded.cast(pl.String)
    vocabulary = dataset.vocabulary(column.name)
    of_id = encoded.replace_strict(
        vocabulary.table["id"], vocabulary.text_values().cast(pl.String), default=None, return_dtype=pl.String
    )
    return pl.when(encoded == UNKNOWN_ID).then(pl.lit(UNKNOWN_VALUE)).otherwise(of_id)
