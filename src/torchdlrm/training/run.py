"""Describes a run on disk: its folder, what it was started with and on, and whether it can be resumed.

run/
  config.toml  plan.json  environment.json  metrics.jsonl  tensorboard/  checkpoints/step-00001000/  evaluation/
  profile/
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import TypeAdapter, ValidationError

from torchdlrm.config import Config, config_toml, load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import MANIFEST_NAME
from torchdlrm.errors import RunError, UserError
from torchdlrm.files import sha256_of, write_atomically
from torchdlrm.folders import wrong_folder
from torchdlrm.metrics import metrics_of_any
from torchdlrm.model.architecture import Architecture, ModelShape
from torchdlrm.model.model_class import ModelClass, ModelClassRecord, architecture_of, difference_from, record_of
from torchdlrm.notebook import notebook_view
from torchdlrm.records import problems
from torchdlrm.storage import mirror, places
from torchdlrm.storage.lease import held
from torchdlrm.training.changes import Change, changes_between
from torchdlrm.training.checkpoint import list_checkpoints
from torchdlrm.training.environment import Environment, WarmStartRecord, environment_now, manifest_sha256

if TYPE_CHECKING:
    from torchdlrm.sharding.solution import Solution

CONFIG_NAME, PLAN_NAME, ENVIRONMENT_NAME, METRICS_NAME = "config.toml", "plan.json", "environment.json", "metrics.jsonl"
LOCK_NAME, TRACKERS_NAME = ".lock", "trackers.json"
# Of a run at a URL, what is looked at from the start; weights are fetched when they are read.
_SMALL_FILES = (CONFIG_NAME, "*.json", METRICS_NAME)


class Run:
    """The folder of a run, and the config that it is trained with."""

    def __init__(self, path: Path, config: Config) -> None:
        self.path = path
        self.config = config
        self.confirm: Callable[[], None] = lambda: None
        self._held = ExitStack()  # the lock of this host, and the lease in the bucket

    def start(
        self,
        dataset: Dataset,
        *,
        world_size: int,
        num_steps: int | None = None,
        restart: bool = False,
        architecture: Architecture | None = None,
        warm_start: WarmStartRecord | None = None,
        launchers: Collection[str] = (),
        waiting: Callable[[str], None] | None = None,
    ) -> Self:
        """Make the folder, or resume the run that is in it, and keep others out until this process ends.

        Args:
            dataset: what to train on; must be the same.
            world_size: number of processes, which may have changed.
            num_steps: the last step; the config of a run that has done it stays what it is.
            restart: remove what is there and begin again.
            architecture: of the model; must be the same.
            warm_start: what a new run is started from.
            launchers: names of what has started the processes on each machine.
            waiting: is given a sentence where another host seems to train in it, which is waited for, once.

        Raises:
            StorageError: another host is training in it.
            RunError: another process is training in it, something else is in it, or config, dataset or model class
                have changed in a way that makes resuming impossible; lists every difference.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            in_use = RunError(f"`run`: another process is training in {self.path}; wait for it, or give another folder")
            self.confirm = self._held.enter_context(held(self.path / LOCK_NAME, in_use, waiting))
            self._remove_left_overs()
            if restart:
                self._clear()
            self.check(dataset, architecture, num_steps=num_steps)
            if self.exists:
                self.take_place(dataset)
            else:
                started_from = {} if warm_start is None else {"warm_start": warm_start}
                self._write_environment(environment_now(dataset, world_size, architecture) | started_from)
            if not self._has_done(num_steps):
                write_atomically(self.path / CONFIG_NAME, config_toml(self.config))
            (self.path / LOCK_NAME).write_text(" ".join(launchers), encoding="utf-8")
        except OSError as error:
            self.close()
            raise RunError(f"`run`: cannot write to {self.path}: {error.strerror}") from error
        except UserError:
            self.close()
            raise
        return self

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """A run that was started before.

        Raises:
            RunError: there is none.
            StorageError: the bucket that it is in cannot be read.
        """
        path = fetch_run(path)
        if not (path / CONFIG_NAME).is_file():
            raise wrong_folder(path, "run")
        return cls(path, load_config(path / CONFIG_NAME, is_of_run=True))

    @classmethod
    def find(cls, name: str, folders: Collection[Path]) -> "Run | None":
        """The run of this name in one of some folders, if there is one; a bundle says the name of its run."""
        is_name = Path(name).name == name  # else it would lead anywhere
        paths = (folder / name for folder in folders if is_name)
        found = next((path for path in paths if fetch_run(path).is_dir()), None)
        return None if found is None else cls.open(found)

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
        path = self.path / ENVIRONMENT_NAME
        try:
            return TypeAdapter(Environment).validate_json(path.read_bytes())
        except OSError as error:
            why = error.strerror or str(error)
        except ValidationError as error:
            why = "; ".join(["damaged", *(line.strip() for line in problems(error))])
        raise RunError(
            f"{path}: {why}. It says which dataset the run belongs to: put it back from a copy, or from another run on "
            "the same dataset"
        )

    @property
    def is_in_use(self) -> bool:
        """Whether a process of this host is training in it."""
        return _is_in_use(self.path)

    def was_started_by(self, launchers: Collection[str]) -> bool:
        """Whether one of these has started the processes that trained in it last; its lock tells."""
        try:
            recorded = (self.path / LOCK_NAME).read_text(encoding="utf-8").split()
        except (OSError, ValueError):
            return False
        return not {*recorded}.isdisjoint(launchers)

    @property
    def model_class(self) -> ModelClassRecord | None:
        """Name and checksum of the class of the run's model, where it is not the DLRM itself."""
        return self.environment.get("model_class")

    def shape(
        self, dataset: Dataset, model_class: ModelClass | None = None, *, allow_changed_model_class: bool = False
    ) -> ModelShape:
        """Architecture and sizes of the run's model.

        Args:
            dataset: that it was trained on.
            model_class: that it was trained with, where it was not the DLRM itself.
            allow_changed_model_class: take it though its file has changed since.

        Raises:
            ConfigError: there is no such model class.
            RunError: the run was trained with another one.
        """
        architecture = architecture_of(self.config.model, model_class, may_have_changed=allow_changed_model_class)
        self.require(architecture)
        return ModelShape.of(self.config.model, dataset, architecture)

    def require(self, architecture: Architecture) -> None:
        """See that the run was trained with this architecture.

        Raises:
            RunError: it was trained with another one.
        """
        difference = difference_from(self.model_class, architecture, "run")
        if difference is not None:
            raise RunError(f"{self.path}: {difference}")

    def record_init_table(self, name: str, file: str, num_known: int, num_unknown: int) -> None:
        """Record what a table has begun with: a file, how many values have a vector in it, and how many have none."""
        sha256 = sha256_of(mirror.fetch(places.located(file)))
        record = {"file": file, "sha256": sha256, "known": num_known, "unknown": num_unknown}
        tables = {**self.environment.get("init_tables", {}), name: record}
        self._write_environment({**self.environment, "init_tables": tables})

    def take_model_class(self, architecture: Architecture) -> None:
        """Record the file of a model class that was allowed to be another one, once it has loaded the checkpoint."""
        record = record_of(architecture)
        if record != self.model_class and record is not None:
            self._write_environment({**self.environment, "model_class": record})

    def check(
        self, dataset: Dataset, architecture: Architecture | None = None, *, num_steps: int | None = None
    ) -> list[Change]:
        """See whether the run can be started, or resumed where it is, and is of this config if it has `num_steps`.

        Returns:
            The keys that have changed without harm.

        Raises:
            RunError: it cannot; lists every difference.
        """
        if not self.exists:
            if self.path.exists() and not (self.path.is_dir() and all(map(_is_of_a_start, self.path.iterdir()))):
                raise RunError(f"`run`: {self.path} is not empty and holds no run; give another folder")
            return []
        changes = changes_between(load_config(self.path / CONFIG_NAME, is_of_run=True), self.config)
        fatal = [f"{change}; the saved state means something else with it" for change in changes if change.is_fatal]
        trained_on = self.environment["dataset"]
        if manifest_sha256(dataset) != trained_on["manifest_sha256"]:
            fatal.append(f"`dataset`: was {trained_on['path']}, is {dataset.path} (another dataset.json)")
        late = [change for change in changes if self._has_done(num_steps) and change.is_too_late(self.config)]
        fatal += [f"{change}; the run is complete, trained with what it was" for change in late]
        before, now = self.model_class, record_of(architecture)
        difference = difference_from(before, architecture, "run")
        if difference is not None:
            fatal.append(difference)
        elif before is not None and now is not None and before != now:
            changes.append(Change(f"the file of {now.name}", f"sha256 {before.sha256}", f"sha256 {now.sha256}"))
        if fatal:
            harmless = [f"{change}; would do no harm" for change in changes if not (change.is_fatal or change in late)]
            lines = [f"{self.path}: the run in it cannot be resumed with what is asked now:", *fatal, *harmless]
            remedy = "give what it was started with, another `run`, or `restart` to remove it and begin again"
            if len(fatal) == len(late):
                key = "max_steps" if self.config.train.max_steps == num_steps else "epochs"
                is_now = f"train.{key}, which is {getattr(self.config.train, key)},"
                remedy += f"; or raise {is_now} to continue from here with these"
            raise RunError("\n  ".join([*lines, remedy]))
        return changes

    def open_dataset(self, dataset: Dataset | str | Path | None = None) -> Dataset:
        """The dataset that the run was trained on.

        Args:
            dataset: it or its folder; None where it is still where it was.

        Raises:
            DatasetError: there is no dataset in the folder.
            RunError: it has moved, or another dataset is there.
        """
        trained_on = self.environment["dataset"]
        place = mirror.fetch(places.located(trained_on["path"]), [MANIFEST_NAME])
        if dataset is None and not place.is_dir():
            msg = f"{self.path}: its dataset is not at {trained_on['path']} any more; say with `dataset` where it is"
            raise RunError(msg)
        if not isinstance(dataset, Dataset):
            dataset = Dataset.open(dataset or place)
        if manifest_sha256(dataset) != trained_on["manifest_sha256"]:
            raise RunError(
                f"{dataset.path}: not the dataset that {self.path} was trained on (its dataset.json differs), so the "
                "ids do not mean the same; say with `dataset` where that one is"
            )
        return dataset.with_labels(self.config.train.label_names)

    def take_place(self, dataset: Dataset) -> None:
        """Record where the dataset is, if it has moved; it must be the one that the run was trained on."""
        environment, place = self.environment, places.shown(dataset.path.resolve())
        if environment["dataset"]["path"] != place:
            environment["dataset"]["path"] = place
            self._write_environment(environment)

    def write_plan(self, solution: "Solution") -> None:
        """Write down where each table is."""
        from torchdlrm.sharding.plan_file import write_plan  # noqa: PLC0415 - with TorchRec, which a report can do without

        write_plan(self.path / PLAN_NAME, solution)

    def write_evaluation(self, name: str, result: Mapping[str, object]) -> Path:
        """Write a result under evaluation/, atomically."""
        path = self.path / "evaluation" / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(result, indent=1) + "\n")
        return path

    def evaluations(self, folder: str = "") -> dict[str, dict[str, Any]]:
        """What `write_evaluation` has written, by name, into evaluation/ or a folder of it.

        Raises:
            RunError: a file is damaged.
        """
        results = {}
        for path in sorted((self.path / "evaluation" / folder).glob("*.json")):
            try:
                results[path.stem] = TypeAdapter(dict[str, Any]).validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                raise RunError(f"{path}: damaged; remove it, and let dlrm evaluate write it again") from error
        return results

    def _repr_html_(self) -> str:
        """What a notebook shows: its model, and its evaluations."""
        model = self.config.model
        facts = {"interaction": model.interaction, "embedding dimension": model.embedding_dim}
        evaluations = self.evaluations()
        names = [metric.name for metric in metrics_of_any([*evaluations.values()])]
        rows = [
            {"evaluation": evaluation, "rows": result.get("rows")} | {name: result.get(name) for name in names}
            for evaluation, result in evaluations.items()
        ]
        return notebook_view(f"run {self.path}", facts | {"seed": self.config.seed}, rows)

    def close(self) -> None:
        """Let others train in the folder; the end of the process does it too."""
        self._held.close()

    def _write_environment(self, environment: Mapping[str, object]) -> None:
        text = json.dumps(environment, indent=1, default=ModelClassRecord.model_dump)
        write_atomically(self.path / ENVIRONMENT_NAME, text + "\n")

    def _has_done(self, num_steps: int | None) -> bool:
        return num_steps is not None and max(list_checkpoints(self.checkpoints), default=-1) >= num_steps

    def _remove_left_overs(self) -> None:
        """Remove what a killed process has half written; the holder of the lock knows that no other writes."""
        names = (CONFIG_NAME, PLAN_NAME, ENVIRONMENT_NAME, METRICS_NAME, TRACKERS_NAME)
        for path in (path for name in names for path in self.path.glob(f".{name}.*")):
            path.unlink()
        for path in self.profile.glob(".*.json*"):
            path.unlink()
        for path in self.checkpoints.glob("step-*"):
            if path.is_dir() and not any(path.iterdir()):  # killed while it was published
                mirror.remove(path)
        for path in self.checkpoints.glob(".step-*"):  # .partial, and .old: one that was being removed
            path.unlink() if path.is_symlink() else shutil.rmtree(path)

    def _clear(self) -> None:
        """Remove what a run has written, and nothing else."""
        if not self.exists:
            return
        for name in ("tensorboard", "checkpoints", "evaluation", "profile", "wandb"):
            mirror.remove(self.path / name)
            shutil.rmtree(self.path / name, ignore_errors=True)
        for name in (METRICS_NAME, PLAN_NAME, ENVIRONMENT_NAME, TRACKERS_NAME, CONFIG_NAME):
            mirror.remove(self.path / name)
            (self.path / name).unlink(missing_ok=True)


def fetch_run(path: str | Path) -> Path:
    """The folder of a run, if there is one; of a run at a URL, small files as the bucket has them.

    Where a process of this host is training in it, what is here is newer.

    Raises:
        StorageError: the bucket cannot be read.
    """
    path = places.located(path)
    return path if _is_in_use(path) else mirror.fetch(path, _SMALL_FILES)


def _is_in_use(path: Path) -> bool:
    try:
        with (path / LOCK_NAME).open(encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _is_of_a_start(path: Path) -> bool:
    """Whether a first start leaves this that was killed, or found the disk full, before it had written the config."""
    temporary = tuple(f".{name}." for name in (ENVIRONMENT_NAME, CONFIG_NAME))
    return path.name in {LOCK_NAME, ENVIRONMENT_NAME} or path.name.startswith(temporary)
