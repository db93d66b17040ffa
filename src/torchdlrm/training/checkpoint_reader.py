"""Reads tensors of a checkpoint in place, whole or in parts, without trusting it: nothing in it is executed.

In: a folder that `torch.distributed.checkpoint` wrote, whatever number of ranks trained it.  Out: float32 tensors.

It describes a checkpoint in `.metadata`, a pickle, and unpickling calls whatever a pickle names.  Here the pickle is
read into inert records, of an allow-list of names, and each part of them is checked.

`torch.distributed.checkpoint` itself loads an entire shard to give a part of it, and a shard may be a table of 20 GB.
Its files hold each shard as `torch.save` writes it, a zip archive whose entries are not compressed, so the numbers of a
shard lie in one piece and are mapped into memory: what is read is what is touched.
"""

import io
import math
import pickle
import re
import zipfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.errors import RunError, shown
from torchdlrm.files import regular_file
from torchdlrm.storage.mirror import fetch_missing
from torchdlrm.storage.reading import Seekable

MODEL = "model.model."  # the state's name for the model, then DLRMTrain's for the DLRM
_LOCAL_HEADER_BYTES = 30
_LAST_STEPS = "prev_iter"  # of the rows of a table: whole numbers, which a float32 does not hold beyond 2^24
METADATA_NAME = ".metadata"
_DATA_NAME = re.compile(r"__\d+_\d+\.distcp")
_CLASSES = {
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("builtins", "getattr"),  # of an enum and a name: how Python 3.11.2 pickles a member; an inert class here as well
}
_Size = tuple[int, ...]


class StoredPart(NamedTuple):
    """A rectangle of a tensor, and the bytes of a file that hold it, as `torch.save` has written it."""

    offsets: _Size
    sizes: _Size
    file: Path
    first_byte: int
    num_bytes: int

    @property
    def place(self) -> tuple[slice, ...]:
        """Which rows of the tensor it has, and which columns."""
        return tuple(slice(at, at + size) for at, size in zip(self.offsets, self.sizes, strict=True))


class StoredTensor(NamedTuple):
    """A tensor of a checkpoint: its parts cover it, and none overlaps another."""

    dtype: torch.dtype
    size: _Size
    parts: tuple[StoredPart, ...]


class _Record:
    """What stands for an object of the pickle: the arguments it would have been made with, and its state."""

    def __new__(cls, *args: Any) -> Self:
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    args: tuple[Any, ...]
    state: Any

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle._Unpickler):
    """Has data types of torch, and for each class of the allow-list an inert one of the same name.

    Python's own, since the one in C makes room for as many objects as a pickle says that it will number.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        # Of this file alone: a pickle may set attributes of the classes that it is given.
        self._records = {name: type(name[1], (_Record,), {}) for name in _CLASSES}

    def find_class(self, module: str, name: str) -> Any:
        dtype = getattr(torch, name, None) if module == "torch" and "." not in name else None
        found = dtype if isinstance(dtype, torch.dtype) else self._records.get((module, name))
        if found is None:
            msg = f"it names {module}.{name}, which no checkpoint of torchdlrm has; was it made to run code?"
            raise pickle.UnpicklingError(msg)
        return found

    def persistent_load(self, _: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by name; what is no tensor is left out.

    Raises:
        RunError: the description is missing, or is not what torchdlrm writes.
    """
    path = folder / METADATA_NAME
    try:
        fetch_missing(path)
        fields = _state(_unpickled(regular_file(folder, METADATA_NAME).read_bytes()), "Metadata")
        files: dict[str, Path] = {}  # each is looked at once
        places = {_index(key): _place(value, folder, files) for key, value in fields["storage_data"].items()}
        described = {_text(name): value for name, value in fields["state_dict_metadata"].items()}
        return {
            name: _tensor(name, value, places)
            for name, value in described.items()
            if _kind(value) != "BytesStorageMetadata"
        }
    except Exception as error:  # unpickling raises anything at all
        raise RunError(f"{path}: cannot be read: {_one_line(error)}") from error


