"""Writes `weights.safetensors` block by block and reads it in place; each block has a checksum of its own.

The file is a plain safetensors file (https://github.com/huggingface/safetensors), which other programs read too: 8
bytes with the length of a JSON header, the header, the numbers.  All sizes are known beforehand, so that the header is
written first and tables are appended a block of rows at a time.  Reading maps the file: several processes share the
pages, and pages without a row that is looked up are not read.
"""

import hashlib
import json
import math
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter
from torch import Tensor

from torchdlrm.errors import BundleError
from torchdlrm.records import Record

BLOCK_BYTES = 16 * 2**20
# FBGEMM ends its own buffers with whole cache lines, so its kernels may load past the last row.
PADDING_NAME, PADDING_BYTES = "padding", 128
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "U8": torch.uint8}
_ALIGNMENT_BYTES = 64
# The page cache keeps what is written at once in one piece, and maps the entire piece when a byte of it is read:
# written by 16 MiB, a lookup of 512 bytes makes 2 MiB resident.  This is as much as Linux maps around any page.
_WRITE_BYTES = 64 * 2**10
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000  # as safetensors itself


@dataclass(frozen=True)
class TensorRecord:
    """A tensor to be written: its name, safetensors' name of its type, its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """The bytes that its numbers take."""
        return math.prod(self.shape) * _DTYPES[self.dtype].itemsize


def header_bytes(records: Sequence[TensorRecord]) -> bytes:
    """The length and the header of a file that holds these tensors one after the other."""
    header: dict[str, Any] = {}
    end = 0
    for record in records:
        start, end = end, end + record.size_bytes
        header[record.name] = {"dtype": record.dtype, "shape": list(record.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(_LENGTH_BYTES + len(text)) % _ALIGNMENT_BYTES)  # numbers lie as their types want it
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


class WeightsWriter:
    """Writes the tensors of `records` in their order, a piece at a time, and hashes what it writes.  A context manager.

    Attributes:
        sha256: of the whole file, once it is closed.
        block_sha256: of each block of `BLOCK_BYTES`, the last may be shorter.
    """

    def __init__(self, path: Path, records: Sequence[TensorRecord]) -> None:
        self.sha256 = ""
        self.block_sha256: list[str] = []
        self._whole, self._block, self._block_filled = hashlib.sha256(), hashlib.sha256(), 0
        self._left = sum(record.size_bytes for record in records)
        self._file = path.open("wb", buffering=_WRITE_BYTES)
        self._write(memoryview(header_bytes(records)))

    def __enter__(self) -> Self:
        return self

    def append(self, piece: Tensor) -> None:
        """The next numbers: a contiguous tensor."""
        self._left -= piece.nbytes
        self._write(memoryview(piece.contiguous().view(-1).view(torch.uint8).numpy().data))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is not None:
                return
            assert self._left == 0, f"{self._left} bytes of the tensors in the header have not been written"
            if self._block_filled:
                self.block_sha256.append(self._block.hexdigest())
            self.sha256 = self._whole.hexdigest()

    def _write(self, piece: memoryview) -> None:
        while piece:
            part = piece[: BLOCK_BYTES - self._block_filled]
            write_in_pieces(self._file, part)
            self._whole.update(part)
            self._block.update(part)
            self._block_filled += len(part)
            if self._block_filled == BLOCK_BYTES:
                self.block_sha256.append(self._block.hexdigest())
                self._block, self._block_filled = hashlib.sha256(), 0
            piece = piece[len(part) :]


def write_in_pieces(file: BinaryIO, data: memoryview) -> None:
    """Write bytes so that a lookup in the mapped file makes few of them resident."""
    for start in range(0, len(data), _WRITE_BYTES):
        file.write(data[start : start + _WRITE_BYTES])


class WeightsLayout:
    """What is where in a weights file.

    Args:
        path: of the file, for messages.
        beginning: of the file, with the whole header.
        size_bytes: of the file.

    Attributes:
        path: of the file.
        size_bytes: of the file.
        shapes: of each tensor, in the order of the file.

    Raises:
        BundleError: it is no such file.
    """

    def __init__(self, path: Path, beginning: memoryview | mmap.mmap, size_bytes: int) -> None:
        self.path, self.size_bytes = path, size_bytes
        header_length = int.from_bytes(beginning[:_LENGTH_BYTES], "little")
        self._start = _LENGTH_BYTES + header_length
        try:
            if header_length > min(len(beginning) - _LENGTH_BYTES, _MAX_HEADER_BYTES):
                raise ValueError(f"its header is {header_length:,} bytes long")
            self._entries = _parse_header(bytes(beginning[_LENGTH_BYTES : self._start]))
            _check_places(self._entries, self._start, size_bytes)
        except (ValueError, RecursionError) as error:
            msg = f"{path}: not a safetensors file of torchdlrm ({str(error)[:300]}); export the bundle again"
            raise BundleError(msg) from error
        self.shapes = {name: entry.shape for name, entry in self._entries.items()}

    def span(self, name: str) -> tuple[int, int]:
        """Where the tensor's numbers begin and end in the file, in bytes."""
        start, end = self._entries[name].data_offsets
        return self._start + start, self._start + end

    def require(self, name: str, dtype: str, shape: tuple[int, ...], bytes_behind: int = 0) -> None:
        """See that there is such a tensor.

        Raises:
            BundleError: it is missing, has another type or shape, or ends too near to the end of the file.
        """
        entry = self._entries.get(name)
        found = None if entry is None else (entry.dtype, entry.shape)
        if found != (dtype, shape) or self.span(name)[1] + bytes_behind > self.size_bytes:
            msg = f"{self.path}: {name} is {found}, expected {(dtype, shape)} with {bytes_behind} bytes behind it"
            raise BundleError(msg)

    def _span_of(self, name: str) -> tuple[int, int]:
        """As `span`; raises BundleError where there is no tensor of that name."""
        if name not in self._entries:
            raise BundleError(f"{self.path}: tensor {name} is missing; export the bundle again")
        return self.span(name)

    def _shaped(self, name: str, numbers: Tensor) -> Tensor:
        """The bytes of a tensor in its type and shape."""
        entry = self._entries[name]
        return numbers.view(_DTYPES[entry.dtype]).view(entry.shape)


