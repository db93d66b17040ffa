"""A run on disk: its folder, what it was started with, and whether it can go on.

run/
  config.toml  plan.json  environment.json  metrics.jsonl  tensorboard/  checkpoints/step-00001000/  evaluation/
  profile/
"""

import fcntl
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from pydantic import TypeAdapter, ValidationError

from torchdlrm.config import Config, config_toml, load_config, setting_values
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import RunError
from torchdlrm.files import replacing, sync
from torchdlrm.training.environment import Environment, environment_now, manifest_sha256, read_environment

CONFIG_NAME, PLAN_NAME, ENVIRONMENT_NAME, METRICS_NAME = "config.toml", "plan.json", "environment.json", "metrics.jsonl"
LOCK_NAME, TRACKERS_NAME = ".lock", "trackers.json"
# With another value of these, the saved weights, optimizer state or position mean something else.
KEYS_THAT_CANNOT_CHANGE = ("seed", "model.", "train.batch_size_global", "table_optimizer.name", "dense_optimizer.name")


@dataclass(frozen=True)
class Change:
    """A key of the config that differs between the start of a run and now."""

    key: str
    before: object
    now: object

    @property
    def is_fatal(self) -> bool:
        """Whether the run cannot go on with it."""
        return any(
            self.key == name or (name.endswith(".") and self.key.startswith(name)) for name in KEYS_THAT_CANNOT_CHANGE
        )

    def __str__(self) -> str:
        return f"{self.key}: was {shown(self.before)}, is {shown(self.now)}"


