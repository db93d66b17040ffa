"""Finds the files of a raw log, in their order, and checks whether they have changed since.

In: paths.  Out: `LogFile`s in the order of time, each with a fingerprint.
"""

import gzip
import re
import shlex
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, cast

from torchdlrm.errors import LogError

FileFormat = Literal["text", "gzip", "parquet"]

_DAY = re.compile(r"day_(\d+)(?!\d)")
MAGIC_BYTES = 16
_GZIP_MAGIC = b"\x1f\x8b"
_PARQUET_MAGIC = b"PAR1"
# What files of other kinds start with, what they are, and what makes a log of them that can be read.
_OTHERS = (
    (rb"PK\x03\x04", "a zip archive", "unzip -p {path} | gzip > {path}.gz"),
    (rb"\x28\xb5\x2f\xfd", "packed by zstd", "zstdcat {path} | gzip > {path}.gz"),
    (rb"BZh\d1AY&SY", "packed by bzip2", "bzcat {path} | gzip > {path}.gz"),
    (rb"\xfd7zXZ\x00", "packed by xz", "xzcat {path} | gzip > {path}.gz"),
    (rb"\x04\x22\x4d\x18", "packed by lz4", "lz4cat {path} | gzip > {path}.gz"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z e -so {path} | gzip > {path}.gz"),
    (rb"\xff\xfe|\xfe\xff", "text in UTF-16", "iconv -f UTF-16 -t UTF-8 {path} > {path}.utf8"),
    (rb"([^\0]\0){8}", "text in UTF-16", "iconv -f UTF-16LE -t UTF-8 {path} > {path}.utf8"),
    (rb"(\0[^\0]){8}", "text in UTF-16", "iconv -f UTF-16BE -t UTF-8 {path} > {path}.utf8"),
    (
        rb"\s*\{\s*[\"\}]",
        "JSON",
        "python -c 'import polars, sys; polars.read_ndjson(sys.argv[1]).write_parquet(sys.argv[2])' {path} NEW.parquet",
    ),
    (rb"(?i)\s*<(!doctype|html|\?xml)", "a page of HTML or XML, not the log itself", "fetching it again"),
)


@dataclass(frozen=True)
class LogFile:
    """A file of a log; `size_bytes` as it lies on disk, compressed or not, `modified_ns` since the epoch."""

    path: Path
    size_bytes: int
    day: int | None
    modified_ns: int = 0
    format: FileFormat = "text"

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name

    def check_unchanged(self) -> None:
        """See that the file is still the one that was found at first.

        Raises:
            LogError: its size or its time of modification is another.
        """
        with reading(self.path):
            now = self.path.stat()
        if now.st_size != self.size_bytes or (self.modified_ns and now.st_mtime_ns != self.modified_ns):
            msg = f"{self.path}: the file changed while it was read; start again when nothing writes to it"
            raise LogError(msg)


def find_files(paths: Sequence[Path | LogFile]) -> tuple[LogFile, ...]:
    """The files of a log in the order of time: by day where all are named `day_N...`, else as given.

    One that was found before is taken as it was then, and refused when it is read and has changed.

    Raises:
        LogError: a file is missing, is none, is empty, is packed or coded as none is read, or is given twice.
    """
    if not paths:
        raise LogError("no log given: name at least one file")
    files = []
    for path in paths:
        if isinstance(path, LogFile):
            files.append(path)
            continue
        if not path.is_file():
            reason = "is a folder, not a file" if path.is_dir() else "there is no such file"
            quoted = (
                "; a shell makes names of such a pattern where it is not quoted" if set(path.name) & {*"*?["} else ""
            )
            msg = f"{path}: {reason}; give the files of the log by name{quoted}"
            raise LogError(msg)
        stat = path.stat()
        if stat.st_size == 0:
            msg = f"{path}: the file is empty"
            raise LogError(msg)
        day = _DAY.match(path.name)
        with reading(path), path.open("rb") as start:
            file_format = recognize_format(start.read(MAGIC_BYTES), path)
        files.append(LogFile(path, stat.st_size, int(day[1]) if day else None, stat.st_mtime_ns, file_format))
    resolved = [file.path.resolve() for file in files]
    for i, file in enumerate(files):
        if resolved[i] in resolved[:i]:
            msg = f"{file.path}: given twice; every row of a log counts once"
            raise LogError(msg)
    if all(file.day is not None for file in files):
        files.sort(key=lambda file: (file.day, file.name))
    return tuple(files)


def recognize_format(start: bytes, path: Path) -> FileFormat:
    """The format of a file that starts with these `MAGIC_BYTES`.

    Raises:
        LogError: it is of a kind that is not read; says what makes a log of it.
    """
    for pattern, kind, template in _OTHERS:
        if re.match(pattern, start):
            command = template.format(path=shlex.quote(str(path)) if path.exists() else "FILE")
            msg = f"{path}: is {kind}; a log is UTF-8 text, gzipped or not, or Parquet; this makes one: {command}"
            raise LogError(msg)
    if start.startswith(_GZIP_MAGIC):
        return "gzip"
    return "parquet" if start.startswith(_PARQUET_MAGIC) else "text"


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Report what goes wrong inside as a fault of the file.

    Raises:
        LogError: it cannot be read, or its gzip stream is damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{path}: the gzip stream is damaged or cut off ({error}); fetch the file again"
        raise LogError(msg) from error
    except OSError as error:
        msg = f"{path}: cannot be read: {error.strerror or error}"
        raise LogError(msg) from error


@contextmanager
def open_text(file: LogFile) -> Iterator[IO[bytes]]:
    """The text of a file, unpacked.

    Raises:
        LogError: as `reading`, also for what goes wrong inside.
    """
    with reading(file.path), file.path.open("rb") as raw:
        yield unpacked(raw, file.format)


def unpacked(raw: IO[bytes], file_format: FileFormat) -> IO[bytes]:
    """The text of an open file."""
    return cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if file_format == "gzip" else raw
