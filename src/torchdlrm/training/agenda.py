"""Which step is the last, how many rows are read after each, and what is due: arithmetic, no files."""

from dataclasses import dataclass

from torchdlrm.config import Config
from torchdlrm.loader.plan import num_batches


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
