"""Finds the files of a log, in their order, and recognises how each is written.

In: paths, of a bucket also prefixes and patterns.  Out: `LogFile`s in the order of time, each with its format, its
packing and its identity.
"""

import io
import itertools
import re
import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, cast

from torchdlrm.errors import LogError
from torchdlrm.logs.files import LogFile, Packing, packing_of, reading, unpacked
from torchdlrm.logs.format import LogFormat
from torchdlrm.logs.formats.arrays import MultiHotFormat, NpyFormat, NvtFormat
from torchdlrm.logs.formats.columnar import ORC, PARQUET
from torchdlrm.logs.formats.json_lines import JSON_LINES
from torchdlrm.logs.formats.text import TEXT
from torchdlrm.logs.lines import LineFormat
from torchdlrm.storage.mirror import files_at
from torchdlrm.storage.reading import identity_of, open_to_read

# The first that recognises a file reads it; text, which recognises any, is last.
LOG_FORMATS: tuple[LogFormat, ...] = (PARQUET, ORC, NpyFormat(), MultiHotFormat(), NvtFormat(), JSON_LINES, TEXT)

MAGIC_BYTES = 16
_DAY = re.compile(r"day_(\d+)(?!\d)")
# What files of other kinds start with, what they are, and what makes a log of them that can be read.
_OTHERS = (
    (rb"PK\x03\x04", "a zip archive", "unzip -p {path} | gzip > {path}.gz"),
    (rb"BZh\d1AY&SY", "packed by bzip2", "bzcat {path} | gzip > {path}.gz"),
    (rb"\xfd7zXZ\x00", "packed by xz", "xzcat {path} | gzip > {path}.gz"),
    (rb"\x04\x22\x4d\x18", "packed by lz4", "lz4cat {path} | gzip > {path}.gz"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z e -so {path} | gzip > {path}.gz"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {path}.utf8"),
    (rb"([^\0]\0){8}", "text in UTF-16", "iconv -f UTF-16LE -t UTF-8 {path} > {path}.utf8"),
    (rb"(\0[^\0]){8}", "text in UTF-16", "iconv -f UTF-16BE -t UTF-8 {path} > {path}.utf8"),
    (rb"\s*\[\s*\{", "one JSON array", "jq -c '.[]' {path} > {path}.jsonl"),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a page of HTML or XML, not the log itself", "fetching it again"),
)


def find_files(paths: Sequence[Path | LogFile]) -> tuple[LogFile, ...]:
    """The files of a log in the order of time: by day where all are named `day_N...`, else as given.

    One that was found before is taken as it was then, and refused when it is read and has changed.

    Raises:
        LogError: a file is missing, is none, is empty, is packed or coded as none is read, or is given twice.
    """
    if not paths:
        raise LogError("no log given: name at least one file")
    found = [[path] if isinstance(path, LogFile) else files_at(path) for path in paths]
    with ThreadPoolExecutor() as threads:
        files = list(threads.map(_found, itertools.chain.from_iterable(found)))
    resolved = [file.path.resolve() for file in files]
    for i, file in enumerate(files):
        if resolved[i] in resolved[:i]:
            raise LogError(f"{file.path}: given twice; every row of a log counts once")
    if all(file.day is not None for file in files):
        files.sort(key=lambda file: (file.day, file.name))
    return tuple(files)


def _found(path: Path | LogFile) -> LogFile:
    if isinstance(path, LogFile):
        return path
    try:
        identity = identity_of(path)
    except FileNotFoundError:
        reason = "is a folder, not a file" if path.is_dir() else "there is no such file"
        quoted = "; a shell makes names of such a pattern where it is not quoted" if set(path.name) & {*"*?["} else ""
        raise LogError(f"{path}: {reason}; give the files of the log by name{quoted}") from None
    if identity.size_bytes == 0:
        raise LogError(f"{path}: the file is empty")
    day = _DAY.match(path.name)
    with reading(path), open_to_read(path, identity) as raw:
        log_format, packing, _ = recognise(raw, path)
    return LogFile(path, identity, int(day[1]) if day else None, log_format, packing)


def recognise(raw: BinaryIO, path: Path) -> tuple[LogFormat, Packing | None, BinaryIO]:
    """The format and the packing of an open file or a stream, whose name is `path`; and all that it holds, unpacked.

    Raises:
        LogError: it is of a kind that is not read; says what makes a log of it.
    """
    start = raw.read(MAGIC_BYTES)
    packing = packing_of(start)
    log_format = next(form for form in LOG_FORMATS if form.recognises(start, path))
    if packing is not None:
        raw = cast("BinaryIO", unpacked(_joined(start, raw), packing))
        start = raw.read(MAGIC_BYTES)
        log_format = next(form for form in LOG_FORMATS if form.recognises(start, path))
    elif log_format is LOG_FORMATS[-1]:
        for pattern, kind, template in _OTHERS:
            if re.match(pattern, start):
                command = template.format(path=shlex.quote(str(path)) if path.exists() else "FILE")
                *others, last = [form.name for form in reversed(LOG_FORMATS)]
                read = f"{', '.join(others)} or {last}"
                raise LogError(f"{path}: is {kind}; a log is {read}; this makes one: {command}")
    if packing is not None and not isinstance(log_format, LineFormat):
        msg = f"{path}: is {log_format.name} packed by {packing}, and only text may be packed; unpack it first"
        raise LogError(msg)
    return log_format, packing, _joined(start, raw)


def _joined(start: bytes, rest: BinaryIO) -> BinaryIO:
    return cast("BinaryIO", io.BufferedReader(_Joined(start, rest)))


class _Joined(io.RawIOBase):
    """Bytes that were read from a stream, and then the rest of it."""

    def __init__(self, start: bytes, stream: BinaryIO) -> None:
        super().__init__()
        self._start, self._stream = start, stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        data = self._start[: len(buffer)] or self._stream.read(len(buffer))
        self._start = self._start[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)
