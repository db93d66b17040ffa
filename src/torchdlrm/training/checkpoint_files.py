"""Reads the description of a checkpoint without trusting it: nothing in it is executed.

`torch.distributed.checkpoint` describes a checkpoint in `.metadata`, a pickle, and unpickling calls whatever a pickle
names.  Here the pickle is read into inert records, of an allow-list of names, and each part of them is checked.
In: a checkpoint's folder.  Out: its tensors, and where the parts of each lie; `checkpoint_reader` reads them.
"""

import io
import math
import pickle
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch

from torchdlrm.errors import RunError, shown
from torchdlrm.files import regular_file

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
}
_Size = tuple[int, ...]


class StoredPart(NamedTuple):
    """A rectangle of a tensor, and the bytes of a file that hold it, as `torch.save` has written it."""

    offsets: _Size
    sizes: _Size
    file: Path
    first_byte: int
    num_bytes: int


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
    """Knows data types of torch, and for each class of the allow-list an inert one of the same name.

    The one in Python, since that in C makes room for as many objects as a pickle says that it will number.
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
        msg = "it refers to something outside of itself"
        raise pickle.UnpicklingError(msg)


def read_metadata(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of a checkpoint, by name; what is no tensor is left out.

    Raises:
        RunError: the description is missing, or is not what torchdlrm writes.
    """
    path = folder / METADATA_NAME
    try:
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
        msg = f"{path}: cannot be read: {_one_line(error)}"
        raise RunError(msg) from error


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
        msg = "it is compressed or encrypted, which torchdlrm does not write"
        raise ValueError(msg)
    if not _DATA_NAME.fullmatch(name):
        msg = f"it names {name!r}, which is no file of a checkpoint"
        raise ValueError(msg)
    if name not in files:
        files[name] = regular_file(folder, name)
    if start + length > files[name].stat().st_size:
        msg = f"bytes {start:,} to {start + length:,} are not in {name}"
        raise ValueError(msg)
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
            msg = f"{name} is not in any file"
            raise ValueError(msg)
        parts.append(StoredPart(offsets, sizes, *places[name, offsets]))
    are_inside = all(
        len(part.offsets) == len(part.sizes) == len(size)
        and all(start + length <= end for start, length, end in zip(part.offsets, part.sizes, size, strict=True))
        for part in parts
    )
    num_held = sum(math.prod(part.sizes) for part in parts)
    if not are_inside or num_held != math.prod(size) or _overlap(parts):
        msg = f"parts of {[list(part.sizes) for part in parts[:4]]} are not a tensor of {list(size)}"
        raise ValueError(msg)
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
        msg = f"{_kind(record)} stands in the place of {kind}"
        raise TypeError(msg)
    return record.state


def _kind(value: Any) -> str:
    return type(value).__name__


def _size(value: Any) -> _Size:
    numbers = value.args[0] if _kind(value) == "Size" else value
    if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        msg = f"{shown(numbers)} is not a size"
        raise TypeError(msg)
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