class Run:
    """The folder of a run.

    Args:
        path: the folder.
        config: what the run is trained with.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self._lock: IO[str] | None = None

    @classmethod
    def start(cls, path: Path, config: Config, dataset: Dataset, *, world_size: int, restart: bool = False) -> Self:
        """Make the folder, or take up the run that is in it, and keep others out until this process ends.

        Args:
            path: the folder.
            config: what to train with; where the run is there already, some keys may have changed.
            dataset: what to train on; must be the same.
            world_size: number of processes, which may have changed.
            restart: remove what is there and begin anew.

        Raises:
            RunError: another process is training in it, something else is in it, or the config or dataset has
                changed in a way that makes going on impossible; lists every difference.
        """
        run = cls(path, config)
        try:
            path.mkdir(parents=True, exist_ok=True)
            run._lock_folder()
            run._remove_left_overs()
            if restart:
                run._clear()
            run.check(dataset)
            environment = run.environment if run.exists else environment_now(dataset, world_size)
            if not run.exists or environment["dataset"]["path"] != str(dataset.path.resolve()):  # it may have moved
                environment["dataset"]["path"] = str(dataset.path.resolve())
                write_atomically(path / ENVIRONMENT_NAME, json.dumps(environment, indent=1) + "\n")
            write_atomically(path / CONFIG_NAME, config_toml(config))
        except OSError as error:
            run.close()
            msg = f"--run: cannot write to {path}: {error.strerror}"
            raise RunError(msg) from error
        except RunError:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path) -> Self:
        """A run that was started before.

        Raises:
            RunError: there is none.
        """
        if not (path / CONFIG_NAME).is_file():
            msg = f"{path}: there is no run here (no {CONFIG_NAME}); dlrm train makes one"
            raise RunError(msg)
        return cls(path, load_config(path / CONFIG_NAME, is_of_run=True))

    @property
    def exists(self) -> bool:
        """Whether the run has been started before."""
        return (self.path / CONFIG_NAME).is_file()

    @property
    def checkpoints(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    @property
    def profile(self) -> Path:
        """The folder of traces of single steps."""
        return self.path / "profile"

    @property
    def environment(self) -> Environment:
        """Versions, machine and dataset that the run started with.

        Raises:
            RunError: the file that says it is damaged or missing.
        """
        return read_environment(self.path / ENVIRONMENT_NAME)

    def check(self, dataset: Dataset) -> list[Change]:
        """See whether the run can be started, or taken up where it is.

        Returns:
            The keys that have changed without harm.

        Raises:
            RunError: it cannot; lists every difference.
        """
        if not self.exists:
            if self.path.exists() and not (self.path.is_dir() and all(map(_is_of_a_start, self.path.iterdir()))):
                msg = f"--run: {self.path} is not empty and holds no run; give another folder"
                raise RunError(msg)
            return []
        changes = self._changes()
        fatal = [f"{change}; the saved state means something else with it" for change in changes if change.is_fatal]
        if manifest_sha256(dataset) != self.environment["dataset"]["manifest_sha256"]:
            fatal.append(
                f"--dataset: was {self.environment['dataset']['path']}, is {dataset.path} (another dataset.json)"
            )
        if fatal:
            harmless = [f"{change}; would do no harm" for change in changes if not change.is_fatal]
            lines = [f"{self.path}: the run in it cannot go on with what is asked now:", *fatal, *harmless]
            remedy = "give what it was started with, another --run, or --restart to remove it and begin anew"
            raise RunError("\n  ".join([*lines, remedy]))
        return changes

    def open_dataset(self, path: Path | None = None) -> Dataset:
        """The dataset that the run was trained on, found where it was then or at `path`.

        Raises:
            DatasetError: `path` is no dataset.
            RunError: it has moved, or another dataset is there.
        """
        trained_on = self.environment["dataset"]
        if path is None and not Path(trained_on["path"]).is_dir():
            msg = f"{self.path}: its dataset is not at {trained_on['path']} any more; say with --dataset where it is"
            raise RunError(msg)
        dataset = Dataset.open(path or Path(trained_on["path"]))
        if manifest_sha256(dataset) != trained_on["manifest_sha256"]:
            msg = (
                f"{dataset.path}: not the dataset that {self.path} was trained on (its dataset.json differs), so the "
                "ids do not mean the same; say with --dataset where that one is"
            )
            raise RunError(msg)
        return dataset

    def write_evaluation(self, name: str, result: Mapping[str, object]) -> Path:
        """Write a result under evaluation/, whole or not at all."""
        path = self.path / "evaluation" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        return path

    def evaluations(self) -> dict[str, dict[str, Any]]:
        """What `write_evaluation` has written, by name.

        Raises:
            RunError: a file is damaged.
        """
        results = {}
        for path in sorted((self.path / "evaluation").glob("*.json")):
            try:
                results[path.stem] = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                msg = f"{path}: damaged; remove it, and let dlrm evaluate write it again"
                raise RunError(msg) from error
        return results

    def close(self) -> None:
        """Let others train in the folder; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _changes(self) -> list[Change]:
        before, now = setting_values(load_config(self.path / CONFIG_NAME, is_of_run=True)), setting_values(self.config)
        return [Change(name, before[name], now[name]) for name in now if before[name] != now[name]]

    def _lock_folder(self) -> None:
        """Hold the folder until this process ends, however it ends."""
        self._lock = (self.path / LOCK_NAME).open("a", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            msg = f"--run: another process is training in {self.path}; wait for it, or give another folder"
            raise RunError(msg) from error

    def _remove_left_overs(self) -> None:
        """Remove what a process that was killed has half written; whoever holds the lock knows that nobody writes."""
        names = (CONFIG_NAME, PLAN_NAME, ENVIRONMENT_NAME, METRICS_NAME, TRACKERS_NAME)
        for path in (path for name in names for path in self.path.glob(f".{name}.*")):
            path.unlink()
        for path in self.profile.glob(".*.json*"):
            path.unlink()
        for path in self.checkpoints.glob(".step-*"):  # .partial, and .old: one that was being removed
            path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def _clear(self) -> None:
        """Remove what a run has written, and nothing else."""
        if not self.exists:
            return
        for name in ("tensorboard", "checkpoints", "evaluation", "profile", "wandb"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (METRICS_NAME, PLAN_NAME, ENVIRONMENT_NAME, TRACKERS_NAME, CONFIG_NAME):
            (self.path / name).unlink(missing_ok=True)


def _is_of_a_start(path: Path) -> bool:
    """Whether a first start leaves this that was killed, or found the disk full, before it had written the config."""
    temporary = tuple(f".{name}." for name in (ENVIRONMENT_NAME, CONFIG_NAME))
    return path.name in {LOCK_NAME, ENVIRONMENT_NAME} or path.name.startswith(temporary)


def shown(value: object) -> object:
    """A setting's value for people."""
    return "not set" if value is None else list(value) if isinstance(value, tuple) else value


def write_atomically(path: Path, text: str) -> None:
    """Write a file, whole or not at all, whatever ends this process or the machine."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")
        sync(beside)
