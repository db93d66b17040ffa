"""Runs a sweep: trials with other values of some keys of a config; the best are repeated with other seeds and judged.

sweep/
  journal.log  trials/007/  finalists/007-seed-1/  best.toml  report.html

Trials and repetitions are ordinary runs; `journal.log` is Optuna's. Any number of processes work on a folder, each job
under a lock that ends with its process: then another one resumes the run. No sampler keeps a state: each is seeded for
one trial and key, so that kills change nothing.
"""

import fcntl
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from torchdlrm.config import Config, config_toml, load_config, setting_values
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, PlanError, RunError, TrainingError, differences
from torchdlrm.evaluation.compare import compare
from torchdlrm.files import write_atomically
from torchdlrm.html import write_page
from torchdlrm.metrics import LOSS, METRICS
from torchdlrm.progress import ProgressListener, watched
from torchdlrm.storage.places import located, url_of
from torchdlrm.sweeping.page import sweep_page, trial_cells
from torchdlrm.sweeping.space import Space, load_space, with_params
from torchdlrm.training.environment import manifest_sha256
from torchdlrm.training.job import preview_training, train
from torchdlrm.training.log import Callback, Metrics, read_metrics
from torchdlrm.training.run import METRICS_NAME
from torchdlrm.training.steps import Agenda


def sweep(
    config: Config | str | Path,
    space: str | Path,
    dataset: Dataset | str | Path,
    out: str | Path,
    *,
    progress: ProgressListener | bool = True,
) -> dict[str, Any]:
    """Search values for keys of a config (tuning), as docs/judging.md says; this process does one training at a time.

    Args:
        config: to start from, as for `train`.
        space: TOML file of the keys, their values, and how they are searched.
        dataset: an encoded dataset or its folder.
        out: folder of the sweep; one that was interrupted goes on, one that other processes work on is shared.
        progress: receives every training; True and False as for `train`.

    Returns:
        `verdict`; `trials`, a mapping each; `best`, the number of the one that best.toml is of; `importance` of each
        key; `repeated`, values by seed of the best and of `start`, the config as it was; their `comparison` on test.

    Raises:
        UserError: config or space are wrong, `train` would refuse them, or the folder holds another sweep, or else.
        TrainingError: no trial has finished.
        Interrupted: SIGTERM or Ctrl-C; the same call goes on.
    """
    start = load_config(config)
    searched = load_space(space, start)
    encoded = (dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)).with_labels(start.train.label_names)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with watched(progress) as listener:
        return _Sweep(located(out), searched, encoded, listener).run()


