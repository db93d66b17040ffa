"""Runs the training loop: dataset and config -> run.

Every rank runs this; batch k holds the same rows whatever their number. Rank 0 writes files and reports progress.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import Interrupted, TrainingError
from torchdlrm.loader.batch import Batch
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, first_and_others
from torchdlrm.model.architecture import ModelShape
from torchdlrm.progress import SILENT, ProgressListener, noting_if_slow
from torchdlrm.sharding.weights import KnownRows, set_rows
from torchdlrm.training.checkpoint import Position, not_finite_error
from torchdlrm.training.checkpoint_state import TakeOver
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.interval_metrics import IntervalMetrics
from torchdlrm.training.log import (
    Callback,
    TrainingSummary,
    bar_figures,
    ending,
    metrics_for_callbacks,
    plateau_line,
    validation_line,
)
from torchdlrm.training.pipeline import Pipeline, build_pipeline, by_label, predict_loaders
from torchdlrm.training.processes.process_group import Ranks, StopRequest
from torchdlrm.training.run import Run
from torchdlrm.training.sharded import StepCounters, begin_tables, build_optimizer, build_sharded_model
from torchdlrm.training.source_run import SourceRun
from torchdlrm.training.step_profile import WARM_UP_STEPS, StepProfiler
from torchdlrm.training.steps import Agenda, Schedule, Stopwatch, after_validation

_SLOW_S = 10.0
_FIRST_STEP = (
    "the first step is not done yet: it waits until the other processes, if any, are as far, and compiles kernels that "
    "this machine has not run before"
)
_NOT_SAVED = (
    "but it could not be saved (see above); mend that and start the same command: it resumes from the last checkpoint"
)


class Trainer:
    """Trains one model, whose dense parts compute in `dtype`, from what `source` has learnt; `fit` does it all.

    Tables of `train.init_tables` begin with what is `known`, and taken out of it.

    Raises:
        PlanError: the tables do not fit the machine.
        DatasetError: the dataset has no training rows.
    """

    def __init__(
        self,
        run: Run,
        shape: ModelShape,
        dataset: Dataset,
        ranks: Ranks,
        progress: ProgressListener,
        *,
        dtype: torch.dtype,
        source: SourceRun | None = None,
        known: dict[str, KnownRows],
    ) -> None:
        self._config = config = run.config
        self._dataset, self._run, self._ranks, self._progress = dataset, run, ranks, progress
        self._shape, self._known = shape, known
        self._has_validation = dataset.splits["val"].rows > 0
        self._loader = self._make_loader("train", config.train.batch_size_global, epochs=config.train.epochs)
        self._agenda = Agenda.of(config, self._loader.rows)
        sharded = build_sharded_model(
            config,
            shape,
            dense_sample=torch.from_numpy(self._loader.first_dense_rows()),
            ranks=ranks,
        )
        model = sharded.module
        self._solution = sharded.solution
        self._saves_copies = config.checkpoint.asynchronous and sharded.solution.copy_fits
        optimizer = build_optimizer(model, config.dense_optimizer)
        self._schedule = Schedule(config.schedule, optimizer, num_steps=self._agenda.num_steps)
        self._counters = StepCounters(model, seed=config.seed, rank=ranks.rank)
        self._pipeline = build_pipeline(model, optimizer, dtype=dtype, ranks=ranks)
        self._predicting: Pipeline | None = None  # from the first validation on
        self._checkpointer = Checkpointer(
            run.checkpoints, model, optimizer, ranks, keep_last=config.checkpoint.keep_last
        )
        self._checkpointer.confirm = run.confirm
        self._model, self._stop_request = model, StopRequest(ranks)
        self._source, self._position, self._rate = source, Position(0, self._agenda.loader_state(0)), 0.0
        self._intervals = {column.name: IntervalMetrics(ranks.device) for column in dataset.schema.learnt}
        self._loss: torch.Tensor | None = None  # of this rank's rows in the last step
        self._validation: dict[str, Any] | None = None
        self._callbacks: Sequence[Callback] = ()
        self._asked_to_stop: str | None = None  # by a callback
        self._logged_rows, self._logged_s = 0, 0.0
        self._watch, self._since_save = Stopwatch(), Stopwatch()

    def fit(self, open_callbacks: Callable[[int], Sequence[Callback]]) -> TrainingSummary:
        """Resume the run where it is and train to the end, validating and saving at intervals.

        Args:
            open_callbacks: gives the callbacks, for the step after which the run resumes.

        Raises:
            Interrupted: asked to stop; the run is saved and can be resumed.
            TrainingError: the loss or a weight is not finite, or the end could not be saved.
        """
        self._position = self._checkpointer.restore(self._progress) or self._first_position()
        start = self._position.step
        if self._ranks.is_first and start < self._agenda.num_steps:
            self._run.write_plan(self._solution)
        with self._stop_request.listening(), closing(self._checkpointer):
            self._logged_rows = self._agenda.rows_after(start)
            rows = self._agenda.rows_after(max(self._agenda.num_steps, start))
            self._progress.start_phase("train", rows, done=self._logged_rows)
            self._callbacks = open_callbacks(start)
            with ending(self._callbacks):
                self._watch.restart()
                stopped_because = self._train(start)
                if self._position.step > start and not self._save(wait=True):
                    msg = f"trained to step {self._position.step}, {_NOT_SAVED}"
                    raise TrainingError(msg)
                return self._summary(start, stopped_because)

    def _first_position(self) -> Position:
        """Where a run starts, with the weights that it was built with or those of another run."""
        self._begin_with_known_rows()
        if self._source is None:
            return self._position
        config = self._config
        whole = [table for table in self._shape.tables if table.combination is None]
        how = TakeOver(
            keeps_dense_state=config.warm_start.dense_optimizer_state == "kept",
            may_grow=True,
            reset_ids={of.name: self._dataset.reset_ids(of.feature) for of in whole if self._source.num_reset},
            factors=dict.fromkeys(config.accumulators, config.warm_start.accumulator_decay),
        )
        return replace(self._position, steps_before=self._checkpointer.start_from(self._source.checkpoint, how))

    def _begin_with_known_rows(self) -> None:
        """Those of `train.init_tables`; what another run has learnt replaces them."""
        for name, file in (self._config.train.init_tables or {}).items():
            table, ids, rows = self._known.pop(name)
            set_rows(self._model, table, ids, rows)
            known, all_values = len({*ids.tolist()}), self._dataset.num_embeddings[name.partition("@")[0]] - 1
            line = f"{name}: {known:,} values begin with a vector of {file}, {all_values - known:,} have none there"
            self._progress.note(line)
            self._ranks.on_first(partial(self._run.record_init_table, name, file, known, all_values - known))

    def _train(self, start: int) -> str:
        """Train after step `start` until something says to stop; what that was."""
        self._loader.load_state_dict(self._agenda.loader_state(start))
        self._model.train()
        num_profiled = self._config.logging.profile_steps
        profiled = StepProfiler(
            self._run.profile, self._ranks, after_step=start + WARM_UP_STEPS, num_steps=num_profiled
        )
        with profiled as profiler, closing(iter(self._loader)) as all_batches:
            batches = islice(all_batches, max(self._agenda.num_steps - start, 0))  # epochs may be fewer than before
            for step in range(start + 1, self._agenda.num_steps + 1):
                is_first = step == start + 1
                with noting_if_slow(self._progress, _FIRST_STEP, after_s=_SLOW_S) if is_first else nullcontext():
                    self._train_step(step, batches)
                profiler.step_done(step)
                improved = self._measure_if_due(step)
                stop, save = self._stop_request.poll(step, save_is_due=self._save_is_due())
                if stop:
                    is_saved = self._save(wait=True)
                    where = "saved: the same command resumes there" if is_saved else _NOT_SAVED
                    msg = f"interrupted after step {step} of {self._agenda.num_steps}; {where}"
                    raise Interrupted(msg)
                reason = self._reason_to_stop()
                if reason is not None:
                    return reason
                is_due = save or improved or self._agenda.is_every(step, self._config.checkpoint.every_steps)
                if is_due and step < self._agenda.num_steps:  # the last step is saved by `fit`
                    self._save(wait=not self._saves_copies)
                self._tell_of_checkpoints()
        return "finished"

    def _begin_epoch(self, epoch: int) -> None:
        """Begin with fresh tables before an epoch's first step; their steps are counted from there."""
        begin_tables(self._model, self._config, self._shape, epoch=epoch)
        self._position = replace(self._position, steps_before=-epoch * self._agenda.steps_per_epoch)

    def _train_step(self, step: int, batches: Iterator[Batch]) -> None:
        epochs, steps = divmod(step - 1, self._agenda.steps_per_epoch)
        if self._config.train.fresh_tables and epochs and not steps:
            self._begin_epoch(epochs)
        self._rate = self._schedule.set(step, self._position.plateau_scale)
        self._counters.begin(step, self._position.steps_before)
        self._loss, *judged = self._pipeline.progress(batches)
        # On a GPU looking at the loss waits for the step; there it is looked at when metrics are due, and by each save.
        if self._ranks.device.type == "cpu" or self._agenda.is_due(step, self._config.logging.every_steps):
            self._refuse_if_not_finite(float(self._loss), step)
        logits, labels, *weights = judged
        for interval, *of in zip(self._intervals.values(), by_label(logits), by_label(labels), strict=True):
            interval.add(*of, *weights)
        self._position = replace(self._position, step=step, loader=self._agenda.loader_state(step))
        self._progress.advance(self._agenda.rows_after(step) - self._agenda.rows_after(step - 1))

    def _measure_if_due(self, step: int) -> bool:
        """Log and validate where the config says so; whether the validation was the best so far."""
        if self._agenda.is_due(step, self._config.logging.every_steps):
            self._log_interval(step)
        validation = self._config.validation
        if not (self._has_validation and self._agenda.is_due(step, validation.every_steps, validation.every_rows)):
            return False
        with self._watch.paused():
            return self._validate(step)

    def _log_interval(self, step: int) -> None:
        """Write the metrics of the rows since the last time, each predicted before the model learnt from it."""
        taken = {name: interval.take(self._ranks) for name, interval in self._intervals.items()}
        rows = self._agenda.rows_after(step)
        rows_per_s = (rows - self._logged_rows) / (self._watch.elapsed_s - self._logged_s)
        self._logged_rows, self._logged_s = rows, self._watch.elapsed_s
        metrics = {name: of for name, of in taken.items() if of is not None}
        if not metrics:
            return
        values = metrics_for_callbacks(metrics, rows=rows, learning_rate=self._rate, rows_per_s=rows_per_s)
        for callback in self._callbacks:
            callback.on_log(step, values)
        self._progress.advance(0, **bar_figures(metrics[self._dataset.label_name]))

    def _validate(self, step: int) -> bool:
        """Write the metrics of the val split as it is predicted now; whether its AUC is the best so far."""
        started_s = time.monotonic()
        loader = self._make_loader(
            "val", self._config.validation.batch_size_global, max_rows=self._config.validation.max_rows
        )
        # The pipeline holds batches in flight and has replaced the tables' forward; its next step does so again.
        model = self._pipeline.detach()
        self._predicting = self._predicting or build_pipeline(model, None, ranks=self._ranks)
        predictions = predict_loaders(model, [loader], self._ranks, SILENT, self._predicting)
        metrics = self._ranks.from_first(predictions.take_metrics(self._ranks, [*self._intervals]))
        assert metrics is not None
        self._validation = first_and_others(metrics, BinaryMetrics.as_json)
        judged = metrics[self._dataset.label_name]
        rows_per_s = judged.rows / (time.monotonic() - started_s)
        rows = self._agenda.rows_after(step)
        values = metrics_for_callbacks(metrics, rows=rows, learning_rate=self._rate, rows_per_s=rows_per_s)
        reasons = [callback.on_validation(step, values) for callback in self._callbacks]
        self._asked_to_stop = self._ranks.from_first(next(filter(None, reasons), None))
        before = self._position
        self._position = after_validation(before, judged.auc, self._config.schedule)
        is_best = self._position.stale_validations == 0
        self._progress.note(validation_line(step, self._agenda, metrics, is_best=is_best))
        if self._position.plateau_scale != before.plateau_scale:
            self._progress.note(plateau_line(self._position))
        return is_best

    def _reason_to_stop(self) -> str | None:
        stop, position = self._config.stop, self._position
        if stop.target_auc is not None and (position.best_auc or 0.0) >= stop.target_auc:
            return "target_auc"
        if stop.patience_validations is not None and position.stale_validations >= stop.patience_validations:
            return "patience"
        return self._asked_to_stop

    def _refuse_if_not_finite(self, loss: float, step: int) -> None:
        if math.isfinite(loss):
            return
        first_row, end_row = self._agenda.rows_after(step - 1), self._agenda.rows_after(step)
        what = f"the loss is {loss} at step {step} (training rows {first_row:,} to {end_row - 1:,})"
        raise not_finite_error(what, self._run.checkpoints)

    def _save_is_due(self) -> bool:
        """Whether it is time again, by the clock of this process."""
        return 0 < self._config.checkpoint.every_minutes * 60 <= self._since_save.elapsed_s

    def _save(self, *, wait: bool) -> bool:
        """Save the state after this step; whether that has worked, as far as is known now."""
        with self._watch.paused():
            is_saved = self._checkpointer.save(self._position, wait=wait, loss=self._loss)
        self._since_save.restart()
        self._tell_of_checkpoints()
        return is_saved

    def _tell_of_checkpoints(self) -> None:
        for step, path in self._checkpointer.take_written():
            for callback in self._callbacks:
                callback.on_checkpoint(step, path)

    def _summary(self, start: int, stopped_because: str) -> TrainingSummary:
        step, seconds = self._position.step, self._watch.elapsed_s
        rows = self._agenda.rows_after(step)
        return TrainingSummary(
            step=step,
            rows=rows,
            resumed_from_step=start,
            seconds=seconds,
            rows_per_s=(rows - self._agenda.rows_after(start)) / seconds if step > start else 0.0,
            stopped_because=stopped_because,
            best_auc=self._position.best_auc,
            best_step=self._position.best_step,
            validation=self._validation,
        )

    def _make_loader(
        self, split: str, batch_size_global: int, *, epochs: int = 1, max_rows: int | None = None
    ) -> Loader:
        return Loader(
            self._dataset,
            split,
            batch_size_global=batch_size_global,
            rank=self._ranks.rank,
            world_size=self._ranks.world_size,
            epochs=epochs,
            seed=self._config.seed,
            tables=self._shape.tables,
            max_rows=max_rows,
            prefetch_batches=self._config.loader.prefetch_batches,
            pin_memory=self._ranks.device.type == "cuda",
            all_gather=self._ranks.all_gather,
        )
