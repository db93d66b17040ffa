"""Finds the checkpoints of a run on disk, chooses one, and verifies that it is undamaged.

    checkpoints/step-00001000/
      checkpoint.json             step, loader position, metric, and the sha256 of every other file
      .metadata  __0_0.distcp     torch.distributed.checkpoint: model and optimizer, loadable on any number of ranks

Random state need not be in it: what is random during training (dropout) is drawn from seed, step and rank.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from torchdlrm.errors import RunError, TrainingError
from torchdlrm.files import regular_file
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.records import problems
from torchdlrm.storage import mirror
from torchdlrm.training.checkpoint_reader import read_metadata

FORMAT_VERSION = 1
RECORD_NAME = "checkpoint.json"
_PART_BYTES = 2**20


@dataclass(frozen=True)
class Position:
    """Where a run is: what a checkpoint holds besides model and optimizer.

    Attributes:
        step: optimizer steps done.
        loader: state of the training loader after that step.
        best_auc: highest AUC of the val split so far, None before the first validation.
        best_step: the step that had it.
        stale_validations: validations since then.
        plateau_scale: what plateaus of the val AUC have left of the learning rate (`steps.after_validation`).
        steps_before: optimizer steps that its tables had done before the run's first, in the runs that it was started
            from: bias correction and lazy decay count all; below 0 where they have begun again (`train.fresh_tables`).
    """

    step: int
    loader: dict[str, int]
    best_auc: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    plateau_scale: Annotated[float, Field(gt=0, le=1)] = 1.0
    steps_before: int = 0


@dataclass(frozen=True)
class _Record:
    """What `checkpoint.json` holds: `sha256` of the other files, and under its own name that of the position."""

    format_version: int
    position: Position
    sha256: dict[str, str]


def write_record(path: Path, position: Position, digests: dict[str, str]) -> None:
    """Write the `checkpoint.json` of a checkpoint; `digests` are the sha256 of its other files."""
    sha256 = dict(sorted(digests.items())) | {RECORD_NAME: _sha256_of_position(asdict(position))}
    text = json.dumps(asdict(_Record(FORMAT_VERSION, position, sha256)), indent=1)
    (path / RECORD_NAME).write_text(text + "\n", encoding="utf-8")


def _sha256_of_position(position: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(position, sort_keys=True).encode()).hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return folder / f"step-{step:08d}"


def list_checkpoints(folder: Path) -> list[int]:
    """The steps of all checkpoints in a run's checkpoints/ in rising order: damaged ones too, but no copies."""
    folders = (path for path in folder.glob("step-*") if path.name[5:].isdecimal() and path.is_dir())
    folders = (path for path in folders if any(path.iterdir()))  # else a part of it is in a bucket, without its record
    return sorted(step for path in folders if path == checkpoint_path(folder, step := int(path.name[5:])))


def publish_logs(folder: Path) -> None:
    """Publish what a run at a URL has beside its checkpoints/; raises StorageError."""
    for path in folder.parent.iterdir():
        if path != folder:
            mirror.push(path)


def read_position(folder: Path, step: int) -> Position:
    """What `checkpoint.json` says.

    Raises:
        RunError: it is damaged, or its format version is another.
    """
    return _read_record(checkpoint_path(folder, step)).position


CheckpointKind = Literal["best", "last", "step"]


@dataclass(frozen=True)
class ChosenCheckpoint:
    """A checkpoint of a run, and what it was chosen for.

    Attributes:
        step: the optimizer step after which it was saved.
        kind: `best` of the val split, `last`, or the `step` that was asked for.
    """

    step: int
    kind: CheckpointKind

    def __str__(self) -> str:
        why = {"best": ", the best of the val split", "last": ", the last", "step": ""}
        return f"step {self.step:,}{why[self.kind]}"


def find_checkpoint(folder: Path, name: str = "best") -> ChosenCheckpoint:
    """A checkpoint in a run's checkpoints/.

    Args:
        folder: the run's checkpoints/.
        name: `best` of the val split, which is the last where nothing was validated; `last`; or a step.

    Raises:
        RunError: there is none of that name.
    """
    steps = list_checkpoints(folder)
    if not steps:
        msg = f"{folder.parent}: the run has no checkpoint yet; train it first"
        raise RunError(msg)
    best = read_position(folder, steps[-1]).best_step if name == "best" else None
    if name == "last" or (name == "best" and best is None):
        return ChosenCheckpoint(steps[-1], "last")
    wanted = name if best is None else str(best)
    if wanted not in map(str, steps):
        which = repr(name) if best is None else f"the best of the val split, step {best}"
        kinds = "best, last" if best is None else "last"
        there = ", ".join(map(str, steps))
        msg = f"`checkpoint`: {folder.parent} does not have {which}; give {kinds}, or one of the steps {there}"
        raise RunError(msg)
    return ChosenCheckpoint(int(wanted), "step" if best is None else "best")


def not_finite_error(what: str, folder: Path) -> TrainingError:
    """The error that says what is not finite, at which step, what helps, and which checkpoint of the run there is."""
    saved = list_checkpoints(folder)
    return TrainingError(
        f"{what}: try a lower table_optimizer.learning_rate or dense_optimizer.learning_rate, schedule.warmup_steps, "
        f"or look at these rows; {f'the last checkpoint is of step {saved[-1]}' if saved else 'nothing was saved yet'}"
    )


def find_damage(path: Path, progress: ProgressListener = SILENT) -> str | None:
    """What is wrong with the files of a checkpoint, or None; reads them all."""
    return next(filter(None, look_for_damage(path, progress, 0, 1)), None)


def look_for_damage(path: Path, progress: ProgressListener, rank: int, world_size: int) -> Iterator[str | None]:
    """Read a rank's part of the files of a checkpoint: the ranks together read each file once.

    Yields:
        None after each part of a file that was read, then, if something is wrong, what.
    """
    part = memoryview(bytearray(_PART_BYTES))
    try:
        mirror.fetch_missing(path / RECORD_NAME)
        files = sorted(_read_record(path).sha256.items())
        mine = [(name, expected) for name, expected in files if name != RECORD_NAME][rank::world_size]
        for name, expected in mine:
            digest = hashlib.sha256()
            mirror.fetch_missing(path / name, progress)
            with regular_file(path, name).open("rb") as file:
                while num_bytes := file.readinto(part):
                    digest.update(part[:num_bytes])
                    yield None
            if digest.hexdigest() != expected:
                yield f"{path / name}: damaged, its sha256 is not that in {RECORD_NAME}"
                return
        if rank == 0:
            read_metadata(path)
    except RunError as error:
        yield str(error)
    except OSError as error:
        yield f"{path}: damaged: {error}"


def _read_record(path: Path) -> _Record:
    try:
        content = json.loads(regular_file(path, RECORD_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{path / RECORD_NAME}: damaged: {error}"
        raise RunError(msg) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version != FORMAT_VERSION:
        msg = f"{path}: format version {version}, this torchdlrm reads {FORMAT_VERSION}"
        raise RunError(msg)
    try:
        record = TypeAdapter(_Record).validate_python(content)
    except ValidationError as error:
        msg = "\n".join([f"{path / RECORD_NAME}: damaged:", *problems(error)])
        raise RunError(msg) from error
    found = _sha256_of_position(content["position"])  # as it was written: an older one has fewer fields
    if record.sha256.get(RECORD_NAME, found) != found:  # the earliest have none
        msg = f"{path / RECORD_NAME}: damaged, the sha256 of its position is not that which it holds"
        raise RunError(msg)
    return record
