"""Where a text file may be cut: at the ends of rows, so that each chunk is parsed by itself.

In: a text file, plain or gzipped.  Out: for a plain file the bounds of its chunks, without reading more than a few
bytes around each; for a gzipped one, or one with quoted cells, the chunks in one pass.

A line end inside a quoted cell ends no row.
"""

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from torchdlrm.data.log.files import LogFile
from torchdlrm.data.log.quotes import last_row_end
from torchdlrm.errors import LogError
from torchdlrm.schema import FeatureSchema

CHUNK_BYTES = 32 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20
_PROBE_BYTES = 64 << 10


@dataclass(frozen=True)
class Chunk:
    """Whole rows of a file: bytes `start` to `end` of its text, or row groups of a Parquet file."""

    start: int
    end: int


def plan_chunks(file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
    """Cut a plain text file at row ends into chunks of about `chunk_bytes`; a header belongs to none.

    Raises:
        LogError: the file cannot be read, or a row is longer than a chunk.
    """
    if schema.quote is not None:
        chunks = []
        for lines, offset_bytes in read_chunks(file, schema, chunk_bytes):
            chunks.append(Chunk(offset_bytes - len(lines), offset_bytes))
        return chunks
    try:
        with file.path.open("rb") as text:
            rest = _without_header(text, schema)
            start = text.tell() - len(rest)
            chunks = []
            while start < file.size_bytes:
                end = _next_line_end(text, min(start + chunk_bytes, file.size_bytes), file, chunk_bytes)
                chunks.append(Chunk(start, end))
                start = end
            return chunks
    except OSError as error:
        msg = f"{file.path}: cannot be read: {error.strerror or error}"
        raise LogError(msg) from error


def _next_line_end(text: IO[bytes], at: int, file: LogFile, chunk_bytes: int) -> int:
    """The offset behind the first line end at `at` - 1 or later; the end of the file where there is none."""
    text.seek(at - 1)
    position = at - 1
    while block := text.read(_PROBE_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
        if position - at > chunk_bytes:
            raise LogError(_no_line_end(file, chunk_bytes))
    return file.size_bytes


def _no_line_end(file: LogFile, chunk_bytes: int) -> str:
    return f"{file.path}: no line end in {chunk_bytes:,} bytes: not a text file with a row a line?"


def read_chunks(file: LogFile, schema: FeatureSchema, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[bytes, int]]:
    """Cut a file at row ends into chunks of at most `chunk_bytes`; yields (rows, bytes of the file read so far).

    Of a plain file, the bytes read so far are those of the chunks and what stood before the first.  A byte-order mark
    is dropped, and the header where the schema has one.

    Raises:
        LogError: the file cannot be read, ends in the middle of its gzip stream, or has no row end in `chunk_bytes`.
    """
    with reading(file), file.path.open("rb") as raw:
        is_gzip = file.format == "gzip"
        text: IO[bytes] = cast("IO[bytes]", gzip.GzipFile(fileobj=raw)) if is_gzip else raw
        rest = _without_header(text, schema)
        offset_bytes = raw.tell() - len(rest)
        for lines in _cut(text, rest, file, schema, chunk_bytes):
            offset_bytes += len(lines)
            yield lines, raw.tell() if is_gzip else offset_bytes
        file.check_unchanged()


def cut_stream(
    text: IO[bytes], start: bytes, file: LogFile, schema: FeatureSchema, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Cut a stream of rows, of which `start` has been read, as `read_chunks` cuts a file; `file` is for messages.

    Raises:
        LogError: as `read_chunks`.
    """
    with reading(file):
        yield from _cut(text, start, file, schema, chunk_bytes)


def _cut(text: IO[bytes], rest: bytes, file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> Iterator[bytes]:
    while block := text.read(max(1, chunk_bytes - len(rest))):
        lines = rest + block
        end = _last_row_end(lines, schema)
        if end:
            yield lines[:end]
            rest = lines[end:]
        else:
            rest = lines
            if len(rest) >= chunk_bytes:
                raise LogError(_unended(rest, file, schema, chunk_bytes))
    if rest:
        yield rest


@contextmanager
def reading(file: LogFile) -> Iterator[None]:
    """What goes wrong inside is told as a fault of the file.

    Raises:
        LogError: it cannot be read, or its gzip stream is damaged.
    """
    try:
        yield
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        msg = f"{file.path}: the gzip stream is damaged or cut off ({error}); fetch the file again"
        raise LogError(msg) from error
    except OSError as error:
        msg = f"{file.path}: cannot be read: {error.strerror or error}"
        raise LogError(msg) from error


def _last_row_end(lines: bytes, schema: FeatureSchema) -> int:
    """How many bytes of `lines`, which start with a row, are whole rows."""
    if schema.quote is None or b'"' not in lines:
        return lines.rfind(b"\n") + 1
    return last_row_end(lines, schema.separator)


def _unended(rest: bytes, file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> str:
    if schema.quote is None or b'"' not in rest:
        return _no_line_end(file, chunk_bytes)
    start = rest[:80].split(b"\n")[0].decode(errors="replace")
    return (
        f"{file.path}: a row that starts with {start!r} has no end in {chunk_bytes:,} bytes: a quote that is opened "
        "there is not closed; mend the file, or leave `quote` out of the schema"
    )


def read_header(text: IO[bytes]) -> tuple[bytes, bytes]:
    """The first line of a text, without a byte-order mark, and the first bytes behind it that were read too."""
    start = text.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
    line, _, rest = (start if b"\n" in start else start + text.readline(_MAX_HEADER_BYTES)).partition(b"\n")
    return line, rest


def _without_header(text: IO[bytes], schema: FeatureSchema) -> bytes:
    """The first bytes of the file that belong to rows."""
    if schema.header:
        return read_header(text)[1]
    return text.read(len(BYTE_ORDER_MARK)).removeprefix(BYTE_ORDER_MARK)
