"""What formats have in common whose rows are lines of a text: where they are cut, how they are read and sampled."""

import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import IO, BinaryIO, ClassVar, TypeVar

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.cut import BYTE_ORDER_MARK, cut_stream, plan_chunks, read_header
from torchdlrm.logs.files import LogFile, open_text, reading, unpacked
from torchdlrm.logs.format import NUM_PLACES, Chunk, LogFormat, OpenLog, ParsedChunk
from torchdlrm.units import show_bytes

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
        with reading(file.path), file.path.open("rb") as text:
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
        yield _OpenLines(self, raw, file, schema)


class _OpenLines(OpenLog):
    def __init__(self, log_format: LineFormat, raw: BinaryIO, file: LogFile, schema: FeatureSchema) -> None:
        self._format, self._raw, self._file = log_format, raw, file
        self._text = unpacked(raw, file.packing)
        with reading(file.path):
            self._start = self._text.read(_HEAD_BYTES).removeprefix(BYTE_ORDER_MARK)
        self.names, self.first_rows = log_format.columns(whole_lines(self._start), schema)

    def chunks(self, layout: FeatureSchema, chunk_bytes: int) -> Iterator[tuple[ParsedChunk, int]]:
        rest = self._start.partition(b"\n")[2] if layout.header else self._start
        for lines in cut_stream(self._text, rest, self._file, layout, chunk_bytes):
            parsed = self._format.parse(lines, layout, is_label_optional=True)
            yield parsed, self._raw.tell() if self._raw.seekable() else 0


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