@lru_cache(maxsize=1)
def _unpickled(content: bytes) -> Any:
    """The records of a pickle, which are only read: a checkpoint is looked at for damage, and then read."""
    return _Unpickler(io.BytesIO(content)).load()


def _index(record: Any) -> tuple[str, _Size | None]:
    """What a place is of: the name of a tensor, and where in it the part begins."""
    fields = _state(record, "MetadataIndex")
    offset = fields.get("offset")
    return _text(fields["fqn"]), None if offset is None else _size(offset)


def _place(record: Any, folder: Path, files: dict[str, Path]) -> tuple[Path, int, int]:
    """A file, and which of its bytes."""
    fields = _state(record, "_StorageInfo")
    name, (start, length) = _text(fields["relative_path"]), _size((fields["offset"], fields["length"]))
    if fields.get("transform_descriptors"):
        raise ValueError("it is compressed or encrypted, which torchdlrm does not write")
    if not _DATA_NAME.fullmatch(name):
        raise ValueError(f"it names {name!r}, which is no file of a checkpoint")
    if name not in files:
        fetch_missing(folder / name)
        files[name] = regular_file(folder, name)
    if start + length > files[name].stat().st_size:
        raise ValueError(f"bytes {start:,} to {start + length:,} are not in {name}")
    return files[name], start, length


