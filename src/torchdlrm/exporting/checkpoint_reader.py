"""The weights of a checkpoint, read in place: any rows of any table, whatever number of ranks wrote it.

In: a folder that `torch.distributed.checkpoint` wrote.  Out: float32 tensors.  `torch.distributed.checkpoint` itself
loads a whole shard to give a part of it, and a shard may be a table of 20 GB.  Its files hold each shard as
`torch.save` writes it, a zip archive whose entries are not compressed, so the numbers of a shard lie in one piece and
are mapped into memory: what is read is what is touched.
"""

import io
import math
import pickle
import zipfile
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

_PREFIX = "model.model."  # the state's name for the model, then DLRMTrain's for the DLRM
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a tensor: where it begins, and its numbers, mapped."""

    offsets: tuple[int, ...]
    values: NDArray[np.float32]

    def rows_within(self, start: int, stop: int) -> tuple[int, int]:
        """The part of rows `start` to `stop` of the tensor that is in here; empty where the first is not smaller."""
        return max(start, self.offsets[0]), min(stop, self.offsets[0] + self.values.shape[0])


class CheckpointReader:
    """Float32 weights of the DLRM in a checkpoint, by the names that `torchrec.models.dlrm.DLRM` gives them.

    Args:
        path: the checkpoint's folder; whether it is damaged is for others to say.

    Raises:
        RunError: it is not in the layout that torchdlrm writes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata = read_metadata(path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._chunks: dict[str, list[_Chunk]] = {}
        for name, tensor in metadata.state_dict_metadata.items():
            if not name.startswith(_PREFIX) or not isinstance(tensor, TensorStorageMetadata):
                continue
            short = name.removeprefix(_PREFIX)
            if tensor.properties.dtype != torch.float32:
                msg = f"{path}: {short} is {tensor.properties.dtype}; a bundle is made of float32 weights"
                raise RunError(msg)
            self.shapes[short] = tuple(tensor.size)
            self._chunks[short] = [
                self._map(short, chunk, metadata.storage_data[MetadataIndex(name, chunk.offsets)])
                for chunk in tensor.chunks
            ]
        if not self.shapes:
            msg = f"{path}: the checkpoint holds no DLRM"
            raise RunError(msg)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor, copied: float32."""
        whole = np.empty(self.shapes[name], np.float32)
        for chunk in self._chunks[name]:
            where = tuple(
                slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.values.shape, strict=True)
            )
            whole[where] = chunk.values
        return torch.from_numpy(whole)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a table, copied: float32 [stop - start, D]."""
        rows = np.empty((stop - start, self.shapes[name][1]), np.float32)
        for chunk in self._chunks[name]:
            first, end = chunk.rows_within(start, stop)
            if first < end:
                columns = slice(chunk.offsets[1], chunk.offsets[1] + chunk.values.shape[1])
                rows[first - start : end - start, columns] = chunk.values[
                    first - chunk.offsets[0] : end - chunk.offsets[0]
                ]
        return torch.from_numpy(rows)

    def gather(self, name: str, ids: NDArray[np.integer]) -> Tensor:
        """The rows with these ids, copied: float32 [n, D].

        Args:
            name: of a table.
            ids: [n], from 0 to the table's last row.
        """
        rows = np.empty((len(ids), self.shapes[name][1]), np.float32)
        for chunk in self._chunks[name]:
            here = np.flatnonzero((ids >= chunk.offsets[0]) & (ids < chunk.offsets[0] + chunk.values.shape[0]))
            columns = slice(chunk.offsets[1], chunk.offsets[1] + chunk.values.shape[1])
            rows[here, columns] = chunk.values[ids[here] - chunk.offsets[0]]
        return torch.from_numpy(rows)

    def _map(self, name: str, chunk: ChunkStorageMetadata, stored: Any) -> _Chunk:
        path = regular_file(self.path, stored.relative_path)
        try:
            first_byte = _first_byte(path, chunk, stored.offset, stored.length)
        except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            msg = f"{path}: {name} is not stored in one piece, as torchdlrm stores it ({str(error).splitlines()[0]})"
            raise RunError(msg) from error
        shape = tuple(chunk.sizes)
        values: NDArray[np.float32] = (
            np.memmap(path, np.float32, "r", first_byte, shape) if math.prod(shape) else np.empty(shape, np.float32)
        )
        return _Chunk(tuple(chunk.offsets), values)


def _first_byte(path: Path, chunk: ChunkStorageMetadata, offset: int, length: int) -> int:
    """Where the numbers of a chunk begin in a file whose `length` bytes from `offset` are what `torch.save` wrote.

    Raises:
        ValueError: they are not there in one piece, or other ones are; reading the archive raises other things.
    """
    with path.open("rb") as file:
        # The archive's directory stands at its end; a bounded view of the file finds it without reading the data.
        archive = _Part(file, offset, length)
        with zipfile.ZipFile(archive) as entries:
            data = next((entry for entry in entries.infolist() if entry.filename.endswith("/data/0")), None)
        archive.seek(0)
        described = torch.load(archive, map_location="meta", weights_only=True)  # type: ignore[arg-type]
        if not isinstance(described, Tensor) or described.dtype != torch.float32 or described.shape != chunk.sizes:
            msg = f"not float32 of {list(chunk.sizes)}"
            raise ValueError(msg)
        if data is None or data.compress_type != zipfile.ZIP_STORED:
            msg = "no data, or compressed data"
            raise ValueError(msg)
        archive.seek(data.header_offset)
        header = archive.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = data.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    is_whole = described.is_contiguous() and not described.storage_offset()
    if not is_whole or data.file_size < described.nbytes or not 0 <= start <= length - described.nbytes:
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
