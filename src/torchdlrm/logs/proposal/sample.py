"""Reads rows from all over a log of any size, in bounded time and memory.

In: a file, a number of rows.  Out: their cells as preprocessing reads them, and in words what was read.

| file | what is read |
| --- | --- |
| small text | everything |
| text | blocks at evenly spaced places |
| packed text | up to 256 MiB of text from the start; of that, evenly spaced blocks are kept |
| Parquet, ORC | half a million rows, or 256 MiB, of up to 16 groups of rows; of that, evenly spaced batches are kept |
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
import pyarrow as pa

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRow, BadRows, describe_bad_rows
from torchdlrm.features.cells import cells_as_text
from torchdlrm.features.columns import SparseColumn, TimeColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.format import ParsedChunk, SampledRows
from torchdlrm.logs.formats.text import parse_chunk
from torchdlrm.logs.lines import read_blocks
from torchdlrm.logs.proposal.facts import USUAL_NULLS
from torchdlrm.logs.quotes import find_quoted, last_row_end
from torchdlrm.logs.sniff import SEPARATORS, is_quoted, sniff
from torchdlrm.logs.tables import type_fault

_VALUE = r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[0-9a-fA-F]{8}"


@dataclass(frozen=True)
class Sample:
    """Rows of a log.

    Attributes:
        names: of the columns, as the log has them.
        frame: String, or lists of it, under `column_0`, `column_1` and so on; null where a cell is missing.
        separator: of text; None where the file names its columns.
        is_quoted: whether cells are quoted.
        has_header: whether the first line names the columns.
        is_whole: whether every row of the log was read.
        origin: what was read, in words.
        bad_lines: lines of the text that are no rows, in words.
        unread: why a column cannot be read, by its place.
        floating: places of columns of floats.
    """

    names: Sequence[str]
    frame: pl.DataFrame
    separator: str | None
    is_quoted: bool
    has_header: bool
    is_whole: bool
    origin: str
    bad_lines: Sequence[str] = ()
    unread: Mapping[int, str] = field(default_factory=dict)
    floating: Sequence[int] = ()


def take_sample(file: LogFile, num_rows: int) -> Sample:
    """About `num_rows` rows from the beginning, the middle and the end of a log.

    Raises:
        LogError: the file cannot be read, has no columns that can be told apart, or names two of them alike.
    """
    found = file.format.sample(file, num_rows)
    sample = _of_text(file, num_rows) if found is None else _of_columns(file, found, num_rows)
    if len(sample.names) < 2 or not sample.frame.height:
        msg = f"{file.path}: found {len(sample.names)} columns and {sample.frame.height} rows; "
        raise LogError(msg + "; ".join(["a log has a label and features, and a row a line", *sample.bad_lines[:1]]))
    check_names(file, sample.names)
    return sample


def check_names(file: LogFile, names: Sequence[str]) -> None:
    """See that every column of a log has a name of its own.

    Raises:
        LogError: two have the same.
    """
    for i, name in enumerate(names):
        if name in names[:i]:
            raise LogError(
                f"{file.path}: columns {names.index(name) + 1} and {i + 1} are both named {name!r}; rename one of them"
            )


def _of_text(file: LogFile, num_rows: int) -> Sample:
    blocks, block_bytes, origin = read_blocks(file, num_rows)
    start = blocks[0]
    cut = sniff(start, file)
    if cut.num_columns < 2:
        msg = f"{file.path}: no separator cuts its lines into columns; looked for {', '.join(SEPARATORS.values())}"
        raise LogError(msg)
    columns = tuple(SparseColumn(name=f"column_{i}") for i in range(cut.num_columns))
    as_text = criteo_schema().model_copy(update={"columns": columns, "separator": cut.mark})
    if is_quoted([start, *blocks[1:]], cut.mark):
        quoted = as_text.model_copy(update={"quote": '"'})
        # A quote that is never closed hides all rows behind it.
        as_text = quoted if 2 * len(_whole_rows(start, quoted)) > len(_whole_rows(start, as_text)) else as_text
    start = start if len(blocks) == 1 else _whole_rows(start, as_text)
    if not start:
        raise LogError(f"{file.path}: no row ends in the first {block_bytes:,} bytes; is it text with a row a line?")
    first = parse_chunk(start, as_text)
    names, has_header = [column.name for column in columns], False
    if first.frame.height and _looks_like_header(first.frame):
        names, has_header = [name or "" for name in first.frame.row(0)], True
        if 0 in first.bad_positions:
            raise LogError(
                f"{file.path}: the names of the columns are not on line 1, where a header must be; remove what is above"
            )
    others = [chunk for block in blocks[1:] if (chunk := _rows_inside(block, as_text)) is not None]
    chunks = [first.frame[int(has_header) :], *(chunk.frame for chunk in others)]
    repeats = 0
    if has_header:  # as of files that were put one behind the other
        rows = sum(chunk.height for chunk in chunks)
        chunks = [_without(chunk, first.frame.row(0)) for chunk in chunks]
        repeats = rows - sum(chunk.height for chunk in chunks)
    frame = pl.concat([_spread(chunk, -(-num_rows // len(chunks))) for chunk in chunks])
    is_whole = frame.height == chunks[0].height and not others
    bad_lines = [line.strip(" ,") for line in describe_bad_rows(first.bad_rows.counts, _named(first.bad_rows, names))]
    if more := sum(chunk.bad_rows.total for chunk in others):
        bad_lines.append(f"{more:,} in other places")
    if repeats:
        bad_lines.append(f"{repeats:,} are the header once more")
    return Sample(
        names,
        frame,
        cut.mark,
        as_text.quote is not None,
        has_header,
        is_whole,
        _origin(frame, origin, is_whole=is_whole),
        bad_lines=bad_lines,
    )


def _named(bad_rows: BadRows, names: Sequence[str]) -> dict[str, list[BadRow]]:
    """Examples of bad rows with the columns' names in the log."""
    known = {f"column_{i}": name for i, name in enumerate(names)}
    return {
        reason: [row.model_copy(update={"column": known.get(row.column or "")}) for row in rows]
        for reason, rows in bad_rows.examples.items()
    }


