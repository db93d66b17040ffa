"""Defines what a format of logs is: one object, which all code that reads a log asks.

To add a format, write a class in a file of `torchdlrm.logs.formats` and enter it in `torchdlrm.logs.find`. Most are a
`LineFormat` (rows are lines of a text, which may be packed) or a `TableFormat` (rows lie in groups, as typed columns).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.columns import Column, IgnoredColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile

_MOST_NAMES_SHOWN = 100
_EXTRA = "@"  # no column of a schema is called so
NUM_PLACES = 16  # in which a large log is sampled


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a file: bytes `start` to `end` of its text, or groups of its rows."""

    start: int
    end: int


@dataclass(frozen=True)
class ParsedChunk:
    """The good rows of a chunk as typed columns, its number of lines, and its bad rows (lines counted from 1).

    `bad_positions`: int64, where the bad rows stand among all rows of the chunk, from 0; a quoted row may have several
    lines.
    """

    frame: pl.DataFrame
    num_lines: int
    bad_rows: BadRows
    bad_positions: npt.NDArray[np.int64]

    @classmethod
    def of(
        cls,
        frame: pl.DataFrame,
        good: pl.Series | None,
        num_lines: int,
        bad_rows: BadRows,
        whole: npt.NDArray[np.bool_] | None = None,
    ) -> Self:
        """What is left of a chunk.

        Args:
            frame: the rows that could be cut into cells.
            good: Boolean, which of these are good; None: all.
            num_lines: lines of the chunk.
            bad_rows: its bad rows.
            whole: bool, which rows of the chunk are in `frame`; None: all.
        """
        if good is None and whole is None:
            return cls(frame, num_lines, bad_rows, np.zeros(0, np.int64))
        is_good = np.ones(frame.height, np.bool_) if whole is None else whole.copy()
        if good is not None:
            is_good[is_good] = good.to_numpy()
            frame = frame.filter(good)
        return cls(frame, num_lines, bad_rows, np.flatnonzero(~is_good))


@dataclass(frozen=True)
class SampledRows:
    """Rows from all over a file, as its format has them.

    Attributes:
        table: the rows.
        is_whole: whether these are all rows of the file.
        places: where they are from, in words.
        bad_lines: lines that are no rows, in words.
    """

    table: pa.Table
    is_whole: bool
    places: str
    bad_lines: Sequence[str] = ()


@dataclass(frozen=True)
class OpenLog:
    """A log that is read once, from its beginning to its end.

    Attributes:
        names: of its columns; None where it is a text, whose first line may name them.
        chunks: takes a layout and how many bytes a chunk has, about; gives chunks, of rows to predict, and how far in
            its file the reader is after each.  Raises LogError where the log is damaged, or not what the layout says.
        first_rows: of a text, the cells of its first lines.
    """

    names: Sequence[str] | None
    chunks: Callable[[FeatureSchema, int], Iterator[tuple[ParsedChunk, int]]]
    first_rows: Sequence[Sequence[str]] = ()


class LogFormat(ABC):
    """How a log is written.

    Attributes:
        name: in words.
        text_bytes_a_byte: how long a text the rows make that take a byte of an unpacked file.
    """

    name: ClassVar[str]
    text_bytes_a_byte: ClassVar[float]

    @abstractmethod
    def recognises(self, start: bytes, path: Path) -> bool:
        """Whether a file, or text that was unpacked, that starts with these `MAGIC_BYTES` is of the format."""

    @abstractmethod
    def layout(self, file: LogFile, schema: FeatureSchema, max_bad_rows: int = 0) -> FeatureSchema:
        """The schema with the columns as the file has them, by which it is read.

        Raises:
            LogError: the file cannot be read, lacks columns that the schema reads, names one of them twice, or seems to
                be written otherwise, and not because of up to `max_bad_rows` bad rows.
        """

    @abstractmethod
    def chunks(self, file: LogFile, layout: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
        """Cut a file that is not packed into chunks that take about `chunk_bytes` of memory as text.

        Raises:
            LogError: the file cannot be read, or has no such columns.
        """

    @abstractmethod
    def read(
        self, file: LogFile, chunk: Chunk, layout: FeatureSchema, *, is_label_optional: bool = False
    ) -> ParsedChunk:
        """Read a chunk as the layout says; a label may be missing where `is_label_optional`.

        Raises:
            LogError: the file cannot be read.
        """

    @abstractmethod
    def has_rows(self, file: LogFile, layout: FeatureSchema) -> bool:
        """Whether a file seems to have any row."""

    @abstractmethod
    def sample(self, file: LogFile, num_rows: int) -> SampledRows | None:
        """About `num_rows` rows from all over a file; None where it is a text that does not say what its columns are.

        Raises:
            LogError: the file cannot be read.
        """

    @abstractmethod
    def opened(self, raw: BinaryIO, file: LogFile, schema: FeatureSchema) -> AbstractContextManager[OpenLog]:
        """The log in an open file, or in a stream whose name `file` has, that is read by a model with this schema."""


def found_by_name(
    names: Sequence[str], where: str, schema: FeatureSchema, needed: Sequence[Column], reader: str
) -> list[Column | None]:
    """The column of the schema that each name is, called as in the file; None for a name that it does not have.

    Args:
        names: in the order of the file.
        where: for messages.
        schema: the columns.
        needed: those of them that must be there.
        reader: who needs them, for messages.

    Raises:
        LogError: a column that is needed is not there (all of them are named), or one is there twice.
    """
    schema = schema.named_as_in(names)
    known = {column.log_name: column for column in schema.columns}
    log_names = {column.name: column.log_name for column in schema.columns}
    missing = [log_names[column.name] for column in needed if log_names[column.name] not in names]
    if missing:
        more = f" and {len(names) - _MOST_NAMES_SHOWN:,} more" if len(names) > _MOST_NAMES_SHOWN else ""
        raise LogError(
            f"{where}: has no column {', '.join(missing)}, which {reader} reads; its columns are "
            f"{', '.join(names[:_MOST_NAMES_SHOWN])}{more}"
        )
    read = {column.log_name for column in schema.used}
    twice = sorted({name for name in names if name in read and list(names).count(name) > 1})
    if twice:
        msg = f"{where}: names the column {', '.join(twice)} more than once, and only one of them can be meant"
        raise LogError(msg)
    return [known.get(name) for name in names]


def extra_columns(layout: FeatureSchema) -> tuple[str, ...] | None:
    """The names of a file's columns that the schema does not have; None where there are none."""
    return tuple(column.log_name for column in layout.columns if column.name.startswith(_EXTRA)) or None


def ignored(place: int, name: str) -> IgnoredColumn:
    """A column of the log that the schema does not name; any text may name one, not only what a schema allows."""
    return IgnoredColumn.model_construct(name=f"{_EXTRA}{place}", header_name=name, role="ignore")
