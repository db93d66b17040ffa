"""Reads the files of a checkpoint without trusting them: nothing in them is executed.

`torch.distributed.checkpoint` describes a checkpoint in `.metadata`, a pickle, and unpickling calls whatever a pickle
names.  Here the pickle is read into inert records, of an allow-list of names; and the description is built again from
them, each part of it checked.  Tensors are read by `checkpoint_reader`.
"""

import io
import math
import pickle
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, Self

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

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


def read_metadata(folder: Path) -> Metadata:
    """The description of a checkpoint.

    Returns:
        Tensors whose chunks cover them, and for each chunk a part of a file of the folder.

    Raises:
        RunError: it is missing, or is not what torchdlrm writes.
    """
    path = folder / METADATA_NAME
    try:
        root = _unpickled(regular_file(folder, METADATA_NAME).read_bytes())
        return _metadata(root, _FileSizes(folder))
    except Exception as error:  # unpickling raises anything at all
        msg = f"{path}: cannot be read: {_one_line(error)}"
        raise RunError(msg) from error


@lru_cache(maxsize=1)
def _unpickled(content: bytes) -> Any:
    """The records of a pickle, which are only read: a checkpoint is looked at for damage, and then read."""
    return _Unpickler(io.BytesIO(content)).load()


class _FileSizes:
    """Sizes of a checkpoint's files, each looked up once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._bytes: dict[str, int] = {}

    def __getitem__(self, name: str) -> int:
        if name not in self._bytes:
            if not _DATA_NAME.fullmatch(name):
                msg = f"it names {name!r}, which is no file of a checkpoint"
                raise ValueError(msg)
            self._bytes[name] = regular_file(self._folder, name).stat().st_size
        return self._bytes[name]


def _metadata(root: Any, file_bytes: _FileSizes) -> Metadata:
    fields = _state(root, "Metadata")
    stored = {_index(key): _storage(value, file_bytes) for key, value in fields["storage_data"].items()}
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for name, value in fields["state_dict_metadata"].items():
        if type(name) is str and _kind(value) == "BytesStorageMetadata":
            state[name] = BytesStorageMetadata()
            needed = [MetadataIndex(name)]
        else:
            state[name] = tensor = _tensor(value)
            needed = [MetadataIndex(name, chunk.offsets) for chunk in tensor.chunks]
        if not stored.keys() >= {*needed}:
            msg = f"{name} is not in any file"
            raise ValueError(msg)
    return Metadata(state, storage_data=stored)


def _tensor(record: Any) -> TensorStorageMetadata:
    fields = _state(record, "TensorStorageMetadata")
    if _kind(fields["properties"]) != "TensorProperties":
        raise TypeError(_kind(fields["properties"]))
    dtype, size = fields["properties"].state[0], _size(fields["size"])
    chunks = [
        ChunkStorageMetadata(_size(chunk["offsets"]), _size(chunk["sizes"]))
        for chunk in (_state(chunk, "ChunkStorageMetadata") for chunk in fields["chunks"])
    ]
    are_inside = all(
        len(chunk.offsets) == len(chunk.sizes) == len(size)
        and all(start + length <= end for start, length, end in zip(chunk.offsets, chunk.sizes, size, strict=True))
        for chunk in chunks
    )
    num_held = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not are_inside or num_held != math.prod(size) or _overlap(chunks):
        msg = f"parts of {[list(chunk.sizes) for chunk in chunks[:4]]} are not a tensor of {list(size)}"
        raise ValueError(msg)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(type(dtype).__name__)
    return TensorStorageMetadata(TensorProperties(dtype=dtype), size, chunks)


def _overlap(chunks: list[ChunkStorageMetadata]) -> bool:
    """Whether two parts of a tensor share a number, so that another one is in none."""
    ordered = sorted((chunk for chunk in chunks if math.prod(chunk.sizes)), key=lambda chunk: tuple(chunk.offsets))
    for i, chunk in enumerate(ordered):
        ends = [start + length for start, length in zip(chunk.offsets, chunk.sizes, strict=True)]
        for other in ordered[i + 1 :]:
            if other.offsets[0] >= ends[0]:
                break  # and so do all behind it
            others = zip(other.offsets, other.sizes, chunk.offsets, ends, strict=True)
            if all(start < end and first < start + length for start, length, first, end in others):
                return True
    return False


def _index(record: Any) -> MetadataIndex:
    fields = _state(record, "MetadataIndex")
    offset = fields.get("offset")
    return MetadataIndex(_text(fields["fqn"]), None if offset is None else _size(offset))


def _storage(record: Any, file_bytes: _FileSizes) -> _StorageInfo:
    fields = _state(record, "_StorageInfo")
    name, (offset, length) = _text(fields["relative_path"]), _size((fields["offset"], fields["length"]))
    if fields.get("transform_descriptors"):
        msg = "it is compressed or encrypted, which torchdlrm does not write"
        raise ValueError(msg)
    if offset + length > file_bytes[name]:
        msg = f"bytes {offset:,} to {offset + length:,} are not in {name}"
        raise ValueError(msg)
    return _StorageInfo(name, offset, length)


def _state(record: Any, kind: str) -> dict[str, Any]:
    """The fields of a record of a class."""
    if _kind(record) != kind or not isinstance(record.state, dict):
        msg = f"{_kind(record)} stands in the place of {kind}"
        raise TypeError(msg)
    return record.state


def _kind(value: Any) -> str:
    return type(value).__name__


def _size(value: Any) -> torch.Size:
    numbers = value.args[0] if _kind(value) == "Size" else value
    if not isinstance(numbers, tuple) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        msg = f"{shown(numbers)} is not a size"
        raise TypeError(msg)
    return torch.Size(numbers)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(_kind(value))
    return value


def _one_line(error: BaseException) -> str:
    """The first line of an error's message, where it helps; what it is otherwise."""
    text = str(error).splitlines()[0] if str(error) else ""
    is_ours = isinstance(error, RunError | pickle.UnpicklingError | OSError | RuntimeError)
    return text if is_ours and text else f"not what torchdlrm writes ({type(error).__name__}: {text})"
