"""Writes checkpoints atomically while training continues, and loads them.

A checkpoint is written under another name and renamed when every rank has written and hashed its part. In a bucket the
ranks put their parts where it will be, and rank 0 the record without which it is none, when all else is there.
"""

import io
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torchrec.optim.keyed import KeyedOptimizer

from torchdlrm.errors import RunError, StorageError
from torchdlrm.files import publish_folder, sha256_of
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import mirror
from torchdlrm.training.checkpoint import (
    RECORD_NAME,
    Position,
    checkpoint_path,
    list_checkpoints,
    look_for_damage,
    not_finite_error,
    publish_logs,
    read_position,
    write_record,
)
from torchdlrm.training.checkpoint_reader import CheckpointReader
from torchdlrm.training.checkpoint_state import TakeOver, take_over
from torchdlrm.training.compute import give_back_freed_memory
from torchdlrm.training.host_copies import HostCopies, in_own_storage, tensors_of, with_tensors
from torchdlrm.training.processes.process_group import Ranks

logger = logging.getLogger("torchdlrm")
_MAX_NAMES = 3


class _ReportingFileSystem(FileSystem):
    """Raises the error of the disk, where torch raises that its archive is shorter than it should be."""

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        try:
            with super().create_stream(path, mode) as stream:
                yield stream
        except RuntimeError as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise cause or error from error