class _Sweep(Callback):
    """A sweep, which listens to the trial that it runs."""

    def __init__(self, path: Path, space: Space, dataset: Dataset, progress: ProgressListener) -> None:
        self._path, self._space, self._dataset, self._progress = path, space, dataset, progress
        self._search = search = space.search
        self._key = "loss" if search.metric == LOSS else search.metric  # as metrics.jsonl has it
        self._is_higher = METRICS[search.metric].better == "higher"
        self._number, self._last_step = 0, 0  # of the trial
        if url_of(path) is not None:
            msg = f"`out`: {path}: a sweep appends to its journal, which no bucket can; give a folder on a disk"
            raise RunError(msg)
        preview_training(space.config, dataset, path / "trials" / "none", world_size=1, local_world_size=1)
        if path.exists() and not (path / "trials").exists() and any(path.iterdir()):
            raise RunError(f"`out`: {path} is not empty and holds no sweep; give another folder")
        for folder in ("trials", "finalists"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        with _held(path / "sweep"):
            journal = path / "journal.log"
            backend = JournalFileBackend(str(journal), _JournalLock(journal))  # type: ignore[arg-type]
            self._storage = optuna.storages.JournalStorage(backend)
            self._study = optuna.create_study(
                storage=self._storage,
                study_name="sweep",
                direction="maximize" if self._is_higher else "minimize",
                pruner=getattr(optuna.pruners, search.pruner)(),
                load_if_exists=True,
            )
            self._check_same()
            for _ in range(len(self._trials), search.trials):
                self._study.enqueue_trial({})

    @property
    def _trials(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)[: self._search.trials]

    def _check_same(self) -> None:
        """See that the folder is of this sweep, or make it so; the number of trials and finalists may change."""
        now = {f"config {key}": value for key, value in setting_values(self._space.config).items()}
        now |= {f"space {key}": str(values) for key, values in self._space.values.items()}
        now |= self._search.model_dump(include={"metric", "seed", "pruner"})
        now = json.loads(json.dumps(now | {"dataset": manifest_sha256(self._dataset)}))
        if "of" not in self._study.user_attrs:
            self._study.set_user_attr("of", now)
        if changes := differences(self._study.user_attrs["of"], now):
            msg = f"`out`: {self._path} holds another sweep; give what it was begun with, or another folder:"
            raise RunError("\n".join([msg, *changes]))

    def run(self) -> dict[str, Any]:
        """Do the trials, repeat the best, and compare what is best then with the config as it was."""
        start, sign = self._space.config, 1 if self._is_higher else -1
        jobs = {f"trials/{number:03}": partial(self._try, number) for number in range(self._search.trials)}
        self._share(jobs, lambda name: self._trials[int(name[-3:])].state.is_finished())
        done = [trial for trial in self._trials if trial.state == TrialState.COMPLETE]
        if not done:
            raise TrainingError(f"no trial has finished; the last one: {self._trials[-1].user_attrs.get('why')}")
        done.sort(key=lambda trial: -sign * trial.values[0])
        recipes = {f"{trial.number:03}": with_params(start, trial.params) for trial in done}
        best, repeated, comparison = next(iter(recipes)), dict[str, list[float]](), None
        verdict = f"trial {best} has the best {self._search.metric} on val; without finalists it is not judged"
        names = [name for name, config in recipes.items() if config != start][: self._search.finalists]
        if names:
            seeds = range(start.seed + 1, start.seed + 1 + self._search.seeds)  # not the one that has chosen them
            jobs = {
                f"finalists/{name}-seed-{seed}": partial(self._repeat, f"finalists/{name}-seed-{seed}", config, seed)
                for name, config in ({"start": start} | recipes).items()
                if name in {"start", *names}
                for seed in seeds
            }
            self._share(jobs, lambda name: name in self._study.user_attrs)
            runs = {name: [f"finalists/{name}-seed-{seed}" for seed in seeds] for name in ("start", *names)}
            repeated = {name: [self._study.user_attrs[run] for run in of] for name, of in runs.items()}
            best = max(names, key=lambda name: sign * fmean(repeated[name]))
            pair = {name: [self._path / run for run in runs[name]] for name in ("start", best)}
            comparison = compare(pair, dataset=self._dataset, metric=self._search.metric, progress=self._progress)
            assert comparison is not None  # this process has rank 0
            verdict = comparison.verdict
        write_atomically(self._path / "best.toml", config_toml(recipes[best]))
        result = {
            "verdict": verdict,
            "metric": self._search.metric,
            "trials": [self._record(trial.number) for trial in self._trials],
            "best": int(best),
            "importance": optuna.importance.get_param_importances(self._study) if len(done) > 1 else {},
            "repeated": repeated,
            "comparison": comparison and comparison.as_json(),
        }
        page = sweep_page(f"Sweep {self._path.resolve().name}", self._space, result)
        write_page(self._path / "report.html", page, "out")
        return result

    def _share(self, jobs: Mapping[str, Callable[[], None]], is_done: Callable[[str], bool]) -> None:
        """Do jobs until all are done, here or in other processes; those of a process that dies are taken over."""
        unit = next(iter(jobs)).partition("/")[0]
        self._progress.start_phase(unit, len(jobs), unit, done=sum(map(is_done, jobs)))
        while left := [name for name in jobs if not is_done(name)]:
            for name in left:
                with _held(self._path / name, wait=False) as is_mine:
                    if is_mine and not is_done(name):
                        jobs[name]()
                        self._progress.advance(1)
            with _held(self._path / left[-1]):  # until the process that does it has ended
                pass

    def _try(self, number: int) -> None:
        """Begin a trial, or take it up where a process has left it."""
        if self._trials[number].state == TrialState.WAITING:
            self._storage.set_trial_state_values(self._id(number), TrialState.RUNNING)
        for place, (key, values) in enumerate(self._space.values.items()):
            trial = self._trials[number]
            if key not in trial.params:
                seed = np.random.SeedSequence((self._search.seed, number, place)).generate_state(1)[0]
                sampler = optuna.samplers.TPESampler(seed=int(seed))
                value = values.to_internal_repr(sampler.sample_independent(self._study, trial, key, values))
                self._storage.set_trial_param(self._id(number), key, value, values)
        trial, state, found = self._trials[number], TrialState.FAIL, None
        try:
            config = with_params(self._space.config, trial.params)
            self._number, self._last_step = number, Agenda.of(config, self._dataset.splits["train"].rows).num_steps
            if "pruned" not in trial.user_attrs:  # by a process that was killed before it could end the trial
                found = self._train(f"trials/{number:03}", config, self)
            state = TrialState.PRUNED if "pruned" in self._trials[number].user_attrs else TrialState.COMPLETE
        except (ConfigError, PlanError, TrainingError) as error:
            self._storage.set_trial_user_attr(self._id(number), "why", str(error))
        self._study.tell(number, found if state == TrialState.COMPLETE else None, state)
        self._progress.note(", ".join(f"{name} {text}" for name, text in trial_cells(self._record(number)).items()))

    def on_validation(self, step: int, metrics: Metrics) -> str | None:
        """Keep what a validation of the trial has found, by its number, and ask the pruner."""
        path, value = self._path / "trials" / f"{self._number:03}", metrics[self._key]
        number = sum(line["split"] == "val" for line in read_metrics(path / METRICS_NAME))
        known = self._trials[self._number].intermediate_values
        if (
            value is None or step == self._last_step or number < max(known, default=0)
        ):  # it went on there, before a kill
            return None
        if number not in known:
            self._storage.set_trial_intermediate_value(self._id(self._number), number, value)
        self._progress.advance(0, trial=f"{self._number}, validation {number}", **{self._search.metric: f"{value:.5f}"})
        if not self._study.pruner.prune(self._study, self._trials[self._number]):
            return None
        self._storage.set_trial_user_attr(self._id(self._number), "pruned", step)
        return "pruned"

    def _repeat(self, name: str, config: Config, seed: int) -> None:
        self._study.set_user_attr(name, self._train(name, config.model_copy(update={"seed": seed})))

    def _train(self, name: str, config: Config, *callbacks: Callback) -> float:
        """The metric on val of the checkpoint with the best AUC, which is the one that is taken."""
        history = train(config, self._dataset, self._path / name, callbacks=callbacks, progress=False)
        values = {} if history is None else dict(history.series("val", self._key))
        if history is None or history.summary.best_step not in values:
            raise TrainingError(f"{name}: the {self._key} of the val split is not defined")
        return values[history.summary.best_step]

    def _id(self, number: int) -> int:
        study_id = self._storage.get_study_id_from_name("sweep")
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def _record(self, number: int) -> dict[str, Any]:
        trial = self._trials[number]
        state = f"failed: {trial.user_attrs['why']}" if "why" in trial.user_attrs else trial.state.name.lower()
        seconds = None if trial.duration is None else trial.duration.total_seconds()
        return {"trial": number, "state": state, self._search.metric: trial.value, "seconds": seconds, **trial.params}


@contextmanager
def _held(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Inside, this process alone has the lock of a job, unless it yields False: another one has it."""
    with path.with_name(f".{path.name}.lock").open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except BlockingIOError:
            is_held = False
        yield is_held


class _JournalLock:
    """Ends with its process, as none of Optuna's does; a line that a process has not written to its end is removed."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def acquire(self) -> bool:
        """Wait for the lock; the next line that is written follows a whole one."""
        self._file = self._path.open("r+b")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.truncate(self._file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Let others write."""
        self._file.close()
