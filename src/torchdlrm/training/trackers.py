"""Defines callbacks that send metrics elsewhere: TensorBoard, Weights & Biases and MLflow.

TensorBoard comes with torchdlrm; the other two are optional. Their own environment variables say where they send to
(WANDB_MODE, WANDB_BASE_URL, MLFLOW_TRACKING_URI, ...). trackers.json keeps what they call the run, so that a resumed
run continues in the same place. A tracker that cannot be reached does not end the training.
"""

import json
import logging
import threading
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torchdlrm.config import Config, config_toml, setting_values
from torchdlrm.errors import ConfigError
from torchdlrm.files import write_atomically
from torchdlrm.toml import did_you_mean
from torchdlrm.training.changes import shown
from torchdlrm.training.log import Callback, Metrics, Outcome
from torchdlrm.training.run import TRACKERS_NAME

# What MLflow calls an outcome.
_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}
logger = logging.getLogger("torchdlrm")


class Tracker(Callback, ABC):
    """Receives each defined metric under a name such as `val/auc`.

    One of `TRACKERS` is made from the run's folder, its config, and what it has called the run before (None of a new
    one); its `run_id` is what it calls the run now.
    """

    run_id = ""

    def on_log(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of the train split."""
        self.log(step, _named("train", metrics))

    def on_validation(self, step: int, metrics: Metrics) -> None:
        """Send the metrics of the val split."""
        self.log(step, _named("val", metrics))

    @abstractmethod
    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send metrics by name after `step`."""


def _named(split: str, metrics: Metrics) -> dict[str, float]:
    others = {f"{label}/{name}": value for label, of in metrics.get("labels", {}).items() for name, value in of.items()}
    left_out = {"rows", "labels"}
    return {f"{split}/{name}": v for name, v in {**metrics, **others}.items() if name not in left_out and v is not None}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse trackers that there are not, and those whose package is not installed.

    Raises:
        ConfigError: names every one, and how to install it.
    """
    for name in names:
        if name not in TRACKERS:
            hint = did_you_mean(name, TRACKERS) or f"; there are {', '.join(TRACKERS)}"
            raise ConfigError(f"logging.trackers: there is no tracker {name}{hint}")
    missing = [name for name in names if find_spec(name) is None]  # package and extra have the tracker's name
    if missing:
        lines = [
            f"logging.trackers: {name} is not installed; pip install 'torchdlrm[{name}]', or leave it out"
            for name in missing
        ]
        raise ConfigError("\n".join(lines))


def open_trackers(run_path: Path, config: Config, *, from_step: int) -> list[Tracker]:
    """The trackers that a config asks for.

    Raises:
        ConfigError: a tracker cannot be reached, or does not let us in.
    """
    names = config.logging.trackers
    found: list[Tracker] = [_TensorBoard(run_path, config, from_step)] if config.logging.tensorboard else []
    if not names:
        return found
    path = run_path / TRACKERS_NAME
    ids: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name in names:
        try:
            tracker = TRACKERS[name](run_path, config, ids.get(name))
        except Exception as error:  # what wandb and MLflow raise has no common root, and all of it means this
            for opened in found:
                opened.on_end("failed")
            raise ConfigError(f"logging.trackers: {name} cannot be used: {str(error).splitlines()[0]}") from error
        ids[name] = tracker.run_id
        found.append(tracker)
    write_atomically(path, json.dumps(ids) + "\n")
    return found


class _TensorBoard(Tracker):
    def __init__(self, run_path: Path, config: Config, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - half a second, and optional

        # Before its thread, which may find the disk full at once.
        self._excepthook, threading.excepthook = threading.excepthook, self._thread_ended
        self._writer = SummaryWriter(run_path / "tensorboard", purge_step=from_step + 1)
        self._writer.add_text("config", f"```toml\n{config_toml(config)}```", from_step)
        self._is_broken = False

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if not self._is_broken:
            self._try(lambda: self._write(step, values))

    def on_end(self, outcome: Outcome) -> None:  # noqa: ARG002 - an event file has no such thing
        self._try(self._writer.close)
        threading.excepthook = self._excepthook

    def _thread_ended(self, args: threading.ExceptHookArgs) -> None:
        """Python prints the traceback of a thread; that of the writer's says nothing that `_try` does not say."""
        if not (isinstance(args.exc_value, OSError) and type(args.thread).__name__ == "_AsyncWriterThread"):
            self._excepthook(args)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # what it would hold back for two minutes is lost when the process is killed

    def _try(self, task: Callable[[], object]) -> None:
        """A full disk ends the thread that writes events, which a later event reports; the training continues."""
        try:
            task()
        except OSError as error:
            if not self._is_broken:
                logger.warning("TensorBoard's last events could not be written, and no more will be: %s", error)
            self._is_broken = True


class _Wandb(Tracker):
    def __init__(self, run_path: Path, config: Config, run_id: str | None) -> None:
        import wandb  # noqa: PLC0415 - optional

        self.run_id = run_id or uuid.uuid4().hex[:12]
        self._run: Any = wandb.init(
            project=config.logging.experiment,
            name=run_path.resolve().name,
            id=self.run_id,
            resume="allow",
            dir=run_path,
            config=setting_values(config),
        )
        # wandb's own step never goes back, but a run that was killed does.
        self._run.define_metric("*", step_metric="step")
        self._last_step = int(self._run.summary.get("step") or 0)  # offline it does not know of the run's parts before

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if step < self._last_step:
            return  # sent before the process was killed; wandb cannot delete values
        self._run.log({**values, "step": step})

    def on_end(self, outcome: Outcome) -> None:
        self._run.finish(exit_code=int(outcome != "finished"))


class _Mlflow(Tracker):
    def __init__(self, run_path: Path, config: Config, run_id: str | None) -> None:
        import mlflow  # noqa: PLC0415 - optional

        self._mlflow: Any = mlflow
        self._client: Any = mlflow.MlflowClient()
        self._last_steps: dict[str, int] = {}
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            for metric in self._client.get_run(run_id).data.metrics:
                self._last_steps[metric] = max(m.step for m in self._client.get_metric_history(run_id, metric))
            return
        name = config.logging.experiment
        experiment = self._client.get_experiment_by_name(name)
        experiment_id = experiment.experiment_id if experiment else self._client.create_experiment(name)
        self.run_id = self._client.create_run(experiment_id, run_name=run_path.resolve().name).info.run_id
        params = [self._mlflow.entities.Param(key, str(shown(value))) for key, value in setting_values(config).items()]
        self._client.log_batch(self.run_id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now_ms = int(time.time() * 1000)
        metrics = [
            self._mlflow.entities.Metric(name, value, now_ms, step)
            for name, value in values.items()
            if step > self._last_steps.get(name, 0)  # sent before the process was killed; MLflow cannot delete values
        ]
        try:
            self._client.log_batch(self.run_id, metrics=metrics)
        except (OSError, self._mlflow.MlflowException) as error:
            logger.warning("MLflow did not take the metrics of step %d: %s", step, error)

    def on_end(self, outcome: Outcome) -> None:
        try:
            self._client.set_terminated(self.run_id, _STATUS[outcome])
        except (OSError, self._mlflow.MlflowException) as error:
            logger.warning("MLflow did not take that the run has ended: %s", error)


# By the name that `logging.trackers`, its package and the extra of torchdlrm have.
TRACKERS: dict[str, Callable[[Path, Config, str | None], Tracker]] = {"wandb": _Wandb, "mlflow": _Mlflow}
