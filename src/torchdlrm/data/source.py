r"""Raw logs -> chunks of typed columns; rows that break the schema are counted by reason.

In: text files, plain or gzipped, in the order of time.  Out, for each chunk of whole lines: a Polars frame with a
column for each column of the schema, missing values null, and the chunk's bad rows.  Cost: for a log of Criteo's layout
about 1.5 times what Polars needs to parse it to typed columns.

| kind | type of the column | accepted |
| --- | --- | --- |
| label | Int8 | 0 or 1, never missing |
| dense int | Int64 | a decimal number of 64 bits, with or without a sign |
| dense float | Float64 | a finite decimal number |
| sparse hex | UInt32 | 1 to 8 hexadecimal digits, upper or lower case |
| sparse int | Int64 | as dense int |
| sparse string | String | anything |

`parse_chunk` is a pure function of the bytes of the lines, and the same rows come out however a file is cut.
"""

import gzip
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.data.bad_rows import BadRow, BadRows
from torchdlrm.errors import LogError
from torchdlrm.schema import Column, DenseColumn, FeatureSchema, LabelColumn

CHUNK_BYTES = 32 << 20
_GZIP_MAGIC = b"\x1f\x8b"
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20
_COUNT_BLOCK_BYTES = 256 << 10
_DAY = re.compile(r"day_(\d+)(?!\d)")


@dataclass(frozen=True)
class LogFile:
    """A file of a log; `size_bytes` as it lies on disk, compressed or not."""

    path: Path
    size_bytes: int
    day: int | None

    @property
    def name(self) -> str:
        """The file's name without its folder."""
        return self.path.name


@dataclass(frozen=True)
class ParsedChunk:
    """The good rows of a chunk as typed columns, its number of lines, and its bad rows (lines counted from 1)."""

    frame: pl.DataFrame
    num_lines: int
    bad_rows: BadRows


def find_files(paths: Sequence[Path]) -> tuple[LogFile, ...]:
    """The files of a log in the order of time: by day where all are named `day_N...`, else as given.

    Raises:
        LogError: a file is missing, is none, is empty, or is given twice.
    """
    if not paths:
        raise LogError("no log given: name at least one file")
    files = []
    for path in paths:
        if not path.is_file():
            reason = "is a folder, not a file" if path.is_dir() else "there is no such file"
            msg = f"{path}: {reason}; give the files of the log by name"
            raise LogError(msg)
        size_bytes = path.stat().st_size
        if size_bytes == 0:
            msg = f"{path}: the file is empty"
            raise LogError(msg)
        day = _DAY.match(path.name)
        files.append(LogFile(path, size_bytes, int(day[1]) if day else None))
    resolved = [file.path.resolve() for file in files]
    for i, file in enumerate(files):
        if resolved[i] in resolved[:i]:
            msg = f"{file.path}: given twice; every row of a log counts once"
            raise LogError(msg)
    if all(file.day is not None for file in files):
        files.sort(key=lambda file: (file.day, file.name))
    return tuple(files)


