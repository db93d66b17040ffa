"""How a training goes and how it ended, in figures."""

from dataclasses import asdict, dataclass
from typing import Any

from torchdlrm.metrics import BinaryMetrics, why_undefined
from torchdlrm.training.agenda import Agenda
from torchdlrm.units import show_count


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
        validation: metrics of the val split after the last step, None when nothing was validated; in it what is not
            defined is None.
    """

    step: int
    rows: int
    resumed_from_step: int
    seconds: float
    rows_per_s: float
    stopped_because: str
    best_auc: float | None
    best_step: int | None
    validation: dict[str, int | float | None] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def validation_line(step: int, agenda: Agenda, metrics: BinaryMetrics, *, is_best: bool) -> str:
    """A validation in a line; those of a run have the same width."""
    width = len(f"{agenda.num_steps:,}")
    where = f"step {step:>{width},} epoch {step / agenda.steps_per_epoch:.2f}"
    rows = show_count(agenda.rows_after(step))
    undefined = why_undefined(metrics.as_dict())
    auc, ne = ("-", "-") if undefined else (f"{metrics.auc:.4f}", f"{metrics.ne:.4f}")
    best = " best" if is_best else f" ({undefined})" if undefined else ""
    return f"{where} {rows:>7} rows  val AUC {auc} logloss {metrics.logloss:.4f} NE {ne}{best}"
