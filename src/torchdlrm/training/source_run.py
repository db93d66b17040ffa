"""Finds the run that another is started from, and says whether what it has learnt means the same in the new one.

In: a run, and the config, dataset and model class of the new one.  Out: a checkpoint and its checksum; or all
that does not fit.  Rows of tables are known by their ids alone, so the vocabularies of the new dataset must begin with
those of the old one; or it extends the old one and says which ids stand for another value.  They are read from both
datasets a piece at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchdlrm.config import Config, setting_values
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError, RunError
from torchdlrm.features.vocabulary import first_difference
from torchdlrm.files import sha256_of
from torchdlrm.model.architecture import Architecture
from torchdlrm.model.model_class import difference_from
from torchdlrm.storage import places
from torchdlrm.training.changes import shown
from torchdlrm.training.checkpoint import (
    RECORD_NAME,
    ChosenCheckpoint,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
)
from torchdlrm.training.environment import WarmStartRecord, manifest_sha256
from torchdlrm.training.run import Run, fetch_run

_MAX_SHOWN = 8


@dataclass(frozen=True)
class SourceRun:
    """A checkpoint of a run that another one is started from.

    Attributes:
        record: what environment.json says of it; its sha256 covers all files of the checkpoint.
        num_reset: of each feature that has any, how many ids stand for another value in the new dataset.
    """

    record: WarmStartRecord
    num_reset: Mapping[str, int] = field(default_factory=dict)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's folder."""
        return checkpoint_path(places.located(self.record["run"]) / "checkpoints", self.record["step"])

    def __str__(self) -> str:
        return f"{self.record['run']}, {ChosenCheckpoint(self.record['step'], self.record['checkpoint'])}"


def find_source(
    from_run: Path | None, run: Run, dataset: Dataset, architecture: Architecture, *, restart: bool
) -> SourceRun | None:
    """The checkpoint that a training starts from.

    Args:
        from_run: folder of the run to start from; None where the run is there already, or starts from nothing.
        run: the new run, with its config.
        dataset: of the new run.
        architecture: of its model.
        restart: what is in the run's folder will be removed.

    Returns:
        None where there is nothing to take over: no run was named, or the new one has checkpoints of its own.

    Raises:
        RunError: there is no such checkpoint, it has changed, it does not fit the new run, or the new run was started
            from another one.
        DatasetError: a vocabulary is damaged.
    """
    recorded: WarmStartRecord | None = None
    if run.exists and not restart:
        recorded = run.environment.get("warm_start")
        if recorded is not None and from_run is not None and not fetch_run(recorded["run"]).exists():  # it has moved
            recorded["run"] = places.shown(from_run.resolve())
        _check_same(from_run, recorded, run)
        if recorded is None or list_checkpoints(run.checkpoints):
            return None
    elif from_run is None:
        return None
    path = places.located(recorded["run"]) if recorded is not None else (from_run or Path()).resolve()
    if path == run.path.resolve():
        raise RunError(f"`from_run`: {path} is the run itself; give another `run`")
    theirs = Run.open(path)
    if theirs.is_in_use:
        raise RunError(f"`from_run`: another process is training in {path}; wait for it")
    name = run.config.warm_start.checkpoint if recorded is None else str(recorded["step"])
    try:
        chosen = find_checkpoint(theirs.checkpoints, name)
        sha256 = sha256_of(checkpoint_path(theirs.checkpoints, chosen.step) / RECORD_NAME)
    except (RunError, OSError) as error:
        raise RunError(str(error).replace("`checkpoint`", "warm_start.checkpoint")) from error
    if recorded is not None and sha256 != recorded["sha256"]:
        raise RunError(
            f"{path}: its checkpoint of step {chosen.step} is another one than {run.path} was started from, which has "
            "no checkpoint of its own yet; give `restart` to start it from the one that is there now"
        )
    _check_fits(theirs, run.config, dataset, architecture)
    resets = dataset.table_rows if _extends(dataset, theirs) else ()
    num_reset = {name: found for name in resets if (found := len(dataset.reset_ids(name)))}
    new: WarmStartRecord = {"run": places.shown(path), "step": chosen.step, "checkpoint": chosen.kind, "sha256": sha256}
    return SourceRun(recorded or new, num_reset)


def _check_same(from_run: Path | None, recorded: WarmStartRecord | None, run: Run) -> None:
    if from_run is None or (recorded is not None and places.shown(from_run.resolve()) == recorded["run"]):
        return
    started = "no other run" if recorded is None else f"{recorded['run']}, step {recorded['step']}"
    raise RunError(
        f"`from_run`: {run.path} was started from {started}, got {from_run}; leave it out to resume the run, give "
        "another `run`, or `restart` to remove it and begin again"
    )


def _check_fits(source: Run, config: Config, dataset: Dataset, architecture: Architecture) -> None:
    problems = [*unfit_settings(source.config, config)]
    difference = difference_from(source.model_class, architecture, "run")
    if difference is not None:
        problems.append(difference)
    if source.environment["dataset"]["manifest_sha256"] != manifest_sha256(dataset):
        problems += _other_meanings(_dataset_of(source), dataset, extends=_extends(dataset, source))
    if problems:
        more = [f"and {len(problems) - _MAX_SHOWN} more"] if len(problems) > _MAX_SHOWN else []
        head = f"`from_run`: what {source.path} has learnt does not fit:"
        raise RunError("\n  ".join([head, *problems[:_MAX_SHOWN], *more]))