def _origin(frame: pl.DataFrame, places: str, *, is_whole: bool) -> str:
    return f"all {frame.height:,} rows" if is_whole else f"{frame.height:,} rows from {places}"


def _whole_rows(text: bytes, schema: FeatureSchema) -> bytes:
    return text[: last_row_end(text, schema.separator) if schema.quote else text.rfind(b"\n") + 1]


def _rows_inside(block: bytes, schema: FeatureSchema) -> ParsedChunk | None:
    """The rows of a block that starts and ends anywhere; None where there is no whole one."""
    starts = [block[block.find(b"\n") + 1 :]]
    if schema.quote is not None:
        # It starts in a quoted cell or not: the way that makes more good rows is the right one.
        starts = []
        for text in (block, b'"' + block):
            inside, _ = find_quoted(text, schema.separator)
            ends = np.flatnonzero((np.frombuffer(text, np.uint8) == ord("\n")) & ~inside)
            starts += [text[int(ends[0]) + 1 :]] if len(ends) else []
    chunks = [parse_chunk(rows, schema) for start in starts if (rows := _whole_rows(start, schema))]
    return max(chunks, key=lambda chunk: chunk.frame.height, default=None)


def _spread(frame: pl.DataFrame, num_rows: int) -> pl.DataFrame:
    """Evenly spaced rows, at most `num_rows`."""
    if frame.height <= num_rows:
        return frame
    return frame[np.linspace(0, frame.height - 1, num_rows).astype(np.int64)]


def _without(frame: pl.DataFrame, row: tuple[str | None, ...]) -> pl.DataFrame:
    """The rows that are not this one."""
    return frame.filter(~pl.all_horizontal(pl.nth(i).eq_missing(pl.lit(cell)) for i, cell in enumerate(row)))


def _looks_like_header(frame: pl.DataFrame) -> bool:
    """Whether the first row has names: at most one is empty, none stands below, and they are no values.

    A name may be a number where another stands above a column of numbers.
    """
    cells = frame.row(0)
    below = _without(frame, cells)
    columns = [(cell, below.to_series(i).drop_nulls()) for i, cell in enumerate(cells) if cell is not None]
    if len(columns) < len(cells) - 1 or any((column == cell).any() for cell, column in columns):
        return False
    texts = [column for cell, column in columns if not re.fullmatch(_VALUE, cell) and cell not in USUAL_NULLS]
    above_numbers = any(len(column) and column.str.contains(f"^({_VALUE})$").all() for column in texts)
    return above_numbers or len(texts) == len(columns)


def _of_columns(file: LogFile, found: SampledRows, num_rows: int) -> Sample:
    """The sample of a format that says what its columns are."""
    names = found.table.column_names
    check_names(file, names)
    columns, unread, floating = [], {}, []
    for i, cells in enumerate(found.table.columns):
        column = _column_of(cells.type, f"column_{i}")
        try:
            if type_fault(cells.type, column, file.format.name) is not None:
                unread[i] = f"is of the {file.format.name} type {cells.type}"
            else:
                columns.append(cells_as_text(pl.Series(cells), column))
                floating += [i] if pa.types.is_floating(cells.type) else []
        except LogError:
            unread[i] = "holds bytes that are no text"
        if i in unread:
            columns.append(pl.Series(column.name, [None] * len(cells), pl.String))
    frame = _spread(pl.DataFrame(columns), num_rows)
    is_whole = found.is_whole and frame.height == found.table.num_rows
    return Sample(
        names,
        frame,
        separator=None,
        is_quoted=False,
        has_header=True,
        is_whole=is_whole,
        origin=_origin(frame, found.places, is_whole=is_whole),
        bad_lines=found.bad_lines,
        unread=unread,
        floating=floating,
    )


def _column_of(kind: pa.DataType, name: str) -> SparseColumn | TimeColumn:
    """A column as which cells of a type are read to the text that a user sees."""
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return TimeColumn(name=name, kind="datetime")
    separator = "," if pa.types.is_nested(kind) else None
    # As kind int, whole floats are the integers that they are.
    return SparseColumn(name=name, kind="int" if pa.types.is_floating(kind) else "string", value_separator=separator)