class _Writer(FileSystemWriter):
    """Torch's, with the same bytes for the same state: torch notes a random number and the path that is written to."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.fs = _ReportingFileSystem()

    def storage_meta(self) -> StorageMeta:
        return StorageMeta()


class Checkpointer:
    """Saves and loads the checkpoints of one run; every rank has one and must make the same calls.

    Args:
        folder: the run's checkpoints/.
        model: after `DistributedModelParallel`.
        optimizer: of the model, or None to load weights alone.
        ranks: the processes of the run.
        keep_last: how many checkpoints to keep besides the best.
    """

    def __init__(
        self, folder: Path, model: nn.Module, optimizer: KeyedOptimizer | None, ranks: Ranks, *, keep_last: int = 1
    ) -> None:
        self._folder, self._model, self._optimizer, self._ranks = folder, model, optimizer, ranks
        self._keep_last = keep_last
        self.confirm: Callable[[], None] = lambda: None  # raises where the run is another process's by now
        self._group = ranks.new_group()
        # The current GPU is a thread's own, and torch's writer waits for the current one: by default GPU 0, on which
        # every rank would take memory.
        self._writer = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="torchdlrm-checkpoint",
            initializer=partial(torch.cuda.set_device, ranks.device) if ranks.device.type == "cuda" else None,
        )
        self._copies = HostCopies(ranks.device)
        self._pending: Future[None] | None = None
        self._written: deque[tuple[int, Path]] = deque()  # filled by the writing thread

    def save(self, position: Position, *, wait: bool, loss: Tensor | None = None) -> bool:
        """Copy the state now and write it in the background; waits first for a save that is not over yet.

        Memory: a copy of this rank's tables and optimizer state until it is written, on a GPU's host for good; with
        `wait`, none on CPU, and of a GPU one shard at a time, or the memory of the last copy.

        Args:
            position: goes into the checkpoint.
            wait: write it here and return when the checkpoint is complete (or has failed, which is logged).
            loss: of this rank's rows in the last step: float32 [].

        Returns:
            False where it has failed, the same on every rank; True where it is complete or still being written.

        Raises:
            TrainingError: NaN or infinity in loss or weights of any rank, the same on every rank; nothing is written.
        """
        self.join()
        if self._ranks.device.type == "cuda":
            # Cached tables are written back now, and another stream may be filling their cache for the next batch.
            torch.cuda.synchronize(self._ranks.device)
        state = self._state()
        problem = self._find_not_finite(state["model"], loss)
        if problem is not None:
            what = f"after step {position.step} there is {problem}, so it is not saved"
            raise not_finite_error(what, self._folder)
        if wait:
            ready = self._copies.take(state) if self._copies.has_memory else with_tensors(state, in_own_storage)
            return self._write(ready, position)
        self._pending = self._writer.submit(self._write_copy, [self._copies.take(state)], position)
        return True

    def take_written(self) -> list[tuple[int, Path]]:
        """The checkpoints that have become complete since this was last asked, by step."""
        written = []
        while self._written:
            written.append(self._written.popleft())
        return written

    def join(self) -> None:
        """Wait until no save is being written."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def close(self) -> None:
        """Wait for a save that is being written, and end the writing thread."""
        self.join()
        self._writer.shutdown()
        self._copies.close()

    def restore(self, progress: ProgressListener = SILENT) -> Position | None:
        """Load the newest checkpoint that is undamaged and finite; None without any. Others are named in the log.

        Raises:
            RunError: there are only others; training from the start would remove them, and a disk may only be away for
                now.
        """
        steps = self._ranks.from_first(list_checkpoints(self._folder) if self._ranks.is_first else [], self._group)
        for step in reversed(steps):
            path = checkpoint_path(self._folder, step)
            problem = find_damage_together(path, self._ranks, self._group, progress)
            if problem is None:
                position = self.load(step, verify=False)
                not_finite = self._find_not_finite(self._state()["model"])
                if not_finite is None:
                    return position
                problem = f"{path}: {not_finite}"
            if self._ranks.is_first:
                logger.warning("%s; going back to the checkpoint before", problem)
        if not steps:
            return None
        msg = (
            f"{self._folder}: all {len(steps)} checkpoints are damaged or not finite, the oldest: {problem}; put one "
            "back from a copy, or give `restart` to remove the run and begin again"
        )
        raise RunError(msg).everywhere()

    def load(self, step: int, *, verify: bool = True, progress: ProgressListener = SILENT) -> Position:
        """Load a checkpoint, which may come from another number of ranks.

        Raises:
            RunError: it is damaged, of another format version, or of another model.
        """
        path = checkpoint_path(self._folder, step)
        problem = find_damage_together(path, self._ranks, self._group, progress) if verify else None
        if problem is not None:
            raise RunError(problem).everywhere()
        with self._changing_state() as state:
            take_over(state, CheckpointReader(path, prefix=""), TakeOver())
        return read_position(self._folder, step)

    def start_from(self, path: Path, how: TakeOver) -> int:
        """Take over what another run has learnt, from an undamaged checkpoint: docs/training.md says what.

        Returns:
            How many steps the tables' optimizer has done by then.

        Raises:
            RunError: it does not fit, or has weights that are not finite.
        """
        with self._changing_state() as state:
            take_over(state, CheckpointReader(path, prefix=""), how)
        problem = self._find_not_finite(self._state()["model"])
        if problem is not None:
            raise RunError(f"`from_run`: {path}: {problem}; `warm_start.checkpoint` can name another one").everywhere()
        position = read_position(path.parent, int(path.name.removeprefix("step-")))
        return position.steps_before + position.step

    @contextmanager
    def _changing_state(self) -> Generator[dict[str, Any], None, None]:
        """The state, which is put back in the end."""
        state = self._state()
        yield state
        self._model.load_state_dict(state["model"])
        if self._optimizer is not None:
            self._optimizer.load_state_dict(state["optimizer"])

    def _find_not_finite(self, state: dict[str, Any], loss: Tensor | None = None) -> str | None:
        """Which weights of any rank, or losses, are no finite numbers, in words that are the same on every rank."""
        names = find_not_finite(self._model, state)
        if loss is not None and not math.isfinite(loss):
            names.insert(0, "the loss")
        found = list(dict.fromkeys(chain.from_iterable(self._ranks.all_gather(names, self._group))))
        more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
        return f"NaN or infinity in {', '.join(found[:_MAX_NAMES])}{more}" if found else None

    def _state(self) -> dict[str, Any]:
        state = {"model": self._model.state_dict()}
        if self._optimizer is not None:
            state["optimizer"] = self._optimizer.state_dict()
        return state

    def _write_copy(self, holder: list[dict[str, Any]], position: Position) -> None:
        """Write a copy of the state and let go of its memory."""
        self._write(holder.pop(), position)
        give_back_freed_memory()

    def _write(self, state: dict[str, Any], position: Position) -> bool:
        """Write, hash, rename; a failure leaves the checkpoints that are there and is logged."""
        final = checkpoint_path(self._folder, position.step)
        partial = final.with_name(f".{final.name}.partial")
        try:
            self._together(lambda: _make_empty(partial, final) if self._ranks.is_first else None)
            self._together(lambda: partial.mkdir(parents=True, exist_ok=True))  # on hosts that share no folder
            # Without copies ahead: torch would pin two shards at a time, rounded up to powers of two, for good.
            writer = _Writer(partial, sync_files=True, per_thread_copy_ahead=0)
            save_distributed(state, storage_writer=writer, process_group=self._group)
            digests = self._together(lambda: _digests(partial, final, self._ranks.rank))
            self._together(lambda: self._finish(partial, final, digests, position) if self._ranks.is_first else None)
        except (OSError, CheckpointException, RuntimeError) as error:
            if isinstance(error, RuntimeError) and self._ranks.are_fewer(error):
                raise
            if self._ranks.is_first:
                logger.warning(
                    "the checkpoint of step %d could not be written, training continues without it: %s",
                    position.step,
                    _reason(error),
                )
            return False
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self._written.append((position.step, final))
        return True

    def _finish(self, partial: Path, final: Path, digests: list[dict[str, str]], position: Position) -> None:
        self.confirm()
        files = {name: digest for part in digests for name, digest in part.items()}
        write_record(partial, position, files)
        publish_logs(self._folder)
        if final.exists():  # damaged, or saved by a run that was longer and has been resumed from before it
            _remove(final)
        publish_folder(partial, final, RECORD_NAME, others=files)  # before older ones are removed
        # Later ones were passed over, as damaged or not finite: they push none of these out, and may be well again.
        steps = [step for step in list_checkpoints(self._folder) if step <= position.step]
        for step in set(steps) - {*steps[-self._keep_last :], position.best_step}:
            _unpublish(checkpoint_path(self._folder, step))
            _remove(checkpoint_path(self._folder, step))

    def _together(self, task: Any) -> list[Any]:
        """Run a task on every rank and return all results; raises on every rank when it fails on one."""
        result: Any = None
        problem: str | None = None
        try:
            result = task()
        except (OSError, StorageError) as error:
            problem = f"rank {self._ranks.rank}: {_reason(error)}"
        everyone = self._ranks.all_gather((problem, result), self._group)
        problems = [found for found, _ in everyone if found is not None]
        if problems:
            raise OSError("; ".join(problems))
        return [found for _, found in everyone]


