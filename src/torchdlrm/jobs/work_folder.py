"""Keeps what a job has done, so that it resumes after any interruption.

    .OUT.partial/
      job.json       the settings and the log's files, which say whether a job is the same; how it is cut into tasks
      journal.jsonl  a line for each task that is done, with its result
      lock           held while a job runs
      ...            folders of what tasks left for later ones, and of what the job makes
    OUT.partial/HASH/...  these folders, where a cluster runs the tasks of a job at a URL: in the bucket, by a hash of
                          job.json, so that what another job has left is never taken for this one's

A task writes to a temporary file and renames it, and only then enters the journal: a task that is not there runs
again and leaves the same bytes.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from torchdlrm.errors import DatasetError, differences
from torchdlrm.files import claim_folder, clear_folder, remove_folder, sha256_of, write_atomically
from torchdlrm.storage.places import url_of

Result = dict[str, Any]

_JOB_NAME, _JOURNAL_NAME, _LOCK_NAME = "job.json", "journal.jsonl", "lock"


class WorkFolder:
    """The work folder of a running job, locked against others."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path, self.pieces = path, pieces_of(path)
        self.layout: dict[str, Any] = json.loads((path / _JOB_NAME).read_text(encoding="utf-8"))["layout"]
        self._results = _read_journal(path / _JOURNAL_NAME)
        self._lock = lock
        self._journal = (path / _JOURNAL_NAME).open("a", encoding="utf-8")

    @classmethod
    def open(
        cls, path: Path, settings: Result, layout: Result, folders: Collection[str], *, is_shared: bool, restart: bool
    ) -> Self:
        """Make the folder with these folders in it, or resume the one that a job with the same settings left.

        `layout` says how a new job is cut into tasks.  With `is_shared`, tasks are run where only a bucket is seen, if
        `path` is in one.  `restart`: forget what the job did.

        Raises:
            DatasetError: a job is at work there, or one with other settings left it.
            OSError: it cannot be made, or something else is there.
        """
        folder = claim_folder(path, (*folders, _JOB_NAME, _JOURNAL_NAME, _LOCK_NAME))
        try:
            lock = _lock(path, folder)
            try:
                found = _read_job(path)
                if found is not None and not restart:
                    _compare(path, found["settings"], json.loads(json.dumps(settings)))
                    return cls(path, lock)
                if pieces_of(path) != path:
                    remove_folder(pieces_of(path))
                clear_folder(folder, keep=(_LOCK_NAME,))
                for name in folders:
                    (path / name).mkdir()
                job = {"settings": settings, "layout": layout, "is_shared": is_shared and url_of(path) is not None}
                write_atomically(path / _JOB_NAME, json.dumps(job))
                return cls(path, lock)
            except BaseException:
                os.close(lock)
                raise
        finally:
            os.close(folder)

    def result(self, task: str) -> Result | None:
        """Return the result of a task that is done, else None."""
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

    def close(self) -> None:
        """Leave the folder as it is, for a job that resumes it."""
        if not self._journal.closed:
            self._journal.close()
            os.close(self._lock)


def work_folder(out: Path) -> Path:
    """Where a job keeps what it has done until `out` is complete."""
    return out.absolute().with_name(f".{out.name}.partial")


def pieces_of(path: Path) -> Path:
    """Where the tasks of the job of a work folder leave their files."""
    job = _read_job(path)
    if job is None or not job.get("is_shared"):
        return path
    return path.with_name(path.name.removeprefix(".")) / sha256_of(path / _JOB_NAME)[:16]


def remove_work(path: Path) -> None:
    """Remove a work folder; the file that identifies its job goes last."""
    (path / _JOURNAL_NAME).unlink(missing_ok=True)
    if (pieces := pieces_of(path)) != path:
        remove_folder(pieces)
        with suppress(OSError):  # it holds another job's
            pieces.parent.rmdir()
    for folder in path.iterdir():
        shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(path, ignore_errors=True)


def holds_job(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a job with these settings left its work folder at `path`."""
    found = _read_job(path)
    return found is not None and not differences(found["settings"], json.loads(json.dumps(settings)))


def _lock(path: Path, folder: int) -> int:
    lock = os.open(_LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        msg = f"{path}: another job is at work in this folder; wait for it, or choose another `out`"
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
    differing = differences(found, settings)
    if differing:
        lines = [f"{path}: holds what an interrupted job with other settings has done; what differs:", *differing]
        lines.append("Give the same settings to resume it, or start again with `restart`.")
        raise DatasetError("\n".join(lines))
