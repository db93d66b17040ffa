"""Keeps what a job has done, so that it resumes after any interruption.

    .dataset.partial/
      job.json       the settings and the log's files, which say whether a job is the same; how it is cut into tasks
      journal.jsonl  a line for each task that is done, with its result
      lock           held while a job runs
      chunks/ counts/ ids/ groups/   what tasks left for later ones
      dataset/       the dataset, as far as it is written

A task writes to a temporary file and renames it, and only then enters the journal: a task that is not there runs
again and leaves the same bytes.

What tasks leave for later ones are files of named Arrow tables (`write_sections`), each of which is read without the
others.  Nothing is compressed, so that a table is mapped into memory and only the pages that are used are read.

    table | table | ... | JSON: name -> [offset, length] | length of the JSON, 8 bytes
"""

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import pyarrow as pa

from torchdlrm.errors import DatasetError, differences
from torchdlrm.files import claim_folder, clear_folder, replacing, write_atomically
from torchdlrm.preprocessing.sizing import JobSizing

Result = dict[str, Any]

# Of what tasks leave for later ones: a job that was begun by tasks of another version is not resumed.
WORK_VERSION = 2
_LENGTH_BYTES = 8
_JOB_NAME, _JOURNAL_NAME, _LOCK_NAME = "job.json", "journal.jsonl", "lock"
FOLDERS = ("text", "chunks", "counts", "ids", "groups", "dataset")


class WorkFolder:
    """The work folder of a running job, locked against others."""

    def __init__(self, path: Path, sizing: JobSizing, results: dict[str, Result], lock: int) -> None:
        self.path = path
        self.sizing = sizing
        self._results = results
        self._lock = lock
        self._journal = (path / _JOURNAL_NAME).open("a", encoding="utf-8")

    @classmethod
    def open(cls, path: Path, settings: Mapping[str, Any], sizing: JobSizing, *, restart: bool = False) -> Self:
        """Make the folder, or resume the one that a job with the same settings left; `restart`: forget what it did.

        Raises:
            DatasetError: a job is at work there, or one with other settings left it.
            OSError: it cannot be made, or something else is there.
        """
        folder = claim_folder(path, (*FOLDERS, _JOB_NAME, _JOURNAL_NAME, _LOCK_NAME))
        try:
            return cls._open(path, folder, settings, sizing, restart=restart)
        finally:
            os.close(folder)

    @classmethod
    def _open(cls, path: Path, folder: int, settings: Mapping[str, Any], sizing: JobSizing, *, restart: bool) -> Self:
        lock = _lock(path, folder)
        try:
            found = None if restart else _read_job(path)
            if found is None:
                clear_folder(folder, keep=(_LOCK_NAME,))
                for name in FOLDERS:
                    (path / name).mkdir()
                write_atomically(path / _JOB_NAME, json.dumps({"settings": settings, "layout": asdict(sizing)}))
                return cls(path, sizing, {}, lock)
            _compare(path, found["settings"], json.loads(json.dumps(settings)))
            return cls(path, JobSizing(**found["layout"]), _read_journal(path / _JOURNAL_NAME), lock)
        except BaseException:
            os.close(lock)
            raise

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

    @property
    def size_bytes(self) -> int:
        """The size of all files in the folder."""
        return sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())

    def close(self) -> None:
        """Leave the folder as it is, for a job that resumes it."""
        if not self._journal.closed:
            self._journal.close()
            os.close(self._lock)

    def remove(self) -> None:
        """Remove the folder; the file that identifies its job goes last."""
        for name in FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)


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


def write_sections(path: Path, tables: Mapping[str, pa.Table]) -> None:
    """Write tables under their names; the file is written atomically."""
    places: dict[str, tuple[int, int]] = {}
    with replacing(path) as temporary, pa.OSFile(str(temporary), "wb") as file:
        for name, table in tables.items():
            start = file.tell()
            with pa.ipc.new_stream(file, table.schema) as stream:
                stream.write_table(table)
            places[name] = (start, file.tell() - start)
        footer = json.dumps(places).encode()
        file.write(footer)
        file.write(len(footer).to_bytes(_LENGTH_BYTES, "little"))


class Sections:
    """Reads what `write_sections` wrote; a context manager."""

    def __init__(self, path: Path) -> None:
        self._file = pa.memory_map(str(path), "r")
        size_bytes = self._file.size()
        length = int.from_bytes(self._file.read_at(_LENGTH_BYTES, size_bytes - _LENGTH_BYTES), "little")
        self._places = json.loads(self._file.read_at(length, size_bytes - _LENGTH_BYTES - length))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def table(self, name: str) -> pa.Table:
        """Return the table of that name, in mapped memory."""
        start, length = self._places[name]
        self._file.seek(start)
        return pa.ipc.open_stream(pa.BufferReader(self._file.read_buffer(length))).read_all()
