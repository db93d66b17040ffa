"""How a training ended, in figures."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Attributes:
        step: the last optimizer step.
        rows: training rows read up to then, over all ranks.
        resumed_from_step: where this process took the run up; 0 for a new run.
        seconds: wall time of this process's training steps, validation left out.
        rows_per_s: rows that these steps read, per second; 0 when there was nothing left to do.
        stopped_because: `finished`, `target_auc` or `patience`.
        best_auc: highest AUC of the val split, None without validation.
        best_step: the step that had it.
        validation: metrics of the val split after the last step, None when nothing was validated.
    """

    step: int
    rows: int
    resumed_from_step: int
    seconds: float
    rows_per_s: float
    stopped_because: str
    best_auc: float | None
    best_step: int | None
    validation: dict[str, int | float] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
