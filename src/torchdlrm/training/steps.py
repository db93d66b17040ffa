"""Counts the steps of a run: the last one, the rows that each has read, its learning rate, what is due. No files."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice

from torchrec.optim.keyed import CombinedOptimizer

from torchdlrm.config import Config, ScheduleConfig
from torchdlrm.errors import ConfigError
from torchdlrm.loader.batch import num_batches
from torchdlrm.training.checkpoint import Position

MIN_LEARNING_RATE = 1e-7


@dataclass(frozen=True)
class Agenda:
    """The steps of a run.

    Attributes:
        rows_per_epoch: training rows.
        batch_size_global: rows of a step over all ranks.
        num_steps: the run's last step.
    """

    rows_per_epoch: int
    batch_size_global: int
    num_steps: int

    @classmethod
    def of(cls, config: Config, rows_per_epoch: int) -> "Agenda":
        """The steps that a config asks for."""
        train = config.train
        wanted = num_batches(rows_per_epoch, train.batch_size_global) * train.epochs
        return cls(rows_per_epoch, train.batch_size_global, min(wanted, train.max_steps or wanted))

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the last one may be smaller."""
        return num_batches(self.rows_per_epoch, self.batch_size_global)

    def rows_after(self, step: int) -> int:
        """Training rows that all ranks have read in the first `step` steps."""
        epochs, batches = divmod(step, self.steps_per_epoch)
        return epochs * self.rows_per_epoch + batches * self.batch_size_global

    def loader_state(self, step: int) -> dict[str, int]:
        """The state of the training loader after `step`."""
        epoch, batches_consumed = divmod(step, self.steps_per_epoch)
        return {"epoch": epoch, "batches_consumed": batches_consumed}

    def is_every(self, step: int, every_steps: int) -> bool:
        """Whether it is time again after `step`; 0 is never."""
        return every_steps > 0 and step % every_steps == 0

    def is_due(self, step: int, every_steps: int, every_rows: int = 0) -> bool:
        """Whether it is time again after `step`, by steps or by rows, or for the last time."""
        by_rows = every_rows > 0 and self.rows_after(step) // every_rows > self.rows_after(step - 1) // every_rows
        return step == self.num_steps or by_rows or self.is_every(step, every_steps)


def check_validations(config: Config, agenda: Agenda, *, validation_rows: int) -> None:
    """Refuse early stopping, or a schedule, that can never act: both look at validations before the last step.

    Raises:
        ConfigError: there are no such validations, or fewer than are needed; names the keys.
    """
    stop, schedule, validation = config.stop, config.schedule, config.validation
    patience = schedule.plateau_patience_validations
    plateau = f"plateau, with plateau_patience_validations = {patience}," if schedule.name == "plateau" else None
    for key, value, effect, needed in (
        ("stop.target_auc", stop.target_auc, "stop the run", 1),
        # The first is the best so far.
        ("stop.patience_validations", stop.patience_validations, "stop the run", (stop.patience_validations or 0) + 1),
        ("schedule.name", plateau, "reduce the rate", patience + 1),
    ):
        if value is None:
            continue
        if not validation_rows:
            reason = "the dataset's val split has no rows; preprocess with one, or leave it out"
        elif not (validation.every_steps or validation.every_rows):
            reason = "the run is validated at its end only; set validation.every_steps or validation.every_rows"
        else:
            steps = range(1, agenda.num_steps)
            due = (step for step in steps if agenda.is_due(step, validation.every_steps, validation.every_rows))
            found = sum(1 for _ in islice(due, needed))
            if found == needed:
                continue
            reason = (
                f"needs {needed:,} validations before the last step, {agenda.num_steps:,}, and the run has {found:,}; "
                "lower validation.every_steps or validation.every_rows, or train longer"
            )
        raise ConfigError(f"{key}: is {value} and could never {effect}: {reason}")


class Schedule:
    """Sets the learning rate of every step.

    Args:
        config: the policy.
        optimizer: its parameter groups hold their base rates when the schedule is made.
        num_steps: the run's last step.
    """

    def __init__(self, config: ScheduleConfig, optimizer: CombinedOptimizer, *, num_steps: int) -> None:
        self._config, self._num_steps = config, num_steps
        self._groups = [(group, float(group["lr"])) for group in optimizer.param_groups]

    def set(self, step: int, plateau_scale: float) -> float:
        """Set the rates of step `step` (from 1), scaled as a `Position` says; returns that of the dense optimizer."""
        rate = 0.0
        for group, base in self._groups:
            rate = learning_rate(base, step, self._config, num_steps=self._num_steps, plateau_scale=plateau_scale)
            group["lr"] = rate
        return rate


def learning_rate(
    base: float, step: int, config: ScheduleConfig, *, num_steps: int, plateau_scale: float = 1.0
) -> float:
    """The rate of a step; `warmup_polynomial` is the policy of facebookresearch/dlrm as it was meant.

    Upstream's code never quite reaches the base rate after its warm-up, and crashes when it decays without one.

    Args:
        base: the base rate.
        step: from 1.
        config: kind, warm-up steps W, decay start D (at least W), decay steps N.
        num_steps: the run's last step, where decay ends when N is not set.
        plateau_scale: what `plateau` multiplies the base rate by; no other kind reads it.

    Returns:
        base * step / W while step <= W; base until D; then with x = (step - D) / N, at most 1, base * (1 - x)^2 or
        base * (1 + cos(pi x)) / 2, not below 1e-7.
    """
    kind = config.kind
    if kind == "plateau":
        base *= plateau_scale
    if step <= config.warmup_steps:
        return base * step / config.warmup_steps
    start = max(config.decay_start_step, config.warmup_steps)
    decay_steps = num_steps - start if config.decay_steps is None else config.decay_steps
    if kind in {"constant", "plateau"} or decay_steps <= 0 or step <= start:
        return base
    done = min(1.0, (step - start) / decay_steps)
    left = (1 - done) ** 2 if kind == "warmup_polynomial" else (1 + math.cos(math.pi * done)) / 2
    return max(MIN_LEARNING_RATE, base * left)


def after_validation(position: Position, auc: float, config: ScheduleConfig) -> Position:
    """The position after a validation: whether it was the best so far, and what is left of the learning rate.

    `plateau` reduces the rate whenever `plateau_patience_validations` in a row, since the best one or since the last
    reduction, had no higher AUC. An undefined AUC says nothing about the rate.

    Args:
        position: before the validation, after its step.
        auc: of the val split; NaN, when the split holds one class only, is never the best.
        config: the policy.
    """
    if auc > (-1.0 if position.best_auc is None else position.best_auc):
        return replace(position, best_auc=auc, best_step=position.step, stale_validations=0)
    stale, scale = position.stale_validations + 1, position.plateau_scale
    is_due = config.kind == "plateau" and stale % config.plateau_patience_validations == 0
    if is_due and not math.isnan(auc):
        scale = min(scale, max(scale * config.plateau_factor, config.plateau_min_fraction))
    return replace(position, stale_validations=stale, plateau_scale=scale)


class Stopwatch:
    """Measures wall time since it was started, pauses left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Measure from now on."""
        self._started_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start; not to be asked within a pause."""
        return time.monotonic() - self._started_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is not measured."""
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._started_s += time.monotonic() - began_s
