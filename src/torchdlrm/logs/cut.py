"""Finds where a text file may be cut: at the ends of rows, so that each chunk is parsed by itself.

In: a text file, plain or packed.  Out: for a plain file the bounds of its chunks, without reading more than a few
bytes around each; for a packed one, or one with quoted cells, the chunks in one pass.

A line end inside a quoted cell ends no row.  Of a line that is longer than any row may be, only the start is passed on:
it is a bad row, and must not fill the memory.
"""

from collections.abc import Iterator
from typing import IO

from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, open_text, reading
from torchdlrm.logs.format import Chunk
from torchdlrm.logs.quotes import last_row_end

CHUNK_BYTES = 32 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20
_PROBE_BYTES = 64 << 10
# Longer rows are bad ones, however large the chunks are.
MAX_ROW_BYTES = 1 << 20
# Of text with quotes, so much is read for the end of a row: what comes behind a quote that is not closed is no row.
_MAX_QUOTED_BYTES = 16 << 20


def plan_chunks(file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
    """Cut a plain text file at row ends into chunks of about `chunk_bytes`; a header belongs to none.

    Raises:
        LogError: the file cannot be read, or a quoted cell has no end.
    """
    with open_text(file) as text:
        rest = _without_header(text, schema)
        start = text.tell() - len(rest)
        chunks = []
        if schema.quote is not None:
            for lines, num_bytes in _cut(text, rest, file, schema, chunk_bytes):
                chunks.append(Chunk(start, start + len(lines)))
                start += num_bytes
            file.check_unchanged()
        else:
            while start < file.size_bytes:
                about = min(start + chunk_bytes, file.size_bytes)
                end = _next_line_end(text, about, file)
                chunks.append(Chunk(start, min(end, about + MAX_ROW_BYTES + 1)))
                start = end
        return chunks


def _next_line_end(text: IO[bytes], at: int, file: LogFile) -> int:
    """The offset behind the first line end at `at` - 1 or later; the end of the file where there is none."""
    text.seek(at - 1)
    position = at - 1
    while block := text.read(_PROBE_BYTES):
        found = block.find(b"\n")
        if found >= 0:
            return position + found + 1
        position += len(block)
    return file.size_bytes


def read_chunks(file: LogFile, schema: FeatureSchema, chunk_bytes: int = CHUNK_BYTES) -> Iterator[bytes]:
    """Cut a file at row ends into chunks of at most `chunk_bytes`.

    A chunk is larger where a row is.  A byte-order mark is dropped, and the header where the schema has one.

    Raises:
        LogError: the file cannot be read, ends in the middle of its gzip stream, or has a quoted cell without an end.
    """
    with open_text(file) as text:
        yield from cut_stream(text, _without_header(text, schema), file, schema, chunk_bytes)
        file.check_unchanged()


def cut_stream(
    text: IO[bytes], start: bytes, file: LogFile, schema: FeatureSchema, chunk_bytes: int = CHUNK_BYTES
) -> Iterator[bytes]:
    """Cut a stream of rows, of which `start` has been read, as `read_chunks` cuts a file; `file` is for messages.

    Raises:
        LogError: as `read_chunks`.
    """
    with reading(file.path):
        for lines, _ in _cut(text, start, file, schema, chunk_bytes):
            yield lines


def _cut(
    text: IO[bytes], rest: bytes, file: LogFile, schema: FeatureSchema, chunk_bytes: int
) -> Iterator[tuple[bytes, int]]:
    """Whole rows, and how many bytes of the text they took."""
    # Of a row that is longer than a chunk twice as much each time: what was read is searched again.
    while block := text.read(chunk_bytes - len(rest) if len(rest) < chunk_bytes else len(rest)):
        lines = rest + block
        end = _last_row_end(lines, schema)
        if end:
            yield lines[:end], end
        elif schema.quote is not None and b'"' in lines:
            if len(lines) > max(chunk_bytes, _MAX_QUOTED_BYTES):
                raise LogError(_unclosed(lines, file))
        elif len(lines) > max(chunk_bytes, MAX_ROW_BYTES):
            num_skipped, rest = _skip_line(text)
            yield lines[: MAX_ROW_BYTES + 1], len(lines) + num_skipped
            continue
        rest = lines[end:]
    if rest:
        yield rest, len(rest)


def _skip_line(text: IO[bytes]) -> tuple[int, bytes]:
    """Read to the end of a line: how many bytes it still had, and those that were read behind it."""
    num_bytes = 0
    while block := text.read(_PROBE_BYTES):
        line, end, rest = block.partition(b"\n")
        num_bytes += len(line) + len(end)
        if end:
            return num_bytes, rest
    return num_bytes, b""


def _last_row_end(lines: bytes, schema: FeatureSchema) -> int:
    """How many bytes of `lines`, which start with a row, are whole rows."""
    if schema.quote is None or b'"' not in lines:
        return lines.rfind(b"\n") + 1
    return last_row_end(lines, schema.separator)


def _unclosed(rest: bytes, file: LogFile) -> str:
    start = rest[:80].split(b"\n")[0].decode(errors="replace")
    return (
        f"{file.path}: a row that starts with {start!r} has no end in {len(rest):,} bytes: a quote that is opened "
        "there is not closed; fix the file, or leave `quote` out of the schema"
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
