"""Predicts from a checkpoint: reads its weights in place, and runs the eager float32 model on them.

In: a folder that `torch.distributed.checkpoint` wrote, whatever number of ranks trained it.  Out: float32 tensors, and
what the checkpoint itself predicts: what a bundle is compared with.

`torch.distributed.checkpoint` itself loads an entire shard to give a part of it, and a shard may be a table of 20 GB.
Its files hold each shard as `torch.save` writes it, a zip archive whose entries are not compressed, so the numbers of a
shard lie in one piece and are mapped into memory: what is read is what is touched.

The predictions share no code with the fast path as served but the reading of rows: the model's own forward, float32
throughout.

B rows, F sparse features, D embedding dimension.
"""

import io
import math
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from torchdlrm.bundle import TablePrecision
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import as_looked_up
from torchdlrm.errors import RunError
from torchdlrm.features.tables import divisors, split_ids
from torchdlrm.files import regular_file
from torchdlrm.model import table_weight
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.eager import EagerModel
from torchdlrm.training.checkpoint_files import read_metadata

_PREFIX = "model.model."  # the state's name for the model, then DLRMTrain's for the DLRM
_LOCAL_HEADER_BYTES = 30


@dataclass(frozen=True)
class _Chunk:
    """A rectangle of a tensor: where it begins, and its numbers, mapped."""

    offsets: tuple[int, ...]
    values: NDArray[np.float32]

    @property
    def place(self) -> tuple[slice, ...]:
        """Which rows of the tensor it has, and which columns."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.values.shape, strict=True))


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
        """All of a tensor, copied: float32."""
        full = np.empty(self.shapes[name], np.float32)
        for chunk in self._chunks[name]:
            full[chunk.place] = chunk.values
        return torch.from_numpy(full)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a table, copied: float32 [stop - start, D]."""
        rows = np.empty((stop - start, self.shapes[name][1]), np.float32)
        for chunk in self._chunks[name]:
            has, columns = chunk.place
            first, end = max(start, has.start), min(stop, has.stop)
            if first < end:
                rows[first - start : end - start, columns] = chunk.values[first - has.start : end - has.start]
        return torch.from_numpy(rows)

    def gather(self, name: str, ids: NDArray[np.integer]) -> Tensor:
        """The rows of a table with these ids [n], all of which it has, copied: float32 [n, D]."""
        rows = np.empty((len(ids), self.shapes[name][1]), np.float32)
        for chunk in self._chunks[name]:
            has, columns = chunk.place
            here = np.flatnonzero((ids >= has.start) & (ids < has.stop))
            rows[here, columns] = chunk.values[ids[here] - has.start]
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


class CheckpointModel:
    """A checkpoint that predicts, for one thread at a time.

    Attributes:
        tables: of all features, in schema order.

    Raises:
        RunError: its tensors are not those of the model.
    """

    def __init__(self, checkpoint: CheckpointReader, shape: ModelShape, num_embeddings: Mapping[str, int]) -> None:
        self._checkpoint = checkpoint
        self._model = EagerModel(shape, num_embeddings)
        self.tables = self._model.tables
        self._features, self._divisors = list(num_embeddings), divisors(shape.config, list(num_embeddings))
        weights = {table_weight(table.key) for table in self.tables}
        if checkpoint.shapes != self._model.weight_shapes:
            wrong = sorted(dict(checkpoint.shapes.items() ^ self._model.weight_shapes.items()))
            msg = (
                f"{checkpoint.path}: not a checkpoint of the run's model on this dataset; {', '.join(wrong[:4])} differ"
            )
            raise RunError(msg)
        dense = {name: checkpoint.tensor(name) for name in checkpoint.shapes if name not in weights}
        self._model.module.load_state_dict(dense)

    def logits(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> NDArray[np.float32]:
        """The log-odds of a click of each row: float32 [B].

        Args:
            rows: B rows.
            precisions: that each feature's embeddings are rounded to, F of them; None: none is rounded.
        """
        return self.logits_of(rows, self.all_pooled(rows, precisions))

    def logits_of(self, rows: EncodedRows, pooled: Tensor) -> NDArray[np.float32]:
        """The log-odds of rows whose embeddings were looked up before: float32 [B]."""
        ids, lengths = map(torch.from_numpy, rows.split(self._divisors).flat())
        with torch.inference_mode():
            logits_B: NDArray[np.float32] = self._model.logits(
                torch.from_numpy(rows.dense), ids, lengths, pooled
            ).numpy()
        return logits_B

    def all_pooled(self, rows: EncodedRows, precisions: Sequence[TablePrecision] | None = None) -> Tensor:
        """The sums of the rows of all tables: [B, sum of their dimensions]; `precisions` as in `logits`."""
        chosen: Sequence[TablePrecision] = precisions or ["float32"] * len(self._features)
        return torch.cat([self.pooled(rows, feature, chosen[feature]) for feature in range(len(chosen))], dim=1)

    def columns(self, feature: int) -> slice:
        """Where those of a feature are."""
        name, starts = self._features[feature], [0, *accumulate(table.dim for table in self.tables)]
        mine = [place for place, table in enumerate(self.tables) if table.feature == name]
        return slice(starts[mine[0]], starts[mine[-1] + 1])

    def pooled(self, rows: EncodedRows, feature: int, precision: TablePrecision) -> Tensor:
        """The sums of the rows of a feature's table, or of its two: [B, sum of their dimensions].

        Args:
            rows: B rows.
            feature: its position in the schema.
            precision: that rows of the table are rounded to before they are added up.
        """
        sparse = rows.sparse[feature]
        ids, offsets = sparse if isinstance(sparse, tuple) else (sparse, None)
        names = [table_weight(table.key) for table in self.tables if table.feature == self._features[feature]]
        parts = zip(names, split_ids(ids, self._divisors[feature]), strict=True)
        found = torch.cat([as_looked_up(self._checkpoint.gather(name, part), precision) for name, part in parts], dim=1)
        if offsets is None:
            return found
        bags = torch.repeat_interleave(torch.arange(rows.num_rows), torch.from_numpy(np.diff(offsets)))
        return torch.zeros(rows.num_rows, found.shape[1]).index_add_(0, bags, found)


def _first_byte(path: Path, chunk: ChunkStorageMetadata, offset: int, length: int) -> int:
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
