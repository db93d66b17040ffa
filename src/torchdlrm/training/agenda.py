"""Which step is the last, how many rows are read after each, and what is due: arithmetic, no files."""

from dataclasses import dataclass
from itertools import islice

from torchdlrm.config import Config
from torchdlrm.errors import ConfigError
from torchdlrm.loader.row_order import num_batches


def check_early_stopping(config: Config, agenda: "Agenda", *, validation_rows: int) -> None:
    """Refuse early stopping that can never act: it looks at validations before the last step.

    Args:
        config: of the run.
        agenda: its steps.
        validation_rows: of the val split.

    Raises:
        ConfigError: there are no such validations, or fewer than are needed; names the keys.
    """
    stop, validation = config.stop, config.validation
    for key, value, needed in (
        ("target_auc", stop.target_auc, 1),
        # The first is the best so far.
        ("patience_validations", stop.patience_validations, (stop.patience_validations or 0) + 1),
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
        msg = f"stop.{key}: is {value} and could never stop the run: {reason}"
        raise ConfigError(msg)


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

    def is_every(self, step: int, every_steps: int) -> bool:
        """Whether it is time again after `step`; 0 is never."""
        return every_steps > 0 and step % every_steps == 0

    def is_due(self, step: int, every_steps: int, every_rows: int = 0) -> bool:
        """Whether it is time again after `step`, by steps or by rows, or for the last time."""
        by_rows = every_rows > 0 and self.rows_after(step) // every_rows > self.rows_after(step - 1) // every_rows
        return step == self.num_steps or by_rows or self.is_every(step, every_steps)
