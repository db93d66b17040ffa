"""Reads a log to predict in chunks of rows, good and bad, in order and in bounded memory.

In: files, whose formats are recognised by their first bytes, or standard input.  Out: `RowChunk`s.
"""

import io
import os
import select
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import BinaryIO, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, reading
from torchdlrm.logs.find import find_files, recognise
from torchdlrm.prediction.log_columns import Kept, Writing, find_columns, schema_for_writing

STANDARD_INPUT = Path("-")
CHUNK_BYTES = 8 << 20
_POLL_MS = 100


@dataclass(frozen=True)
class RowChunk:
    """Some rows of the log, one after another.

    Attributes:
        frame: the good ones, as typed columns.
        num_rows: good and bad.
        bad_positions: where the bad ones stand among all, from 0: int64.
        bad_rows: what is wrong with them, by file and line.
        has_label: whether the frame has the label, which may be null.
        num_bytes: how far the reader came in its file since the last chunk.
    """

    frame: pl.DataFrame
    num_rows: int
    bad_positions: NDArray[np.int64]
    bad_rows: BadRows
    has_label: bool
    num_bytes: int

    def targets(self, schema: FeatureSchema) -> pl.DataFrame:
        """The label of each good row, and its weight where the file has that column; either may be null."""
        return self.frame.select(name for name in schema.target_names if name in self.frame.columns)


@dataclass(frozen=True)
class RowsIn:
    """A log to predict.

    Attributes:
        paths: its files in order; or alone `-` for standard input, or a pipe that has a name.
        schema: the model's columns.
        log_format: how text is written.
        passthrough: other columns that are wanted, by the schema's name or the log's.
        kept: which columns of the log are wanted besides; the first file's are added to `passthrough` when it is read.
        chunk_bytes: of text, about, that are read at a time.
        is_over: ends a stream for the thread that waits for more of it, when no more is wanted.
        files: those of `paths` as they were found before, and still must be; None: as they are found.
    """

    paths: Sequence[Path]
    schema: FeatureSchema
    log_format: Writing = "log"
    passthrough: Sequence[str] = ()
    kept: Kept = "none"
    chunk_bytes: int = CHUNK_BYTES
    is_over: Event = field(default_factory=Event)
    files: tuple[LogFile, ...] | None = None

    def __post_init__(self) -> None:
        """Take columns by either name.

        Raises:
            LogError: a column is asked for twice.
        """
        names = {column.log_name: column.name for column in self.schema.columns}
        passthrough = [names.get(name, name) for name in self.passthrough]
        twice = sorted({name for name in passthrough if passthrough.count(name) > 1})
        if twice:
            msg = f"`columns`: {', '.join(twice)} is given more than once"
            raise LogError(msg)
        object.__setattr__(self, "passthrough", passthrough)

    @property
    def size_bytes(self) -> int | None:
        """Of all files; None for standard input and pipes.

        Raises:
            LogError: a file is not there, or is empty.
        """
        return None if self._is_stream else sum(file.size_bytes for file in self._found)

    def __iter__(self) -> Iterator[RowChunk]:
        """Read everything once.

        Raises:
            LogError: a file cannot be read, is damaged, lacks a column, or has changed.
        """
        if self._is_stream:
            if self.paths[0] != STANDARD_INPUT:
                pipe = os.open(self.paths[0], os.O_RDONLY | os.O_NONBLOCK)  # there may be no writer yet
                try:
                    yield from self._of_stream(pipe, self.paths[0])
                finally:
                    os.close(pipe)
                return
            if sys.stdin is None:
                raise LogError("standard input: is closed; give the log as a file, or pipe it in")
            yield from self._of_stream(sys.stdin.fileno(), Path("standard input"))
            return
        for file in self._found:
            with reading(file.path), file.path.open("rb") as raw:
                yield from self._read(raw, file)
            file.check_unchanged()

    @property
    def _found(self) -> tuple[LogFile, ...]:
        return find_files(self.paths) if self.files is None else self.files

    @property
    def _is_stream(self) -> bool:
        streams = [path for path in self.paths if path == STANDARD_INPUT or path.is_fifo()]
        if streams and len(self.paths) > 1:
            name = "standard input" if streams[0] == STANDARD_INPUT else "a pipe"
            msg = f"{streams[0]}: {name} is read alone, not among files"
            raise LogError(msg)
        return bool(streams)

    def _of_stream(self, handle: int, name: Path) -> Iterator[RowChunk]:
        stream = io.BufferedReader(_Stream(handle, self.is_over))
        if not stream.peek(1):
            msg = f"{name}: is empty"
            raise LogError(msg)
        with reading(name):
            log_format, _, unpacked = recognise(cast("BinaryIO", stream), name)
        yield from self._read(unpacked, LogFile(name, 0, None, log_format))

    def _read(self, raw: BinaryIO, file: LogFile) -> Iterator[RowChunk]:
        schema = schema_for_writing(self.schema, self.log_format)
        with file.format.opened(raw, file, schema) as log:
            columns = find_columns(log, file.path, schema, self.passthrough, self.kept)
            # Of all further files is wanted what was found in the first one.
            object.__setattr__(self, "passthrough", columns.passthrough)
            object.__setattr__(self, "kept", "none")
            num_lines, before = int(columns.schema.header), 0
            for parsed, now in log.chunks(columns.schema, self.chunk_bytes):
                bad_rows = BadRows()
                bad_rows.add_chunk(parsed.bad_rows, str(file.path), num_lines)
                num_rows = parsed.frame.height + len(parsed.bad_positions)
                yield RowChunk(parsed.frame, num_rows, parsed.bad_positions, bad_rows, columns.has_label, now - before)
                num_lines, before = num_lines + parsed.num_lines, now


class _Stream(io.RawIOBase):
    """Bytes that may be long in coming, and end when it is over."""

    def __init__(self, handle: int, is_over: Event) -> None:
        super().__init__()
        self._handle, self._is_over = handle, is_over
        self._poll = select.poll()
        self._poll.register(handle, select.POLLIN)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # narrower than any buffer
        while not self._poll.poll(_POLL_MS):
            if self._is_over.is_set():
                return 0
        return os.readv(self._handle, [buffer])