def read_chunks(file: LogFile, schema: FeatureSchema, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Cut a file at line ends into chunks of at most `chunk_bytes`; yields (lines, bytes of the file read so far).

    A byte-order mark is dropped, and the header where the schema has one.

    Raises:
        LogError: the file cannot be read, is not what the schema says, ends in the middle of its gzip stream, or has no
            line end in `chunk_bytes`.
    """
    try:
        with file.path.open("rb") as raw:
            is_gzip = raw.read(2) == _GZIP_MAGIC
            raw.seek(0)
            text: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if is_gzip else raw
            rest = _without_header(text, file, schema)
            while block := text.read(chunk_bytes - len(rest)):
                end = block.rfind(b"\n") + 1
                if end:
                    yield rest + block[:end], raw.tell()
                    rest = block[end:]
                else:
                    rest += block
                    if len(rest) >= chunk_bytes:
                        msg = f"{file.path}: no line end in {chunk_bytes:,} bytes: not a text file with a row a line?"
                        raise LogError(msg)
            if rest:
                yield rest, raw.tell()
        if file.path.stat().st_size != file.size_bytes:
            msg = f"{file.path}: the file changed while it was read; start again when nothing writes to it"
            raise LogError(msg)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{file.path}: the gzip stream is damaged or cut off ({error}); fetch the file again"
        raise LogError(msg) from error
    except OSError as error:
        msg = f"{file.path}: cannot be read: {error.strerror or error}"
        raise LogError(msg) from error


def _without_header(text: IO[bytes], file: LogFile, schema: FeatureSchema) -> bytes:
    """The first bytes of the file that belong to rows."""
    start = text.read(len(_BYTE_ORDER_MARK)).removeprefix(_BYTE_ORDER_MARK)
    if not schema.header:
        return start
    line, _, rest = (start if b"\n" in start else start + text.readline(_MAX_HEADER_BYTES)).partition(b"\n")
    found = line.decode(errors="replace").rstrip("\r").split(schema.separator)
    expected = [column.name for column in schema.columns]
    if found != expected:
        at = next((i for i, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), None)
        where = (
            f"{len(found)} columns where the schema {schema.name!r} has {len(expected)}"
            if at is None
            else f"column {at + 1} is {found[at]!r} where the schema {schema.name!r} has {expected[at]!r}"
        )
        msg = f"{file.path}, line 1 (header): {where}; change the schema or the file"
        raise LogError(msg)
    return rest


def parse_chunk(lines: bytes, schema: FeatureSchema) -> ParsedChunk:
    """Parse whole lines into typed columns.

    Everything is read as text first and cast afterwards, so that a row is good or bad by itself: a parser that gives up
    on the first bad value of a block cannot tell which rows of it are good.
    """
    bad_rows = BadRows()
    line_numbers: npt.NDArray[np.int64] | None = None
    num_lines = lines.count(b"\n") + (not lines.endswith(b"\n"))
    text = _read_text(lines, schema)
    if text is None or text.height != num_lines or b"\0" in lines or _count(lines, schema) != num_lines:
        lines, line_numbers = _drop_broken_lines(lines, schema, bad_rows)
        text = _read_text(lines, schema) if lines else text_frame(schema, {})
        assert text is not None, "the lines that are left are UTF-8 and have the right number of columns"
    frame, good = to_typed_columns(text, schema, bad_rows, line_numbers)
    return ParsedChunk(frame if good is None else frame.filter(good), num_lines, bad_rows)


def text_frame(schema: FeatureSchema, columns: dict[str, list[str | None]]) -> pl.DataFrame:
    """Raw cells as a frame of text columns; columns that are not given have no rows."""
    names = [column.name for column in schema.columns]
    return pl.DataFrame({name: columns.get(name, []) for name in names}, schema=dict.fromkeys(names, pl.String))


def _read_text(lines: bytes, schema: FeatureSchema) -> pl.DataFrame | None:
    if lines.startswith(_BYTE_ORDER_MARK):
        lines = _BYTE_ORDER_MARK + lines  # Polars drops one, which is right only at the start of a file
    try:
        return pl.read_csv(
            lines,
            has_header=False,
            separator=schema.separator,
            quote_char=None,
            schema={column.name: pl.String for column in schema.columns},
        )
    except pl.exceptions.PolarsError:
        return None  # a line that is too long, or bytes that are not UTF-8: `_drop_broken_lines` finds them


def _count(lines: bytes, schema: FeatureSchema) -> float:
    """How many whole rows the separators make up. Polars fills rows that are too short with nulls."""
    codes = np.frombuffer(lines, np.uint8)
    # By blocks that fit a core's cache: the comparison makes an array as long as the text.
    blocks = (codes[start : start + _COUNT_BLOCK_BYTES] for start in range(0, len(codes), _COUNT_BLOCK_BYTES))
    num_separators = sum(int(np.count_nonzero(block == ord(schema.separator))) for block in blocks)
    return num_separators / (len(schema.columns) - 1)


def _drop_broken_lines(lines: bytes, schema: FeatureSchema, bad_rows: BadRows) -> tuple[bytes, npt.NDArray[np.int64]]:
    """The lines that have the right number of columns and are UTF-8 without NUL, and their numbers from 0."""
    if not lines.endswith(b"\n"):
        lines += b"\n"
    codes = np.frombuffer(lines, np.uint8)
    ends = np.flatnonzero(codes == ord("\n"))
    starts = np.concatenate([[0], ends[:-1] + 1])

    def count_in_lines(found: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
        return np.diff(np.searchsorted(np.flatnonzero(found), np.concatenate([starts, [len(codes)]])))

    num_columns = count_in_lines(codes == ord(schema.separator)) + 1
    broken = num_columns != len(schema.columns)
    has_nul = (count_in_lines(codes == 0) > 0) & ~broken
    not_text = np.zeros(len(starts), np.bool_)
    for i in np.flatnonzero((count_in_lines(codes >= 0x80) > 0) & ~broken & ~has_nul):
        try:
            lines[starts[i] : ends[i]].decode()
        except UnicodeDecodeError:
            not_text[i] = True
    for reason, mask in (("columns", broken), ("nul_byte", has_nul), ("utf8", not_text)):
        bad_rows.add(
            reason,
            int(mask.sum()),
            [
                _broken_line(lines[starts[i] : ends[i]], int(i) + 1, reason, schema)
                for i in np.flatnonzero(mask)[: BadRows.NUM_EXAMPLES]
            ],
        )
    good = np.flatnonzero(~(broken | has_nul | not_text))
    return b"".join(lines[starts[i] : ends[i] + 1] for i in good), good


def _broken_line(line: bytes, number: int, reason: str, schema: FeatureSchema) -> BadRow:
    cells = line.rstrip(b"\r").split(schema.separator.encode())
    if reason == "columns":
        return BadRow(line=number, column=None, value=f"{len(cells)} columns, not {len(schema.columns)}")
    for column, cell in zip(schema.columns, cells, strict=True):
        if (b"\0" in cell) if reason == "nul_byte" else ("\ufffd" in cell.decode(errors="replace")):
            return BadRow(line=number, column=column.name, value=cell.decode(errors="backslashreplace"))
    raise AssertionError("the fault of a broken line lies in one of its cells")


def to_typed_columns(
    text: pl.DataFrame,
    schema: FeatureSchema,
    bad_rows: BadRows,
    line_numbers: npt.NDArray[np.int64] | None = None,
) -> tuple[pl.DataFrame, pl.Series | None]:
    """Cast raw cells to the types of their columns.

    Args:
        text: a String column for each column of the schema, B rows.
        schema: the columns.
        bad_rows: takes the rows whose cells do not fit, each by its leftmost fault.
        line_numbers: int64 [B], the line of each row from 0; by default its position.

    Returns:
        The typed columns, B rows; and a Boolean mask of the good rows, or None when all are good.
    """
    frame = text.select(_cast(column) for column in schema.columns)
    good: pl.Series | None = None
    for column in schema.columns:
        if _is_clean(text[column.name], frame[column.name], column):
            continue
        bad = _is_bad(text[column.name], frame[column.name], column)
        first_fault = bad if good is None else bad & good
        rows = np.flatnonzero(first_fault.to_numpy())
        examples = [
            BadRow(
                line=int(row if line_numbers is None else line_numbers[row]) + 1,
                column=column.name,
                value=text[column.name][int(row)] or "",
            )
            for row in rows[: BadRows.NUM_EXAMPLES]
        ]
        bad_rows.add("label" if isinstance(column, LabelColumn) else column.kind, len(rows), examples)
        good = ~bad if good is None else good & ~bad
    return frame, good


def _cast(column: Column) -> pl.Expr:
    cell = pl.col(column.name)
    if isinstance(column, LabelColumn):
        return cell.cast(pl.Int8, strict=False)
    if isinstance(column, DenseColumn):
        return cell.cast(pl.Int64 if column.kind == "int" else pl.Float64, strict=False)
    if column.kind == "hex":
        return cell.str.to_integer(base=16, dtype=pl.UInt32, strict=False)
    return cell.cast(pl.Int64, strict=False) if column.kind == "int" else cell


def _is_clean(text: pl.Series, typed: pl.Series, column: Column) -> bool:
    """Whether a whole column is good, told from figures that cost almost nothing."""
    if isinstance(column, LabelColumn):
        return typed.null_count() == 0 and typed.is_between(0, 1).all()
    if typed.null_count() != text.null_count():
        return False
    if column.kind == "hex":
        return not _is_odd_hex(text).any()
    return column.kind != "float" or typed.is_finite().all()


def _is_bad(text: pl.Series, typed: pl.Series, column: Column) -> pl.Series:
    if isinstance(column, LabelColumn):
        return ~typed.is_between(0, 1).fill_null(value=False)
    bad = typed.is_null() & text.is_not_null()
    if column.kind == "hex":
        bad |= _is_odd_hex(text).fill_null(value=False)
    if column.kind == "float":
        bad |= ~typed.is_finite().fill_null(value=True)
    return bad


def _is_odd_hex(text: pl.Series) -> pl.Series:
    """What the cast takes and the schema does not: leading zeros past 8 digits, and a sign."""
    return (text.str.len_bytes() > 8) | text.str.starts_with("+")
