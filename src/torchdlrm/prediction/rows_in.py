"""Reads a log to predict in chunks of rows, good and bad, in order and in bounded memory.

In: files, whose formats are recognised by their first bytes, or standard input.  Out: `RowChunk`s.

The columns are those of the model's schema, with or without label, in the file's order: features as they were trained
on, label and weight if they are there, and passthrough columns as text.  A text with a header, and a log that names its
columns, are read by name: the order is free, and what is no feature may be missing or more.  A text without one has the
columns of the schema, or these without label and weight.
"""

import io
import os
import re
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import BinaryIO, Literal, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.columns import (
    Column,
    DenseColumn,
    IgnoredColumn,
    LabelColumn,
    SparseColumn,
    TimeColumn,
    WeightColumn,
)
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, reading
from torchdlrm.logs.find import find_files, recognise
from torchdlrm.logs.format import OpenLog, found_by_name, ignored
from torchdlrm.storage.places import shown
from torchdlrm.storage.reading import FileIdentity

STANDARD_INPUT = Path("-")
CHUNK_BYTES = 8 << 20
_POLL_MS = 100
Writing = Literal["log", "csv", "tsv"]  # as the schema says, or in the usual way
# Which columns of the log are wanted besides those that are asked for: none; those that name a row; all.
Kept = Literal["none", "keys", "all"]
_ID_NAME = re.compile(r"(?i:(^|[\W_])(id|uuid|key)$)|[a-z]I[dD]$")


@dataclass(frozen=True)
class RowChunk:
    """Some rows of the log, one after another.

    Attributes:
        frame: the good ones, as typed columns.
        num_rows: good and bad.
        bad_positions: where the bad ones stand among all, from 0: int64.
        bad_rows: what is wrong with them, by file and line.
        has_label: whether the frame has a label that the model has learnt; it may be null.
        num_bytes: how far the reader came in its file since the last chunk.
    """

    frame: pl.DataFrame
    num_rows: int
    bad_positions: NDArray[np.int64]
    bad_rows: BadRows
    has_label: bool
    num_bytes: int

    def targets(self, schema: FeatureSchema) -> pl.DataFrame:
        """The labels of each good row, and its weight, as far as the file has those columns; each may be null."""
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
            raise LogError(f"`columns`: {', '.join(twice)} is given more than once")
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
            with reading(file.path), file.open() as raw:
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
            raise LogError(f"{streams[0]}: {name} is read alone, not among files")
        return bool(streams)

    def _of_stream(self, handle: int, name: Path) -> Iterator[RowChunk]:
        stream = io.BufferedReader(_Stream(handle, self.is_over))
        if not stream.peek(1):
            raise LogError(f"{name}: is empty")
        with reading(name):
            log_format, _, unpacked = recognise(cast("BinaryIO", stream), name)
        yield from self._read(unpacked, LogFile(name, FileIdentity(0, 0), None, log_format))

    def _read(self, raw: BinaryIO, file: LogFile) -> Iterator[RowChunk]:
        schema = schema_for_writing(self.schema, self.log_format)
        with file.format.opened(raw, file, schema) as log:
            layout, passthrough = find_columns(log, file.path, schema, self.passthrough, self.kept)
            # Of all further files is wanted what was found in the first one.
            object.__setattr__(self, "passthrough", passthrough)
            object.__setattr__(self, "kept", "none")
            num_lines, before = int(layout.header), 0
            for parsed, now in log.chunks(layout, self.chunk_bytes):
                bad_rows = BadRows()
                bad_rows.add_chunk(parsed.bad_rows, shown(file.path), num_lines)
                num_rows = parsed.frame.height + len(parsed.bad_positions)
                yield RowChunk(
                    parsed.frame, num_rows, parsed.bad_positions, bad_rows, bool(layout.labels), now - before
                )
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


def schema_for_writing(schema: FeatureSchema, writing: Writing) -> FeatureSchema:
    """The schema of a log that is written as the schema says (`log`), or as `csv` or `tsv` in the usual way."""
    if writing == "log":
        return schema
    written = {"separator": ",", "quote": '"'} if writing == "csv" else {"separator": "\t", "quote": None}
    return schema.model_copy(update=written)


