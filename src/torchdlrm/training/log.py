"""Reports a training while it runs and when it ends: callbacks, metrics.jsonl, the history.

In: metrics of an interval or a validation.  Out: a line of metrics.jsonl, and the same for every callback. Trackers
(`torchdlrm.training.trackers`) are callbacks too.
"""

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torchdlrm.errors import Interrupted, StorageError
from torchdlrm.files import sync, write_atomically
from torchdlrm.metrics import LOSS, BinaryMetrics, first_and_others, metrics_in, why_undefined
from torchdlrm.notebook import notebook_view
from torchdlrm.training.checkpoint import Position, publish_logs
from torchdlrm.training.run import METRICS_NAME
from torchdlrm.units import show_count, show_number

if TYPE_CHECKING:
    from torchdlrm.training.steps import Agenda

Outcome = Literal["finished", "interrupted", "failed"]
Metrics = Mapping[str, Any]
logger = logging.getLogger("torchdlrm")


class Callback:
    """Receives the events of a training, on rank 0 alone; a subclass overrides the methods that it needs.

    Metrics come by name: `rows` (training rows read up to then, over all ranks), `loss`, the metrics of the place `log`
    such as `ne` and `auc`, `learning_rate` of the dense optimizer, and `rows_per_s`. One that is not defined, as the
    AUC of rows of one label, is None. Of several labels they are of the first, and `labels` has those of the others. An
    exception that a callback raises ends the training.
    """

    def on_log(self, step: int, metrics: Metrics) -> None:
        """An interval of `logging.every_steps` is over.

        Args:
            step: optimizer steps done.
            metrics: of the interval's rows, each predicted before the model learnt from it.
        """

    def on_validation(self, step: int, metrics: Metrics) -> str | None:  # noqa: ARG002 - subclasses read them
        """The val split was predicted.

        Args:
            step: optimizer steps done.
            metrics: of the split's rows; `rows_per_s` is the speed of the validation.

        Returns:
            Why the training is to stop here, in a word such as `pruned`, which is its `stopped_because` then: the run
            is saved, and the same call trains it on. None lets it go on.
        """
        return None

    def on_checkpoint(self, step: int, path: Path) -> None:
        """A checkpoint is complete and on disk.

        Args:
            step: after which the state was saved; with `checkpoint.asynchronous` later steps may be done by now.
            path: its folder, which is removed when `checkpoint.keep_last` newer ones are there, unless it is the best.
        """

    def on_end(self, outcome: Outcome) -> None:
        """The training of this process ends, whatever the reason; every callback is called, the last one first.

        Args:
            outcome: `finished`, also by early stopping; `interrupted` by SIGTERM or Ctrl-C; `failed` by an exception.
                An interrupted or failed run may be resumed by another process.
        """


@contextmanager
def ending(callbacks: Sequence[Callback]) -> Iterator[None]:
    """Inside a training runs; whatever ends it, each callback hears how, also when another one raises."""
    outcome: Outcome = "failed"
    try:
        yield
        outcome = "finished"
    except (Interrupted, KeyboardInterrupt):
        outcome = "interrupted"
        raise
    finally:
        with ExitStack() as calls:
            for callback in callbacks:
                calls.callback(callback.on_end, outcome)