def _extends(dataset: Dataset, source: Run) -> bool:
    """Whether the vocabularies of a dataset extend those that a run was trained with, as values come and go."""
    extended = dataset.manifest.extends
    return extended is not None and extended.manifest_sha256 == source.environment["dataset"]["manifest_sha256"]


def unfit_settings(theirs: Config, ours: Config) -> Iterator[str]:
    """Settings with which what was learnt by theirs would mean something else, each with what helps."""
    before, now = setting_values(theirs), setting_values(ours)
    for name in dict.fromkeys((*now, *before)):
        # The scale of initial rows is that of new ones alone.
        if name.startswith("model.") and name != "model.table_init_scale" and before.get(name) != now.get(name):
            yield f"{name}: is {shown(now.get(name))}, and was {shown(before.get(name))}"
    was, now_learnt = theirs.train.label_names, ours.train.label_names
    if was != now_learnt and len({*was, *now_learnt}) > 1 < max(len(was), len(now_learnt)):
        yield f"train.labels: is {shown(now_learnt)}, and was {shown(was)}; give what it was"
    if ours.train.fresh_tables:
        yield "train.fresh_tables: the tables would forget what they have learnt there; leave it out"
    old, new = theirs.table_optimizer, ours.table_optimizer
    if old.name != new.name and (new.record.state_per_weight or new.record.state_per_row):
        yield (
            f"table_optimizer.name: {new.name} needs state of its own for rows that stay, and they have that of "
            f"{old.name}; give {old.name}, or sgd, which has none"
        )
    elif new.decays_lazily and not old.decays_lazily:
        yield (
            f"table_optimizer.weight_decay_mode: is lazy, which needs the last step of each row, and was "
            f"{old.weight_decay_mode}, which does not count them"
        )
    if ours.warm_start.dense_optimizer_state == "fresh":
        return
    is_other = theirs.dense_optimizer.name != ours.dense_optimizer.name
    if is_other or (ours.dense_optimizer.momentum and not theirs.dense_optimizer.momentum):
        key = "name" if is_other else "momentum"
        yield (
            f"dense_optimizer.{key}: is {getattr(ours.dense_optimizer, key)}, and was "
            f"{getattr(theirs.dense_optimizer, key)}, whose state is another; set "
            "warm_start.dense_optimizer_state = fresh"
        )


def _dataset_of(source: Run) -> Dataset:
    place = source.environment["dataset"]["path"]
    try:
        dataset = Dataset.open(place)
    except DatasetError as error:
        why = str(error)
    else:
        if manifest_sha256(dataset) == source.environment["dataset"]["manifest_sha256"]:
            return dataset
        why = f"{place} holds another dataset now"
    raise RunError(
        f"`from_run`: {source.path} was trained on {place}, whose vocabularies say what the rows of its tables mean: "
        f"{why}. Put that dataset back"
    )


def _other_meanings(theirs: Dataset, ours: Dataset, *, extends: bool) -> Iterator[str]:
    """Features whose ids or dense values mean something else."""
    for kind, before, now in (
        ("dense features", theirs.dense_names, ours.dense_names),
        ("vectors", *([f"{c.name}, {c.transform} of {c.size}" for c in of.schema.content] for of in (theirs, ours))),
        ("sparse features", theirs.sparse_names, ours.sparse_names),
    ):
        if before != now:
            yield f"{kind}: are {_names(now)}, and were {_names(before)}: the same in the same order are needed"
            return
    for name, fitted in ours.manifest.dense.items():
        if not fitted.continues(theirs.manifest.dense[name]):
            yield (
                f"dense feature {name}: its transform, or the statistics that it was fitted with, are others; "
                f"preprocess with `vocabulary` {theirs.path}"
            )
    for name, new in zip(ours.sparse_names, ours.schema.sparse, strict=True):
        old = next(column for column in theirs.schema.sparse if column.name == name)
        for key in ("kind", "buckets", "hash", "table", "is_multi_valued"):
            if getattr(old, key) != getattr(new, key):
                yield f"feature {name}: {key} is {shown(getattr(new, key))}, and was {shown(getattr(old, key))}"
                break
        else:
            problem = _other_ids(theirs, ours, name, ours.reset_ids(name) if extends else None)
            if problem is not None:
                yield f"feature {name}: {problem}"


def _other_ids(theirs: Dataset, ours: Dataset, name: str, reset: npt.NDArray[np.int32] | None) -> str | None:
    """Why ids of a feature do not mean the same, or None; those of `reset` may stand for another value."""
    before, now = theirs.manifest.sparse[name], ours.manifest.sparse[name]
    if (before.vocabulary is None) != (now.vocabulary is None):
        return "one of the datasets has a vocabulary of it, the other has none"
    if now.num_embeddings < before.num_embeddings:
        return f"has {now.num_embeddings:,} ids, and had {before.num_embeddings:,}; ids may only be added"
    if before.vocabulary is None or now.vocabulary is None or before.vocabulary.sha256 == now.vocabulary.sha256:
        return None
    files = theirs.file(before.vocabulary), ours.file(now.vocabulary)
    found = first_difference(*files, before.num_embeddings, reset)
    if found is None:
        return None
    return (
        f"id {found:,} stands for another value than in {theirs.path}; preprocess with `vocabulary` {theirs.path} and "
        "`extend_vocabulary`, so that ids stay"
    )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return (", ".join(names[:_MAX_SHOWN]) or "none") + more