def find_columns(
    log: OpenLog, path: Path, schema: FeatureSchema, passthrough: Sequence[str], kept: Kept = "none"
) -> tuple[FeatureSchema, Sequence[str]]:
    """The columns of a log by its names or its first rows, with `header` where its first line names them.

    Args:
        log: it.
        path: for messages.
        schema: the model's columns, and how a text is written.
        passthrough: names of other columns that are wanted.
        kept: which are wanted besides.

    Returns:
        The schema by which it is read, and the names of the columns that are wanted.

    Raises:
        LogError: a feature, or a column that is wanted, is not there.
    """
    if log.names is not None:
        return _by_name(log.names, str(path), schema, passthrough, kept, header=False)
    first = log.first_rows[0] if log.first_rows else []
    if schema.header or {column.log_name for column in schema.named_as_in(first).features} <= set(first):
        return _by_name(first, f"{path}, line 1 (header)", schema, passthrough, kept, header=True)
    without_label = [column for column in schema.columns if not isinstance(column, LabelColumn | WeightColumn)]
    # A bad line may have any number of columns: most lines are good.
    num_unlabelled = sum(len(row) == len(without_label) for row in log.first_rows)
    num_labelled = sum(len(row) == len(schema.columns) for row in log.first_rows)
    columns = without_label if num_unlabelled > num_labelled else list(schema.columns)
    missing = [name for name in passthrough if name not in {column.name for column in columns}]
    if missing:
        raise LogError(_not_there(missing, str(path), [column.name for column in columns]))
    wanted = [*passthrough, *_kept({column.name: column for column in columns}, passthrough, kept)]
    read = schema.with_columns([_as_read(column, column.name, wanted, schema) for column in columns])
    return read, wanted


def _by_name(
    names: Sequence[str], where: str, schema: FeatureSchema, passthrough: Sequence[str], kept: Kept, *, header: bool
) -> tuple[FeatureSchema, Sequence[str]]:
    found = found_by_name(names, where, schema, schema.features, "the model")
    own = {column.name: column for column in found if column is not None}
    by_name = {names[i] if column is None else column.name: column for i, column in enumerate(found)} | own
    wanted = [*passthrough, *_kept(by_name, passthrough, kept)]
    # What the log alone has under the `name` of a column that is there by its `header_name` is not read.
    others = [name for name in wanted if name not in own]
    columns = [
        _as_read(column, names[i], others if column is None else wanted, schema, at=i) for i, column in enumerate(found)
    ]
    missing = set(wanted) - {column.name for column in columns}
    if missing:
        raise LogError(_not_there([name for name in wanted if name in missing], where, names))
    read = schema.with_columns(columns).model_copy(update={"header": header})
    return read, wanted


def _kept(columns: Mapping[str, Column | None], passthrough: Sequence[str], kept: Kept) -> list[str]:
    """The columns that are wanted besides `passthrough`, in the order of the log; None is one of the log alone."""
    if kept == "none":
        return []
    others = {name: column for name, column in columns.items() if name not in {*passthrough, PREDICTION_COLUMN, ""}}
    return [name for name, column in others.items() if kept == "all" or _names_a_row(name, column)]


def _names_a_row(name: str, column: Column | None) -> bool:
    """Whether a column says which row it is, and not only what is in it: times, ids, and what is no feature."""
    if isinstance(column, TimeColumn | IgnoredColumn):
        return True
    is_one_value = column is None or (isinstance(column, SparseColumn) and not column.is_multi_valued)
    return is_one_value and any(_ID_NAME.search(text) for text in (name, column.log_name if column else name))


def _as_read(
    column: Column | None, log_name: str, passthrough: Sequence[str], schema: FeatureSchema, *, at: int = 0
) -> Column:
    """A column of the log as it is to be read; `column` is that of the schema, None where it is of the log alone."""
    others = {label.name for label in schema.labels} - {label.name for label in schema.learnt}
    if isinstance(column, DenseColumn | SparseColumn | LabelColumn | WeightColumn) and column.name not in others:
        return column
    name = log_name if column is None else column.name
    if name in passthrough:
        # Any text may name a column of a log, not only what a schema allows.
        return SparseColumn.model_construct(name=name, header_name=log_name, kind="string", role="sparse")
    if column is None:
        return ignored(at, log_name)
    return IgnoredColumn.model_construct(name=name, header_name=log_name, role="ignore")


def _not_there(missing: Sequence[str], where: str, names: Sequence[str]) -> str:
    return f"`columns`: {where} has no column {', '.join(missing)}; it has {', '.join(names)}"
