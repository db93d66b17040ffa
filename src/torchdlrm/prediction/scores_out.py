"""Writes predictions to a file of scores: Parquet, CSV, gzipped CSV, or CSV on standard output.

In: frames, one after another.  Out: a file that appears under its name when it is complete.
"""

import errno
import gzip
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self, cast

import polars as pl
import pyarrow.parquet as pq

from torchdlrm.errors import Interrupted, UserError
from torchdlrm.files import replacing
from torchdlrm.storage import mirror

STANDARD_OUTPUT = Path("-")
FILE_ENDINGS = (".parquet", ".csv", ".csv.gz")
LOGIT_COLUMN = "logit"
# The default of 9 takes as long as predicting; digits at random hardly shrink further.
_GZIP_LEVEL = 1


@contextmanager
def writing_scores(path: Path, argument: str = "out") -> Iterator["_CsvWriter | _ParquetWriter"]:
    """Write frames of the same columns to `path`, in the format that its name asks for; `-` is standard output.

    Raises:
        UserError: the name asks for no format, or cannot be written to.
        OSError: the disk is full, or fails.
        Interrupted: the reader of standard output has gone.
    """
    check_name(path, argument)
    if path == STANDARD_OUTPUT:
        try:
            yield _CsvWriter(sys.stdout.buffer)
            sys.stdout.buffer.flush()
        except OSError as error:
            # Python would flush once more when it ends, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if isinstance(error, BrokenPipeError):
                raise Interrupted("the reader of the scores has gone") from error
            error.filename = error.filename or "standard output"
            raise
        return
    try:
        with replacing(path) as temporary:
            if path.suffix == ".parquet":
                with _ParquetWriter(temporary) as writer:
                    yield writer
            elif path.suffix == ".gz":
                # No name and no time within: the same scores give the same bytes.
                with temporary.open("wb") as raw, gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as packed:
                    yield _CsvWriter(cast("IO[bytes]", packed))
            else:
                with temporary.open("wb") as file:
                    yield _CsvWriter(file)
    except OSError as error:
        if error.filename != str(path) or error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}:
            raise
        msg = f"`{argument}`: {path} cannot be written: {error.strerror}"
        raise UserError(msg) from error


def check_name(path: Path, argument: str = "out") -> None:
    """See that scores can be written under a name, before any is predicted.

    Raises:
        UserError: the name asks for no format, is that of a folder, or standard output is closed.
        StorageError: there is no such bucket, or it cannot be read.
    """
    if path == STANDARD_OUTPUT:
        if sys.stdout is None:
            msg = f"`{argument}`: standard output is closed; name a file to write to"
            raise UserError(msg)
        return
    if not path.name.endswith(FILE_ENDINGS):
        also = ", or be - for CSV on standard output" if argument == "out" else ""
        msg = f"`{argument}`: {path} must end in .parquet, .csv or .csv.gz{also}"
        raise UserError(msg)
    if mirror.fetch(path, ()).is_dir():  # where there is no such bucket it is said now
        msg = f"`{argument}`: {path} is a folder; name a file in it"
        raise UserError(msg)


class _CsvWriter:
    """With a header; of a column of lists, the values are joined by the caller."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._is_first = file, True

    def write(self, frame: pl.DataFrame) -> None:
        # An empty line would be no row to many a reader.
        null = "NaN" if frame.width == 1 else ""
        self._file.write(frame.write_csv(include_header=self._is_first, null_value=null).encode())
        self._is_first = False


class _ParquetWriter:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        return self

    def write(self, frame: pl.DataFrame) -> None:
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, table.schema, compression="zstd", compression_level=1)
        self._writer.write_table(table.cast(self._writer.schema))

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