def find_not_finite(model: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Names of this rank's weights, or parts of tables, in which a value is NaN or infinite.

    Buffers are left out: a model of one's own may mean the infinity in one. A sum is finite only where all values are,
    and reads them once: 0.11 s for a table of 1 GB on two cores, where its copy takes 0.7 s.
    """
    parameters = {name for name, _ in model.named_parameters()}
    names: list[str] = []
    sums: list[Tensor] = []
    for name, value in state.items():
        for tensor in tensors_of(value) if name in parameters or isinstance(value, ShardedTensor) else ():
            names.append(name)
            sums.append(tensor.detach().sum(dtype=torch.float32))
    are_finite = torch.isfinite(torch.stack(sums)).tolist() if sums else []
    return list(dict.fromkeys(name for name, is_finite in zip(names, are_finite, strict=True) if not is_finite))


def find_damage_together(
    path: Path, ranks: Ranks, group: dist.ProcessGroup | None = None, progress: ProgressListener = SILENT
) -> str | None:
    """What is wrong with a checkpoint, the same on every rank: each reads its part of the files.

    However large they are, no rank waits for longer than the others read a part of a file: each says in `group`
    several times within `timeout_s` that it is still reading. Every rank must call this.
    """
    parts = look_for_damage(path, progress, ranks.rank, ranks.world_size)
    while True:
        until_s = time.monotonic() + ranks.timeout_s / 4
        problem, is_done = None, True
        for problem in parts:
            if problem is not None or time.monotonic() > until_s:
                is_done = False
                break
        everyone = ranks.all_gather((problem, is_done), group)
        found = next((seen for seen, _ in everyone if seen is not None), None)
        if found is not None or all(done for _, done in everyone):
            return found


def _remove(checkpoint: Path) -> None:
    """Renamed first, so that one that is half removed is never taken for a checkpoint."""
    with suppress(FileNotFoundError):
        shutil.rmtree(checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old")))


def _unpublish(checkpoint: Path) -> None:
    """Likewise in a bucket: the record first."""
    mirror.remove(checkpoint / RECORD_NAME)
    mirror.remove(checkpoint)


def _make_empty(partial: Path, final: Path) -> None:
    _unpublish(final)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _digests(partial: Path, final: Path, rank: int) -> dict[str, str]:
    """sha256 of the files that this rank has written, and published; the first one also has the metadata."""
    names = [path.name for path in partial.glob(f"__{rank}_*.distcp")] + [".metadata"] * (rank == 0)
    for name in names:
        mirror.push(partial / name, to=final / name)
    return {name: sha256_of(partial / name) for name in names}


def _reason(error: BaseException) -> str:
    """The innermost cause in one line: torch wraps what the disk said."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
    return str(error).splitlines()[0] if str(error) else type(error).__name__