@dataclass(frozen=True)
class TablePlace:
    """Where the rows of a table are.

    Attributes:
        start: of its first row in the `data` that holds the table, in bytes.
        file_start: of its first row in the file.
        file_rows: how many of its rows the file has; 0 where the file has none of it.
        row_bytes: of a row.
    """

    start: int
    file_start: int
    file_rows: int
    row_bytes: int


class MappedWeights(WeightsLayout):
    """A weights file in memory, read-only; nothing is read before it is used.

    Attributes:
        data: the whole file, uint8 [size].  Not to be written to.
        file: its handle, open as long as this is.

    Raises:
        BundleError: it is no such file.
    """

    def __init__(self, path: Path) -> None:
        size_bytes = path.stat().st_size
        if size_bytes <= _LENGTH_BYTES:
            raise BundleError(f"{path}: not a safetensors file ({size_bytes} bytes long); export the bundle again")
        self.file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self.file)
        mapped = mmap.mmap(self.file, 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        # A lookup wants the rows it asks for, not the pages around them.
        mapped.madvise(mmap.MADV_RANDOM)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*not writable.*")
            self.data: Tensor = torch.frombuffer(mapped, dtype=torch.uint8)
        super().__init__(path, mapped, len(self.data))

    def tensor(self, name: str) -> Tensor:
        """A view of a tensor; not to be written to.

        Raises:
            BundleError: there is none of that name.
        """
        start, end = self._span_of(name)
        return self._shaped(name, self.data[start:end])

    def place(self, name: str) -> TablePlace:
        """Where the rows of a table are."""
        start, end = self.span(name)
        num_rows = self.shapes[name][0]
        return TablePlace(start, start, num_rows, (end - start) // max(1, num_rows))


class _Entry(Record):
    """A tensor in the header."""

    dtype: Literal["F32", "F16", "U8"]
    shape: tuple[Annotated[int, Field(ge=0, strict=True)], ...]
    data_offsets: tuple[Annotated[int, Field(ge=0, strict=True)], Annotated[int, Field(ge=0, strict=True)]]

    def _contradictions(self) -> Iterator[str]:
        start, end = self.data_offsets
        if end - start != math.prod(self.shape) * _DTYPES[self.dtype].itemsize:
            yield f"{end - start:,} bytes are not shape {list(self.shape)} of {self.dtype}"


def _parse_header(text: bytes) -> dict[str, _Entry]:
    """The tensors in the order of the file's header; raises ValueError."""
    header = json.loads(text)
    if isinstance(header, dict):
        header.pop("__metadata__", None)
    return TypeAdapter(dict[str, _Entry]).validate_python(header)


def _check_places(entries: Mapping[str, _Entry], start: int, size_bytes: int) -> None:
    """See that each tensor lies in the file, as its type wants it, and that no two share a byte; raises ValueError."""
    behind = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        first, end = (start + offset for offset in entry.data_offsets)
        if first < behind or end > size_bytes or first % _DTYPES[entry.dtype].itemsize:
            raise ValueError(f"tensor {name} lies across another, outside of the file, or not as its type wants it")
        behind = end


def blocks_of(starts: NDArray[np.int64], length: int, num_blocks: int) -> NDArray[np.bool_]:
    """Which blocks hold any of the pieces of `length` bytes that begin at `starts`: bool [num_blocks]."""
    touched = np.zeros(num_blocks, np.bool_)
    touched[starts // BLOCK_BYTES] = True
    touched[(starts + length - 1) // BLOCK_BYTES] = True
    return touched
