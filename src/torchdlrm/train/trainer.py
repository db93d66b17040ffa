"""Dataset and config -> run: the training loop.

Every rank runs this; batch k holds the same rows whatever their number, and rank 0 writes and talks.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from torchdlrm.config import Config
from torchdlrm.data.dataset import Dataset
from torchdlrm.loader.batch import Batch
from torchdlrm.loader.loader import Loader
from torchdlrm.metrics import BinaryMetrics, binary_metrics
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.plan_file import write_plan
from torchdlrm.train.optimizers import Schedule, build_optimizer
from torchdlrm.train.predictions import PredictionBuffer, measure
from torchdlrm.train.process_group import Ranks, join_process_group
from torchdlrm.train.run import PLAN_NAME, MetricsLog, Run
from torchdlrm.train.sharded import build_sharded_model
from torchdlrm.train.threads import useful_threads


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Attributes:
        steps: optimizer steps.
        rows: training rows read, over all ranks.
        seconds: wall time of the training steps, validation left out.
        rows_per_s: their quotient.
        validation: metrics of the val split after the last step, None when the dataset has no val rows.
    """

    steps: int
    rows: int
    seconds: float
    rows_per_s: float
    validation: dict[str, int | float] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Trainer:
    """Trains one model; `fit` does it all.

    Args:
        config: of the run.
        dataset: what to train on.
        run: where to write.
        ranks: the processes that train together.
        progress: is told of every step.

    Raises:
        PlanError: the tables do not fit the machine.
        DatasetError: the dataset has no training rows.
    """

    def __init__(self, config: Config, dataset: Dataset, run: Run, ranks: Ranks, progress: ProgressListener) -> None:
        self._config, self._dataset, self._run, self._ranks, self._progress = config, dataset, run, ranks, progress
        if ranks.device.type == "cpu":
            torch.set_num_threads(
                config.train.num_threads or useful_threads(config, len(dataset.sparse_names), ranks.world_size)
            )
        self._has_validation = dataset.splits["val"].rows > 0
        self._loader = self._make_loader("train", config.train.batch_size_global, epochs=config.train.epochs)
        num_steps = self._loader.batches_per_epoch * config.train.epochs
        self.num_steps = min(num_steps, config.train.max_steps or num_steps)
        sharded = build_sharded_model(
            config,
            num_embeddings=dataset.num_embeddings,
            num_dense_features=len(dataset.dense_names),
            dense_sample=torch.from_numpy(self._loader.first_dense_rows()),
            ranks=ranks,
            saved_plan=Path(config.sharding.plan) if config.sharding.plan is not None else None,
        )
        self.model = sharded.module
        if ranks.is_first:
            write_plan(run.path / PLAN_NAME, sharded.solution)
        optimizer = build_optimizer(self.model, config.dense_optimizer)
        self._schedule = Schedule(config.schedule, optimizer)
        self._pipeline = TrainPipelineSparseDist(self.model, optimizer, ranks.device, execute_all_batches=True)
        self._metrics = MetricsLog(run, tensorboard=config.logging.tensorboard) if ranks.is_first else None
        self._interval = PredictionBuffer()
        self._watch = Stopwatch()
        self._logged_rows, self._logged_s = 0, 0.0

    def fit(self) -> TrainingSummary:
        """Train to the end, validating at intervals and after the last step, and save the weights."""
        batches = islice(iter(self._loader), self.num_steps)
        validation: BinaryMetrics | None = None
        self.model.train()
        self._progress.start_phase("train", self._rows_after(self.num_steps))
        self._watch.start()
        for step in range(1, self.num_steps + 1):
            self._train_step(step, batches)
            if self._is_due(step, self._config.logging.every_steps):
                self._log_interval(step)
            if self._has_validation and self._is_due(step, self._config.validation.every_steps):
                with self._watch.paused():
                    validation = self._validate(step)
        self._watch.stop()
        self._run.save_weights(self.model, self.num_steps)
        if self._metrics is not None:
            self._metrics.close()
        rows = self._rows_after(self.num_steps)
        seconds = self._watch.elapsed_s
        return TrainingSummary(
            self.num_steps, rows, seconds, rows / seconds, validation.as_dict() if validation is not None else None
        )

    def _train_step(self, step: int, batches: Iterator[Batch]) -> None:
        self._rate = self._schedule.set(step)
        _, logits_B, labels_B = self._pipeline.progress(batches)
        self._interval.add(logits_B, labels_B)
        self._progress.advance(self._rows_after(step) - self._rows_after(step - 1))

    def _log_interval(self, step: int) -> None:
        """Write the metrics of the rows since the last time, each predicted before the model learnt from it."""
        gathered = self._interval.take(self._ranks)
        rows = self._rows_after(step)
        rows_per_s = (rows - self._logged_rows) / (self._watch.elapsed_s - self._logged_s)
        self._logged_rows, self._logged_s = rows, self._watch.elapsed_s
        if gathered is None or self._metrics is None:
            return
        metrics = binary_metrics(*gathered)
        self._metrics.write(
            {"step": step, "rows": rows, "split": "train", "loss": metrics.logloss, "ne": metrics.ne}
            | {"auc": metrics.auc, "learning_rate": self._rate, "rows_per_s": rows_per_s}
        )
        self._progress.advance(0, loss=f"{metrics.logloss:.4f}", ne=f"{metrics.ne:.4f}")

    def _validate(self, step: int) -> BinaryMetrics | None:
        """Write the metrics of the val split as it is predicted now."""
        started_s = time.monotonic()
        loader = self._make_loader(
            "val", self._config.validation.batch_size_global, max_rows=self._config.validation.max_rows
        )
        # The pipeline holds batches in flight and has replaced the tables' forward; it goes on by itself afterwards.
        metrics = measure(self._pipeline.detach(), [loader], self._ranks, SILENT)
        if metrics is not None and self._metrics is not None:
            self._metrics.write(
                {"step": step, "rows": self._rows_after(step), "split": "val", "loss": metrics.logloss}
                | {"ne": metrics.ne, "auc": metrics.auc, "learning_rate": self._rate}
                | {"rows_per_s": metrics.rows / (time.monotonic() - started_s)}
            )
            self._progress.advance(0, val_auc=f"{metrics.auc:.4f}", val_ne=f"{metrics.ne:.4f}")
        return metrics

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
            max_rows=max_rows,
            prefetch_batches=self._config.loader.prefetch_batches,
            pin_memory=self._ranks.device.type == "cuda",
        )

    def _is_due(self, step: int, every_steps: int) -> bool:
        return step == self.num_steps or (every_steps > 0 and step % every_steps == 0)

    def _rows_after(self, step: int) -> int:
        """Training rows that all ranks have read in the first `step` steps."""
        epochs, batches = divmod(step, self._loader.batches_per_epoch)
        return epochs * self._loader.rows + batches * self._config.train.batch_size_global


