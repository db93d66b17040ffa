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
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from torchdlrm.errors import RunError
from torchdlrm.files import regular_file
from torchdlrm.training.checkpoint_files import read_metadata

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
        metadata = read_metadata(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        self._files: dict[str, Path] = {}  # looked at once: many chunks are in each
        for name, tensor in metadata.state_dict_metadata.items():
            if not name.startswith(prefix) or not isinstance(tensor, TensorStorageMetadata):
                continue
            short = name.removeprefix(prefix)
            dtype = tensor.properties.dtype
            if dtype != torch.float32 and not (dtype == torch.int32 and name.endswith(_LAST_STEPS)):
                msg = f"{path}: {short} is {dtype}; weights and state must be float32"
                raise RunError(msg)
            self.shapes[short] = tuple(tensor.size)
            self._dtypes[short] = np.dtype(str(dtype).removeprefix("torch."))
            self._chunks[short] = [
                self._map(short, chunk, metadata.storage_data[MetadataIndex(name, chunk.offsets)])
                for chunk in tensor.chunks
            ]
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

    def _map(self, name: str, chunk: ChunkStorageMetadata, stored: Any) -> _Chunk:
        path = self._files.get(stored.relative_path) or regular_file(self.path, stored.relative_path)
        self._files[stored.relative_path] = path
        try:
            first_byte = _first_byte(path, chunk, self._dtypes[name], stored.offset, stored.length)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            msg = f"{path}: {name} is not stored in one piece, as torchdlrm stores it ({str(error).splitlines()[0]})"
            raise RunError(msg) from error
        shape, dtype = tuple(chunk.sizes), self._dtypes[name]
        values: NDArray[Any] = (
            np.memmap(path, dtype, "r", first_byte, shape) if math.prod(shape) else np.empty(shape, dtype)
        )
        return _Chunk(tuple(chunk.offsets), values)


def _less(spans: Sequence[tuple[int, int]], offsets: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(first - offset, end - offset) for (first, end), offset in zip(spans, offsets, strict=True))


def _first_byte(path: Path, chunk: ChunkStorageMetadata, dtype: np.dtype[Any], offset: int, length: int) -> int:
    """Where the numbers of a chunk begin in a file whose `length` bytes from `offset` are what `torch.save` wrote.

    Raises ValueError where they are not there in one piece, or other ones are; reading the archive raises other things.
    """
    with path.open("rb") as file:
        # The archive's directory stands at its end; a bounded view of the file finds it without reading the data.
        archive = _Part(file, offset, length)
        with zipfile.ZipFile(archive) as entries:
            data = next((entry for entry in entries.infolist() if entry.filename.endswith("/data/0")), None)
        archive.seek(0)
        described = torch.load(archive, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        is_tensor = isinstance(described, Tensor) and str(described.dtype) == f"torch.{dtype}"
        if not is_tensor or described.shape != chunk.sizes:
            msg = f"not {dtype} of {list(chunk.sizes)}"
            raise ValueError(msg)
        if data is None or data.compress_type != zipfile.ZIP_STORED:
            msg = "no data, or compressed data"
            raise ValueError(msg)
        archive.seek(data.header_offset)
        header = archive.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = data.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    is_complete = described.is_contiguous() and not described.storage_offset()
    if not is_complete or data.file_size < described.nbytes or not 0 <= start <= length - described.nbytes:
        msg = "a part of a storage"
        raise ValueError(msg)
    return offset + start


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
