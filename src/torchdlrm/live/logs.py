"""The log of a period: its files as they were found, what they are known by, and whether they can be read.

In: paths, a schema.  Out: a `PeriodLog`.  A file is read by several steps, minutes apart: each of them is given the
files as they were when their checksums were taken, and refuses one that has been replaced since.
Why: docs/decisions/a-log-is-known-by-its-bytes.md.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchdlrm.errors import LiveError, LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.live.record import LogRecord, PeriodRecord
from torchdlrm.logs.files import LogFile, reading
from torchdlrm.logs.find import find_files
from torchdlrm.storage import mirror
from torchdlrm.storage.places import located, shown
from torchdlrm.storage.reading import open_to_read


@dataclass(frozen=True)
class PeriodLog:
    """The files of a log, in the order of time, and what is recorded of each."""

    files: tuple[LogFile, ...]
    records: tuple[LogRecord, ...]


def find_log(logs: str | Path | Sequence[str | Path]) -> PeriodLog:
    """Find the files of a log, and take their checksums.

    Raises:
        LogError: a file is missing, empty, of a kind that is not read, still being written, or a copy of another.
    """
    files = find_files([located(log) for log in ([logs] if isinstance(logs, str | Path) else logs)])
    records: dict[str, LogRecord] = {}
    for file in files:
        with reading(file.path), open_to_read(file.path) as raw:
            sha256 = hashlib.file_digest(raw, "sha256").hexdigest()  # type: ignore[arg-type]  # of typeshed
        file.check_unchanged()
        if sha256 in records:
            raise LogError(f"{file.path}: is a copy of {records[sha256].path}; every row of a log counts once")
        records[sha256] = LogRecord(path=shown(file.path.resolve()), size_bytes=file.size_bytes, sha256=sha256)
    return PeriodLog(files, tuple(records.values()))


def watched_logs(prefix: Path, periods: Sequence[PeriodRecord]) -> Iterator[list[Path]]:
    """The logs under a prefix that follow the last period's log, in the order of names; it waits for more without end.

    A log is the files of a folder, of an hour or a day, or a file in the prefix itself.  It is complete when a
    file `_SUCCESS` is in the folder, or a later log is there.
    """
    prefix, learnt = prefix.resolve(), [located(log.path) for record in periods for log in record.logs]
    after = max((_unit(path.relative_to(prefix)) for path in learnt if path.is_relative_to(prefix)), default="")
    while True:
        sizes, logs = mirror.sizes_of(prefix), dict[str, list[Path]]()
        for name in sorted(sizes):
            if sizes[name] and not mirror.is_hidden(name) and _unit(Path(name)) > after:
                logs.setdefault(_unit(Path(name)), []).append(prefix / name)
        if (first := min(logs, default="")) and (len(logs) > 1 or f"{first}/_SUCCESS" in sizes):
            yield logs[after := first]
        else:
            time.sleep(5)


def _unit(name: Path) -> str:
    """What a file under a watched prefix is a part of: its folder there, or itself."""
    return str(name.parent) if name.parent.name else name.name


def require_readable(log: PeriodLog, schema: FeatureSchema, max_bad_rows: int) -> None:
    """See by the beginnings of the files whether they have the schema's columns, and any rows.

    Raises:
        LogError: a file is written otherwise than the schema says or lacks a column, or no file has a row.
    """
    num_with_rows = 0
    for file in log.files:
        num_with_rows += file.format.has_rows(file, file.format.layout(file, schema, max_bad_rows))
    if not num_with_rows:
        raise LogError(f"{log.files[0].path}: has no row; leave out the log of a period in which nothing happened")


def learnt_already(logs: Sequence[LogRecord], lineage: Sequence[PeriodRecord]) -> PeriodRecord | None:
    """The period in which a log was learnt, wherever it lay, alone or with others; None where it is new.

    Args:
        logs: its files.
        lineage: the periods that the model has learnt, newest first; of files in several of them, the newest counts.

    Raises:
        LiveError: some of the files were learnt, and others are new.
    """
    periods: Mapping[str, PeriodRecord] = {log.sha256: record for record in reversed(lineage) for log in record.logs}
    learnt = [log for log in logs if log.sha256 in periods]
    if learnt and len(learnt) < len(logs):
        period, new = periods[learnt[0].sha256].period, ", ".join(log.path for log in logs if log not in learnt)
        raise LiveError(
            f"`logs`: {learnt[0].path} was learnt in period {period}, and every row counts once; give the files that "
            f"are new: {new}"
        )
    return max((periods[log.sha256] for log in learnt), key=lambda record: record.period, default=None)


def is_same(first: Sequence[LogRecord], second: Sequence[LogRecord]) -> bool:
    """Whether two logs are the same, wherever they are."""
    return [log.sha256 for log in first] == [log.sha256 for log in second]