def train(config: Config, dataset: Dataset, run: Run, *, progress: ProgressListener = SILENT) -> TrainingSummary | None:
    """Train in this process and all others that torch's launcher has started with it.

    Args:
        config: of the run.
        dataset: what to train on.
        run: a folder made by `Run.create`.
        progress: is told of every step.

    Returns:
        How it ended on rank 0, None elsewhere.

    Raises:
        PlanError: the tables do not fit the machine.
        DatasetError: the dataset has no training rows, or is damaged.
    """
    with join_process_group() as ranks:
        summary = Trainer(config, dataset, run, ranks, progress if ranks.is_first else SILENT).fit()
        return summary if ranks.is_first else None


class Stopwatch:
    """Measures wall time that can be paused."""

    def __init__(self) -> None:
        self._banked_s = 0.0
        self._started_s: float | None = None

    @property
    def elapsed_s(self) -> float:
        """Seconds that the watch has been running."""
        return self._banked_s + (time.monotonic() - self._started_s if self._started_s is not None else 0.0)

    def start(self) -> None:
        """Go on measuring."""
        self._started_s = time.monotonic()

    def stop(self) -> None:
        """Stop measuring."""
        self._banked_s, self._started_s = self.elapsed_s, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not measured."""
        self.stop()
        yield
        self.start()
