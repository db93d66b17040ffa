"""Plans and runs a training; what it is going to do is known before anything is written."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchdlrm.config import Config, load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError, RunError, TrainingError
from torchdlrm.model.architecture import Architecture, ModelShape
from torchdlrm.model.model_class import ModelClass, architecture_of, reported
from torchdlrm.model.precision import Precision
from torchdlrm.progress import SILENT, ProgressListener, watched
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.plan_file import plan_as_dict
from torchdlrm.sharding.resolve import plan_of_training
from torchdlrm.sharding.solution import Solution
from torchdlrm.sharding.tables import tables_of_model
from torchdlrm.sharding.weights import KnownRows, known_rows
from torchdlrm.storage.places import located
from torchdlrm.tables.optimizers import check_table_optimizer
from torchdlrm.training.changes import Change
from torchdlrm.training.checkpoint import list_checkpoints
from torchdlrm.training.checkpointer import find_damage_together
from torchdlrm.training.compute import allow_tf32, choose_precision, keep_freed_memory, set_threads
from torchdlrm.training.log import Callback, MetricsLog, TrainingHistory, read_metrics
from torchdlrm.training.processes.agreement import LAUNCHER_VARIABLE, Settings, settings_of
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.processes.process_group import Ranks, join_process_group
from torchdlrm.training.run import METRICS_NAME, Run, fetch_run
from torchdlrm.training.sharded import check_freeze
from torchdlrm.training.source_run import SourceRun, find_source
from torchdlrm.training.steps import Agenda, check_validations
from torchdlrm.training.trackers import check_trackers, open_trackers
from torchdlrm.training.trainer import Trainer
from torchdlrm.versions import find_installed_misfit


@dataclass(frozen=True)
class TrainingPreview:
    """A training to come.

    Attributes:
        config: of the run.
        agenda: its steps.
        solution: where the tables go, and what that costs.
        precision: of the dense parts' matrix products.
        validation_rows: rows of the val split that a validation reads.
        from_step: where the run is now; 0 for a new one.
        labels: that are learnt.
        source: what a new run takes over from another.
        changes: of the config since the run was started.
    """

    config: Config
    agenda: Agenda
    solution: Solution
    precision: Precision
    validation_rows: int
    from_step: int
    labels: Sequence[str]
    source: SourceRun | None = None
    changes: tuple[Change, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.from_step >= self.agenda.num_steps

    def as_dict(self) -> dict[str, Any]:
        """The preview as JSON has it."""
        return {
            **asdict(self.agenda),
            "steps_per_epoch": self.agenda.steps_per_epoch,
            "num_rows": self.agenda.rows_after(self.agenda.num_steps),
            "precision": str(self.precision),
            "label": self.labels[0],
            **({"labels": [*self.labels]} if len(self.labels) > 1 else {}),
            "validation_rows": self.validation_rows,
            "from_step": self.from_step,
            "warm_start": self.source.record if self.source is not None else None,
            "plan": plan_as_dict(self.solution),
        }


@silenced_libraries()
def preview_training(
    config: Config,
    dataset: Dataset,
    run: Path,
    *,
    world_size: int,
    local_world_size: int,
    from_run: Path | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    restart: bool = False,
    train_follows: bool = False,
) -> TrainingPreview:
    """Look ahead, and refuse now what `train` with the same arguments would refuse later on `world_size` processes.

    Where `train_follows`, it is left to read the files of `train.init_tables`.

    Raises:
        ConfigError: `model.features` does not suit the dataset, early stopping could never act, GPUs are missing, the
            device lacks the tables' optimizer, a tracker's package is missing, the model has not what is to be frozen,
            or a model class fails in a step on a few rows.
        DatasetError: there are no training rows.
        PlanError: the tables do not fit, or the given plan does not.
        RunError: the folder holds something else or cannot be resumed, or what `from_run` has learnt does not fit.
        TrainingError: both builds of FBGEMM are installed.
    """
    architecture = architecture_of(config.model, model_class, may_have_changed=allow_changed_model_class)
    folder = Run(fetch_run(run), config)
    num_steps = Agenda.of(config, dataset.splits["train"].rows).num_steps
    changes = () if restart else folder.check(dataset, architecture, num_steps=num_steps)
    source = find_source(from_run, folder, dataset, architecture, restart=restart)
    device = rank_device(0, local_world_size, config.train.device)
    agenda, shape = _checked(config, dataset, architecture, device)
    if not train_follows:
        _known_rows(folder, shape, dataset, restart=restart)
    solution = plan_of_training(
        config,
        shape,
        tables_of_model(shape.tables),
        local_machine(config.sharding, world_size=world_size, local_world_size=local_world_size, device=device),
    )
    return TrainingPreview(
        config=config,
        agenda=agenda,
        solution=solution,
        precision=choose_precision(config, shape, device),
        validation_rows=min(dataset.splits["val"].rows, config.validation.max_rows or dataset.splits["val"].rows),
        from_step=max([] if restart else list_checkpoints(folder.checkpoints), default=0),
        labels=shape.labels,
        source=source,
        changes=tuple(changes),
    )


def train(
    config: Config | str | Path,
    dataset: Dataset | str | Path,
    run: str | Path,
    *,
    from_run: str | Path | None = None,
    model_class: ModelClass | None = None,
    allow_changed_model_class: bool = False,
    restart: bool = False,
    callbacks: Sequence[Callback] = (),
    progress: ProgressListener | bool = True,
) -> TrainingHistory | None:
    """Train in this process and all others that torch's launcher has started with it.

    A run that is in the folder already is resumed from its newest checkpoint, also on another number of processes; one
    that is complete stays as it is, and settings that would have led to other weights are refused. A process group that
    exists is used; where there is none, one is joined and left again. Process-wide settings are afterwards what they
    were (see `join_process_group`), with one exception: glibc keeps freed memory from then on.

    Args:
        config: of the run: a `Config`, a TOML file, or the name of a config that comes with torchdlrm.
        dataset: an encoded dataset or its folder.
        run: folder of the run.
        from_run: folder of a run that a new one is started from, on a dataset whose vocabularies extend those of that
            run's: docs/training.md says what is taken over, and `warm_start` of the config which checkpoint.
        model_class: a model of one's own in place of the DLRM, or its interaction arch: a class or function, or where
            it stands, as `my_models.py:GatedSum`; docs/models.md says what it must do.
        allow_changed_model_class: resume a run though the file of its model class has changed since.
        restart: remove what is in it and begin again; under a launcher that starts processes again after one has died,
            each time, unless it is `dlrm train`'s.
        callbacks: are called on rank 0, after metrics.jsonl and the trackers that the config names.
        progress: receives every step on rank 0. True draws a bar on a terminal, and writes lines in a notebook; False
            is silent.

    Returns:
        How it went and ended on rank 0, None elsewhere.

    Raises:
        ConfigError: the config or the model class is wrong, the dataset has no such label, early stopping could never
            act, the device lacks the tables' optimizer, a tracker's package is missing, or the machines of the training
            were started with different settings.
        RunError: the folder is in use, holds something else, or a run that cannot be resumed with this config; or what
            `from_run` has learnt does not fit.
        PlanError: the tables do not fit the machine.
        DatasetError: the dataset is missing, damaged, or has no training rows.
        TrainingError: the loss or a weight is not finite, memory runs out, another process does not answer, or both
            builds of FBGEMM are installed.
        Interrupted: SIGTERM or Ctrl-C; the run is saved.
    """
    settings = config if isinstance(config, Config) else load_config(config)
    folder = Run(fetch_run(run), settings)
    architecture = architecture_of(settings.model, model_class, may_have_changed=allow_changed_model_class)

    def opened() -> Dataset:
        found = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
        return found.with_labels(settings.train.label_names)

    def describe() -> Settings:
        return settings_of(settings, opened(), architecture, restart=restart, from_run=from_run)

    def open_callbacks(from_step: int) -> list[Callback]:
        if not ranks.is_first or from_step >= agenda.num_steps:  # what is complete stays as it is
            return [*callbacks] if ranks.is_first else []
        folder.take_model_class(architecture)
        trackers = open_trackers(folder.path, settings, from_step=from_step)
        return [MetricsLog(folder.path, from_step=from_step), *trackers, *callbacks]

    with (
        watched(progress) as watching,
        join_process_group(settings.train.timeout_s, describe, device=settings.train.device) as ranks,
    ):
        keep_freed_memory()
        allow_tf32(settings.train, ranks.device)
        encoded = opened()
        agenda, shape = _checked(settings, encoded, architecture, ranks.device)
        listener = watching if ranks.is_first else SILENT
        steps = agenda.num_steps
        source, known = _start_run(folder, encoded, ranks, shape, from_run, steps, listener, restart=restart)
        with closing(folder), reported(architecture):
            set_threads(settings, shape, ranks)
            dtype = choose_precision(settings, shape, ranks.device).dtype
            trainer = Trainer(folder, shape, encoded, ranks, listener, dtype=dtype, source=source, known=known)
            summary = trainer.fit(open_callbacks)
    return TrainingHistory(summary, read_metrics(folder.path / METRICS_NAME)) if ranks.is_first else None


def _checked(
    config: Config, dataset: Dataset, architecture: Architecture, device: torch.device
) -> tuple[Agenda, ModelShape]:
    """The steps of a training and its model, after refusing what no plan of the tables could change."""
    misfit = find_installed_misfit()
    if misfit is not None and misfit.is_fatal:
        msg = f"{misfit.why}. What to do: {misfit.remedy}"
        raise TrainingError(msg)
    check_table_optimizer(config.table_optimizer, device)
    check_trackers(config.logging.trackers)
    rows = dataset.splits["train"].rows
    if not rows:
        msg = f"{dataset.path}: the train split has no rows"
        raise DatasetError(msg)
    agenda = Agenda.of(config, rows)
    check_validations(config, agenda, validation_rows=dataset.splits["val"].rows)
    shape = ModelShape.of(config.model, dataset, architecture)
    shape.architecture.check(shape)
    check_freeze(config, shape, device)
    return agenda, shape


def _known_rows(run: Run, shape: ModelShape, dataset: Dataset, *, restart: bool) -> dict[str, KnownRows]:
    """What tables begin with, by name, read before anything is written; nothing from a checkpoint on."""
    begins = restart or not list_checkpoints(run.checkpoints)
    files = (run.config.train.init_tables or {}).items() if begins else ()
    return {name: known_rows(file, name, shape.tables, dataset) for name, file in files}


def _start_run(
    run: Run,
    dataset: Dataset,
    ranks: Ranks,
    shape: ModelShape,
    from_run: str | Path | None,
    num_steps: int,
    progress: ProgressListener,
    *,
    restart: bool,
) -> tuple[SourceRun | None, dict[str, KnownRows]]:
    """Rank 0 takes the folder, after the ranks have found, and together verified, what to start from; this is given."""
    architecture, names = shape.architecture, ranks.all_gather(os.environ.get(LAUNCHER_VARIABLE))
    launchers = list(dict.fromkeys(name for name in names if name is not None))
    # Not what this job itself has trained, before a process or a machine died and all were started again.
    removes = restart and not ranks.from_first(run.was_started_by(launchers))

    def find() -> tuple[SourceRun | None, dict[str, KnownRows]]:
        if not removes:
            run.check(dataset, architecture, num_steps=num_steps)
        known = _known_rows(run, shape, dataset, restart=removes)
        place = None if from_run is None else located(from_run)
        return find_source(place, run, dataset, architecture, restart=removes), known

    source, known = ranks.on_first(find)
    damage = None if source is None else find_damage_together(source.checkpoint, ranks, progress=progress)
    if damage is not None:
        raise RunError(f"`from_run`: {damage}").everywhere()

    def start() -> None:
        run.start(
            dataset,
            world_size=ranks.world_size,
            num_steps=num_steps,
            restart=removes,
            architecture=architecture,
            warm_start=None if source is None else source.record,
            launchers=launchers,
            waiting=progress.note,
        )

    ranks.on_first(start)
    return source, known
