"""Reads tensors of a checkpoint in place, whole or in parts.

In: a folder that `torch.distributed.checkpoint` wrote, whatever number of ranks trained it.  Out: float32 tensors.

`torch.distributed.checkpoint` itself loads an entire shard to give a part of it, and a shard may be a table of 20 GB.
Its files hold each shard as `torch.save` writes it, a zip archive whose entries are not compressed, so the numbers of a
shard lie in one piece and are mapped into memory: what is read is what is touched.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.errors import RunError
from torchdlrm.training.checkpoint_files import StoredPart, read_metadata

MODEL = "model.model."  # the state's name for the model, then DLRMTrain's for the DLRM
_LOCAL_HEADER_BYTES = 30
_LAST_STEPS = "prev_iter"  # of the rows of a table: whole numbers, which a float32 does not hold beyond 2^24


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a tensor: where it begins, and its numbers, mapped."""

    offsets: tuple[int, ...]
    values: NDArray[Any]

    @property
    def place(self) -> tuple[slice, ...]:
        """Which rows of the tensor it has, and which columns."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.values.shape, strict=True))


class CheckpointReader:
    """Tensors of a checkpoint, all float32 but for int32 last steps of rows.

    Args:
        path: the checkpoint's folder; whether it is damaged is for others to say.
        prefix: of the names of tensors to read, which are then called without it: by default the model's weights, by
            the names that `torchrec.models.dlrm.DLRM` gives them; with ``, the optimizers' state as well.

    Attributes:
        shapes: of the tensors, by name.

    Raises:
        RunError: it is not in the layout that torchdlrm writes.
    """

    def __init__(self, path: Path, prefix: str = MODEL) -> None:
        self.path = path
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        for name, tensor in read_metadata(path).items():
            if not name.startswith(prefix):
                continue
            short = name.removeprefix(prefix)
            if tensor.dtype != torch.float32 and not (tensor.dtype == torch.int32 and name.endswith(_LAST_STEPS)):
                msg = f"{path}: {short} is {tensor.dtype}; weights and state must be float32"
                raise RunError(msg)
            self.shapes[short] = tensor.size
            self._dtypes[short] = np.dtype(str(tensor.dtype).removeprefix("torch."))
            self._chunks[short] = [_mapped(short, part, self._dtypes[short]) for part in tensor.parts]
        if not self.shapes:
            msg = f"{path}: the checkpoint holds no DLRM"
            raise RunError(msg)

    def tensor(self, name: str) -> Tensor:
        """All of a tensor, copied."""
        return self.part(name, [0] * len(self.shapes[name]), self.shapes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a table, copied: float32 [stop - start, D]."""
        return self.part(name, (start, 0), (stop, self.shapes[name][1]))

    def part(self, name: str, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
        """A rectangle of a tensor, copied, in each dimension from `begins` to before `ends`."""
        part = np.empty([end - begin for begin, end in zip(begins, ends, strict=True)], self._dtypes[name])
        for chunk in self._chunks[name]:
            spans = [
                (max(begin, has.start), min(end, has.stop))
                for begin, end, has in zip(begins, ends, chunk.place, strict=True)
            ]
            if all(first < end for first, end in spans):
                part[_less(spans, begins)] = chunk.values[_less(spans, chunk.offsets)]
        return torch.from_numpy(part)

    def column_cuts(self, name: str) -> set[tuple[int, int]]:
        """Where the pieces of columns of a table begin, and how wide they are."""
        return {(chunk.offsets[1], chunk.values.shape[1]) for chunk in self._chunks[name] if chunk.values.size}

    def gather(self, name: str, ids: NDArray[np.integer]) -> Tensor:
        """The rows of a table with these ids [n], all of which it has, copied: float32 [n, D]."""
        rows = np.empty((len(ids), self.shapes[name][1]), np.float32)
        for chunk in self._chunks[name]:
            has, columns = chunk.place
            here = np.flatnonzero((ids >= has.start) & (ids < has.stop))
            rows[here, columns] = chunk.values[ids[here] - has.start]
        return torch.from_numpy(rows)


def _mapped(name: str, part: StoredPart, dtype: np.dtype[Any]) -> _Chunk:
    try:
        first_byte = _first_byte(part, dtype)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        msg = f"{part.file}: {name} is not stored in one piece, as torchdlrm stores it ({str(error).splitlines()[0]})"
        raise RunError(msg) from error
    values: NDArray[Any] = (
        np.memmap(part.file, dtype, "r", first_byte, part.sizes)
        if math.prod(part.sizes)
        else np.empty(part.sizes, dtype)
    )
    return _Chunk(part.offsets, values)


def _less(spans: Sequence[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first - offset, end - offset) for (first, end), offset in zip(spans, offsets, strict=True))


def _first_byte(part: StoredPart, dtype: np.dtype[Any]) -> int:
    """Where in its file the numbers of a part begin.

    Raises ValueError where they are not there in one piece, or other ones are; reading the archive raises other things.
    """
    with part.file.open("rb") as file:
        # The archive's directory stands at its end; a bounded view of the file finds it without reading the data.
        archive = _Part(file, part.first_byte, part.num_bytes)
        with zipfile.ZipFile(archive) as entries:
            data = next((entry for entry in entries.infolist() if entry.filename.endswith("/data/0")), None)
        archive.seek(0)
        described = torch.load(archive, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        is_tensor = isinstance(described, Tensor) and str(described.dtype) == f"torch.{dtype}"
        if not is_tensor or described.shape != part.sizes:
            msg = f"not {dtype} of {list(part.sizes)}"
            raise ValueError(msg)
        if data is None or data.compress_type != zipfile.ZIP_STORED:
            msg = "no data, or compressed data"
            raise ValueError(msg)
        archive.seek(data.header_offset)
        header = archive.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = data.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    is_complete = described.is_contiguous() and not described.storage_offset()
    if not is_complete or data.file_size < described.nbytes or not 0 <= start <= part.num_bytes - described.nbytes:
        msg = "a part of a storage"
        raise ValueError(msg)
    return part.first_byte + start


class _Part(io.RawIOBase):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._length - self._position)]
        self._file.seek(self._start + self._position)
        count = self._file.readinto(view)
        self._position += count
        return count