def _tensor(name: str, record: Any, places: dict[tuple[str, _Size | None], tuple[Path, int, int]]) -> StoredTensor:
    fields = _state(record, "TensorStorageMetadata")
    if _kind(fields["properties"]) != "TensorProperties":
        raise TypeError(_kind(fields["properties"]))
    dtype, size = fields["properties"].state[0], _size(fields["size"])
    parts = []
    for chunk in (_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"]):
        offsets, sizes = _size(chunk["offsets"]), _size(chunk["sizes"])
        if (name, offsets) not in places:
            raise ValueError(f"{name} is not in any file")
        parts.append(StoredPart(offsets, sizes, *places[name, offsets]))
    are_inside = all(
        len(part.offsets) == len(part.sizes) == len(size)
        and all(start + length <= end for start, length, end in zip(part.offsets, part.sizes, size, strict=True))
        for part in parts
    )
    num_held = sum(math.prod(part.sizes) for part in parts)
    if not are_inside or num_held != math.prod(size) or _overlap(parts):
        raise ValueError(f"parts of {[list(part.sizes) for part in parts[:4]]} are not a tensor of {list(size)}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(type(dtype).__name__)
    return StoredTensor(dtype, size, tuple(parts))


def _overlap(parts: list[StoredPart]) -> bool:
    """Whether two parts of a tensor share a number, so that another one is in none."""
    ordered = sorted(part for part in parts if math.prod(part.sizes))
    for i, part in enumerate(ordered):
        ends = [start + length for start, length in zip(part.offsets, part.sizes, strict=True)]
        for other in ordered[i + 1 :]:
            if other.offsets[0] >= ends[0]:
                break  # and so do all behind it
            others = zip(other.offsets, other.sizes, part.offsets, ends, strict=True)
            if all(start < end and first < start + length for start, length, first, end in others):
                return True
    return False


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The fields of a record of a class."""
    if _kind(record) != kind or not isinstance(record.state, dict):
        raise TypeError(f"{_kind(record)} stands in the place of {kind}")
    return record.state


def _kind(value: Any) -> str:
    return type(value).__name__


def _size(value: Any) -> _Size:
    numbers = value.args[0] if _kind(value) == "Size" else value
    if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise TypeError(f"{shown(numbers)} is not a size")
    return tuple(numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(_kind(value))
    return value


def _one_line(error: BaseException) -> str:
    """The first line of an error's message, where it helps; what it is otherwise."""
    text = str(error).splitlines()[0] if str(error) else ""
    is_ours = isinstance(error, RunError | pickle.UnpicklingError | OSError | RuntimeError)
    return text if is_ours and text else f"not what torchdlrm writes ({type(error).__name__}: {text})"


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
        self.shapes: dict[str, _Size] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._parts: dict[str, list[tuple[StoredPart, NDArray[Any]]]] = {}
        for name, tensor in read_metadata(path).items():
            if not name.startswith(prefix):
                continue
            short = name.removeprefix(prefix)
            if tensor.dtype != torch.float32 and not (tensor.dtype == torch.int32 and name.endswith(_LAST_STEPS)):
                raise RunError(f"{path}: {short} is {tensor.dtype}; weights and state must be float32")
            self.shapes[short] = tensor.size
            self._dtypes[short] = np.dtype(str(tensor.dtype).removeprefix("torch."))
            self._parts[short] = [(part, _mapped(short, part, self._dtypes[short])) for part in tensor.parts]
        if not self.shapes:
            raise RunError(f"{path}: the checkpoint holds no DLRM")

    def tensor(self, name: str) -> Tensor:
        """All of a tensor, copied."""
        return self.part(name, [0] * len(self.shapes[name]), self.shapes[name])

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of a table, copied: float32 [stop - start, D]."""
        return self.part(name, (start, 0), (stop, self.shapes[name][1]))

    def part(self, name: str, begins: Sequence[int], ends: Sequence[int]) -> Tensor:
        """A rectangle of a tensor, copied, in each dimension from `begins` to before `ends`."""
        part = np.empty([end - begin for begin, end in zip(begins, ends, strict=True)], self._dtypes[name])
        for stored, values in self._parts[name]:
            spans = [
                (max(begin, has.start), min(end, has.stop))
                for begin, end, has in zip(begins, ends, stored.place, strict=True)
            ]
            if all(first < end for first, end in spans):
                part[_less(spans, begins)] = values[_less(spans, stored.offsets)]
        return torch.from_numpy(part)

    def column_cuts(self, name: str) -> set[tuple[int, int]]:
        """Where the pieces of columns of a table begin, and how wide they are."""
        return {(part.offsets[1], part.sizes[1]) for part, values in self._parts[name] if values.size}

    def gather(self, name: str, ids: NDArray[np.integer]) -> Tensor:
        """The rows of a table with these ids [n], all of which it has, copied: float32 [n, D]."""
        rows = np.empty((len(ids), self.shapes[name][1]), np.float32)
        for part, values in self._parts[name]:
            has, columns = part.place
            here = np.flatnonzero((ids >= has.start) & (ids < has.stop))
            rows[here, columns] = values[ids[here] - has.start]
        return torch.from_numpy(rows)


def _mapped(name: str, part: StoredPart, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The numbers of a part."""
    try:
        first_byte = _first_byte(part, dtype)
    except (OSError, ValueError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        msg = f"{part.file}: {name} is not stored in one piece, as torchdlrm stores it ({str(error).splitlines()[0]})"
        raise RunError(msg) from error
    if not math.prod(part.sizes):
        return np.empty(part.sizes, dtype)
    return np.memmap(part.file, dtype, "r", first_byte, part.sizes)


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
            raise ValueError(f"not {dtype} of {list(part.sizes)}")
        if data is None or data.compress_type != zipfile.ZIP_STORED:
            raise ValueError("no data, or compressed data")
        archive.seek(data.header_offset)
        header = archive.read(_LOCAL_HEADER_BYTES)
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = data.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    is_complete = described.is_contiguous() and not described.storage_offset()
    if not is_complete or data.file_size < described.nbytes or not 0 <= start <= part.num_bytes - described.nbytes:
        raise ValueError("a part of a storage")
    return part.first_byte + start


class _Part(Seekable):
    """A part of a file as a file of its own, for reading."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        super().__init__(length)
        self._file, self._start = file, start

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self.size_bytes - self.position)]
        self._file.seek(self._start + self.position)
        count = self._file.readinto(view)
        self.position += count
        return count
