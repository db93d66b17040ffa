"""Where a job keeps what it has done, so that it goes on after any interruption.

    .dataset.partial/
      job.json       the settings and the log's files, by which a job is known again; the layout of its tasks
      journal.jsonl  a line for each task that is done, with its result
      lock           held while a job runs
      chunks/ counts/ ids/ groups/   what tasks left for later ones
      dataset/       the dataset, as far as it is written

A task writes beside and renames, and only then stands in the journal: a task that is not there runs again and leaves
the same bytes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from torchdlrm.errors import DatasetError
from torchdlrm.files import claim_folder, clear_folder, replacing, sync

Result = dict[str, Any]

_JOB_NAME, _JOURNAL_NAME, _LOCK_NAME = "job.json", "journal.jsonl", "lock"
FOLDERS = ("text", "chunks", "counts", "ids", "groups", "dataset")


@dataclass(frozen=True)
class Layout:
    """How the job is cut into tasks; chosen when it starts, and kept when it goes on.

    `chunk_bytes` of text are read at a time; values are dealt out to `num_partitions` by a hash; `group_bytes` of
    encoded rows are dealt out to the parts at a time; `values_per_task` are counted at a time.  These fit the memory
    with `tasks_in_memory` tasks at a time.
    """

    chunk_bytes: int
    num_partitions: int
    group_bytes: int
    values_per_task: int
    tasks_in_memory: int


class WorkFolder:
    """The work folder of a running job, locked against others."""

    def __init__(self, path: Path, layout: Layout, results: dict[str, Result], lock: int) -> None:
        self.path = path
        self.layout = layout
        self._results = results
        self._lock = lock
        self._journal = (path / _JOURNAL_NAME).open("a", encoding="utf-8")

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], layout: Layout, *, restart: bool = False) -> Self:
        """Make the folder, or take up the one that a job with the same settings left; `restart`: forget what it did.

        Raises:
            DatasetError: a job is at work there, or one with other settings left it.
            OSError: it cannot be made, or something else is there.
        """
        folder = claim_folder(path, (*FOLDERS, _JOB_NAME, _JOURNAL_NAME, _LOCK_NAME))
        try:
            return cls._open(path, folder, settings, layout, restart=restart)
        finally:
            os.close(folder)

    @classmethod
    def _open(cls, path: Path, folder: int, settings: Mapping[str, Any], layout: Layout, *, restart: bool) -> Self:
        lock = _lock(path, folder)
        try:
            found = None if restart else _read_job(path)
            if found is None:
                clear_folder(folder, keep=(_LOCK_NAME,))
                for name in FOLDERS:
                    (path / name).mkdir()
                with replacing(path / _JOB_NAME) as beside:
                    beside.write_text(json.dumps({"settings": settings, "layout": asdict(layout)}), encoding="utf-8")
                    sync(beside)
                return cls(path, layout, {}, lock)
            _compare(path, found["settings"], json.loads(json.dumps(settings)))
            return cls(path, Layout(**found["layout"]), _read_journal(path / _JOURNAL_NAME), lock)
        except BaseException:
            os.close(lock)
            raise

    def result(self, task: str) -> Result | None:
        """What a task gave that is done, else None."""
        return self._results.get(task)

    @property
    def is_fresh(self) -> bool:
        """Whether no task is done yet."""
        return not self._results

    def record(self, task: str, result: Result) -> None:
        """Note that a task is done."""
        self._results[task] = result
        self._journal.write(json.dumps([task, result]) + "\n")
        self._journal.flush()

    @property
    def size_bytes(self) -> int:
        """What the folder holds now."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def close(self) -> None:
        """Leave the folder as it is, for a job that goes on."""
        if not self._journal.closed:
            self._journal.close()
            os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder; what tells which job it was goes last."""
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


def holds_job(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a job with these settings left its work folder at `path`."""
    found = _read_job(path)
    return found is not None and not _differences(found["settings"], json.loads(json.dumps(settings)))


def _lock(path: Path, folder: int) -> int:
    lock = os.open(_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        msg = f"{path}: another job is at work in this folder; wait for it, or choose another --out"
        raise DatasetError(msg) from None
    return lock


def _read_job(path: Path) -> Result | None:
    try:
        return json.loads((path / _JOB_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        msg = f"{path / _JOB_NAME}: damaged ({error}); remove the folder {path} and start again"
        raise DatasetError(msg) from error


def _read_journal(path: Path) -> dict[str, Result]:
    results = {}
    if path.exists():
        text = path.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            os.truncate(path, len(whole))  # the line that was being written when the job was killed
        for line in whole.splitlines():
            task, result = json.loads(line)
            results[task] = result
    return results


def _compare(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    differences = _differences(found, settings)
    if differences:
        lines = [f"{path}: holds what an interrupted job with other settings has done; what differs:", *differences]
        lines.append("Give the same settings to go on with it, or start anew with --restart.")
        raise DatasetError("\n".join(lines))


def _differences(found: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name}: was {_shortened(found.get(name))}, is {_shortened(settings.get(name))}"
        for name in dict.fromkeys([*found, *settings])
        if found.get(name) != settings.get(name)
    ]


def _shortened(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:160] + "..."