class MetricsLog(Callback):
    """Appends every interval and every validation to the metrics.jsonl of a run.

    Args:
        run_path: the run's folder.
        from_step: where the run resumes; what an interrupted process has written beyond it is removed.
    """

    def __init__(self, run_path: Path, *, from_step: int) -> None:
        path = run_path / METRICS_NAME
        if path.exists():
            kept = (json.dumps(line) for line in read_metrics(path) if line["step"] <= from_step)
            write_atomically(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Write a line of the train split."""
        self._write(step, "train", metrics)

    def on_validation(self, step: int, metrics: Metrics) -> None:
        """Write a line of the val split."""
        self._write(step, "val", metrics)

    def on_end(self, outcome: Outcome) -> None:  # noqa: ARG002 - the file is the same
        """Close the file, which is on the disk itself then, and publish what a run at a URL has logged."""
        folder = Path(self._file.name).parent
        with suppress(OSError), self._file:
            os.fsync(self._file.fileno())
            sync(folder)
        try:
            publish_logs(folder / "checkpoints")
        except StorageError as error:
            logger.warning("the last metrics could not be published: %s", error)

    def _write(self, step: int, split: str, metrics: Metrics) -> None:
        line = {"step": step, "rows": metrics["rows"], "split": split, **metrics, "time": time.time()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:  # a full disk must not end a training
            logger.warning("the metrics of step %d could not be written: %s", step, error)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl in their order; what is damaged or just being written is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if not isinstance(line, dict) or line.get("split") not in ("train", "val"):
            continue
        if all(isinstance(line.get(key), int | float) for key in ("rows", "step")):
            lines.append(line)
    return lines


@dataclass(frozen=True)
class TrainingSummary:
    """How a run ended.

    Attributes:
        step: the last optimizer step.
        rows: training rows read up to then, over all ranks.
        resumed_from_step: where this process resumed the run; 0 for a new run.
        seconds: wall time of this process's training steps, validation left out.
        rows_per_s: rows that these steps read, per second; 0 when there was nothing left to do.
        stopped_because: `finished`, `target_auc`, `patience`, or what a callback has said.
        best_auc: highest AUC of the val split, None without validation.
        best_step: the step that had it.
        validation: metrics of the val split after the last step, None when nothing was validated; in it what is not
            defined is None, and `labels` has those of labels behind the first.
    """

    step: int
    rows: int
    resumed_from_step: int
    seconds: float
    rows_per_s: float
    stopped_because: str
    best_auc: float | None
    best_step: int | None
    validation: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """The summary as JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingHistory:
    """What a call of `train` gives back: how the run went and how it ended.

    Attributes:
        summary: how it ended.
        metrics: all lines of metrics.jsonl in their order, also those from before the run was resumed.
    """

    summary: TrainingSummary
    metrics: list[dict[str, Any]]

    def series(self, split: str, name: str) -> list[tuple[int, float]]:
        """One metric over the steps, where it is defined.

        Args:
            split: `train` (each interval's rows, before the model learnt from them) or `val`.
            name: such as `auc` or `loss`.
        """
        lines = (line for line in self.metrics if line["split"] == split and line.get(name) is not None)
        return [(line["step"], line[name]) for line in lines]

    def _repr_html_(self) -> str:
        """What a notebook shows: how it ended, and its last validations."""
        summary = self.summary
        facts = {
            "steps": summary.step,
            "rows": summary.rows,
            "rows/s": summary.rows_per_s,
            "best AUC": summary.best_auc,
        }
        return notebook_view(f"training, {summary.stopped_because}", facts, _validations(self.metrics))


def _validations(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The last ten validations, for a notebook."""
    names = ["loss", *logged_names()]  # as the file calls them
    return [
        {"step": line["step"]} | {name: line.get(name) for name in names} for line in lines if line["split"] == "val"
    ][-10:]


def validation_line(step: int, agenda: "Agenda", metrics: Mapping[str, BinaryMetrics], *, is_best: bool) -> str:
    """A validation in a line, with the metrics of each label; those of a run have the same width."""
    width = len(f"{agenda.num_steps:,}")
    where = f"step {step:>{width},} epoch {step / agenda.steps_per_epoch:.2f}"
    rows = show_count(agenda.rows_after(step))
    of_labels = {name: of.as_dict() for name, of in metrics.items()}
    undefined = why_undefined(next(iter(of_labels.values())))
    shown = ", ".join(
        " ".join([name] * (len(metrics) > 1) + [f"{of.label} {show_number(values[of.name], 4)}" for of in logged])
        for logged in [metrics_in("log")]
        for name, values in of_labels.items()
    )
    best = " best" if is_best else f" ({undefined})" if undefined else ""
    return f"{where} {rows:>7} rows  val {shown}{best}"


def bar_figures(metrics: BinaryMetrics) -> dict[str, str]:
    """What is shown below the bar of a training, by the name that it has there."""
    values = metrics.as_dict()
    shown = {metric.label: show_number(values[metric.name], 4) for metric in metrics_in("bar")}
    return {"loss": show_number(values[LOSS], 4), **shown}


def plateau_line(position: Position) -> str:
    """In a line, that the learning rate is lower from the next step on."""
    stale = position.stale_validations
    return (
        f"step {position.step:,}: {stale:,} validation{'s' if stale > 1 else ''} without a better AUC since step "
        f"{position.best_step:,}: from now on the learning rates are {position.plateau_scale:.3g} times the base rates"
    )


def metrics_for_callbacks(
    metrics: Mapping[str, BinaryMetrics], *, rows: int, learning_rate: float, rows_per_s: float
) -> Metrics:
    """Return the metrics of labels that callbacks receive, by the names and in the order of metrics.jsonl."""

    def logged(of_label: BinaryMetrics) -> dict[str, Any]:
        values = of_label.as_json()
        return {"loss": values[LOSS], **{name: values[name] for name in logged_names()}}

    of_rows = first_and_others(metrics, logged)
    return {"rows": rows, **of_rows, "learning_rate": learning_rate, "rows_per_s": rows_per_s}


def logged_names() -> list[str]:
    """The metrics of metrics.jsonl besides the loss, in its order."""
    return [metric.name for metric in reversed(metrics_in("log")) if metric.name != LOSS]
