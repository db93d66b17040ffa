"""What formats have in common whose rows are lines of a text: where it may be cut, how it is read and sampled.

Of a plain file the bounds of chunks are found without reading more than a few bytes around each; of a packed one, or
one with quoted cells, in one pass.  A line end inside a quoted cell ends no row.  Of a line that is longer than any row
may be, only the start is passed on: it is a bad row, and must not fill the memory.
"""

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, BinaryIO, ClassVar, TypeVar

from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.files import LogFile, open_text, reading, unpacked
from torchdlrm.logs.format import NUM_PLACES, Chunk, LogFormat, OpenLog, ParsedChunk
from torchdlrm.logs.quotes import last_row_end
from torchdlrm.units import show_bytes

CHUNK_BYTES = 32 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_HEADER_BYTES = 1 << 20
_PROBE_BYTES = 64 << 10
# Longer rows are bad ones, however large the chunks are.
MAX_ROW_BYTES = 1 << 20
# Of text with quotes, so much is read for the end of a row: what comes behind a quote that is not closed is no row.
_MAX_QUOTED_BYTES = 16 << 20
_HEAD_BYTES = 64 << 10
_MIN_BLOCK_BYTES = 1 << 20
_BYTES_A_ROW = 800  # twice that of a row of a wide log
_MAX_UNPACKED_BYTES = 256 << 20
_Item = TypeVar("_Item")


class LineFormat(LogFormat):
    """A text whose rows are lines; it may be packed."""

    text_bytes_a_byte: ClassVar[float] = 1.0

    @abstractmethod
    def parse(self, lines: bytes, layout: FeatureSchema, *, is_label_optional: bool = False) -> ParsedChunk:
        """Parse whole lines, as `read` does."""

    @abstractmethod
    def columns(self, head: bytes, schema: FeatureSchema) -> tuple[Sequence[str] | None, Sequence[Sequence[str]]]:
        """What the whole lines at the beginning say: `names` and `first_rows` of the `OpenLog`."""

    def chunks(self, file: LogFile, layout: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
        """Cut a text that is not packed at the ends of rows."""
        return plan_chunks(file, layout, chunk_bytes)

    def read(
        self, file: LogFile, chunk: Chunk, layout: FeatureSchema, *, is_label_optional: bool = False
    ) -> ParsedChunk:
        """Read a chunk of a text that is not packed."""
        with reading(file.path), file.open() as text:
            text.seek(chunk.start)
            lines = text.read(chunk.end - chunk.start)
        return self.parse(lines, layout, is_label_optional=is_label_optional)

    def has_rows(self, file: LogFile, layout: FeatureSchema) -> bool:
        """Whether something stands in the first lines that may be rows."""
        with open_text(file) as text:
            rest = read_header(text)[1] if layout.header else b""
            return bool((rest + text.read(_HEAD_BYTES)).strip())

    @contextmanager
    def opened(self, raw: BinaryIO, file: LogFile, schema: FeatureSchema) -> Iterator[OpenLog]:
        """The text as it comes."""
        text = unpacked(raw, file.packing)
        with reading(file.path):
            start = text.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
        names, first_rows = self.columns(whole_lines(start), schema)

        def chunks(layout: FeatureSchema, chunk_bytes: int) -> Iterator[tuple[ParsedChunk, int]]:
            if names is not None:  # then no cell between separators may be quoted
                layout = layout.model_copy(update={"quote": None})
            rest = start.partition(b"\n")[2] if layout.header else start
            for lines in cut_stream(text, rest, file, layout, chunk_bytes):
                yield self.parse(lines, layout, is_label_optional=True), raw.tell() if raw.seekable() else 0

        yield OpenLog(names, chunks, first_rows)


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


def read_head(file: LogFile) -> bytes:
    """The whole lines at the beginning of a text.

    Raises:
        LogError: the file cannot be read.
    """
    with open_text(file) as text:
        return whole_lines(text.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK))


def whole_lines(start: bytes) -> bytes:
    """The whole lines of the start of a text; all of it where no line ends there."""
    return start[: start.rfind(b"\n") + 1] or start


def read_blocks(file: LogFile, num_rows: int) -> tuple[list[bytes], int, str]:
    """Blocks of a text, enough for about `num_rows` rows: one of all, or several that start and end anywhere.

    Returns:
        The blocks, of which the first starts with the text; their size; and in words where they are from.

    Raises:
        LogError: the file cannot be read.
    """
    block_bytes = max(_MIN_BLOCK_BYTES, num_rows * _BYTES_A_ROW // NUM_PLACES)
    with open_text(file) as text:
        blocks, places = (
            _plain_blocks(text, file.size_bytes, block_bytes)
            if file.packing is None
            else _packed_blocks(text, block_bytes)
        )
        file.check_unchanged()
    return [blocks[0].removeprefix(BYTE_ORDER_MARK), *blocks[1:]], block_bytes, places


def _plain_blocks(text: IO[bytes], size_bytes: int, block_bytes: int) -> tuple[list[bytes], str]:
    if size_bytes <= NUM_PLACES * block_bytes:
        return [text.read()], "all over it"
    blocks = []
    for place in range(NUM_PLACES):
        text.seek((size_bytes - block_bytes) * place // (NUM_PLACES - 1))
        blocks.append(text.read(block_bytes))
    return blocks, f"{NUM_PLACES} places of its {show_bytes(size_bytes)}"


def _packed_blocks(text: IO[bytes], block_bytes: int) -> tuple[list[bytes], str]:
    blocks, stride, num_read = thinned(iter(lambda: text.read(block_bytes), b""), _MAX_UNPACKED_BYTES // block_bytes)
    if stride == 1:
        return [b"".join(blocks)], "all over it"
    where = "of its text" if not text.read(1) else f"of the first {show_bytes(num_read * block_bytes)} of its text"
    return blocks, f"{len(blocks)} places {where}"


def thinned(items: Iterable[_Item], max_items: int) -> tuple[list[_Item], int, int]:
    """Of the first `max_items`, every `stride`-th, so that 16 to 32 are left; also `stride` and how many were met."""
    kept: list[_Item] = []
    stride, met = 1, 0
    for item in itertools.islice(items, max_items):
        if met % stride == 0:
            kept.append(item)
            if len(kept) > 2 * NUM_PLACES:
                kept, stride = kept[::2], stride * 2
        met += 1
    return kept, stride, met
