"""Converts tensors of the Open Inference Protocol to series of values and back.

In: a name, a datatype, a shape, and data: numbers in JSON, or bytes in row-major order.  Out: a `Tensor`.  Nothing is
allocated that was not sent: the length of the data is held against the shape first, whatever numbers that has.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.errors import shown
from torchdlrm.serving.service.refusals import bad_request

MAX_DIMENSIONS = 2
BYTES = "BYTES"
NUMBER_TYPES: dict[str, np.dtype[Any]] = {
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
DATATYPES = (*NUMBER_TYPES, BYTES)
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a request.

    Attributes:
        shape: one or two dimensions.
        values: all values in row-major order: numbers of the datatype (FP16 as Float32), or String for BYTES; null
            where JSON has null and where a text is empty.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: pl.Series


def check_shape(name: str, datatype: object, shape: object) -> tuple[str, tuple[int, ...]]:
    """Return the datatype and shape of a tensor, checked.

    Raises:
        RefusedRequest: it is no datatype or no shape that the server takes.
    """
    if not isinstance(datatype, str) or datatype not in DATATYPES:
        raise bad_request(f"input {name!r}: datatype {shown(datatype)} is none of {', '.join(DATATYPES)}")
    sizes = list(shape) if isinstance(shape, Sequence) and not isinstance(shape, str) else []
    if not 1 <= len(sizes) <= MAX_DIMENSIONS or not all(type(size) is int and size >= 0 for size in sizes):
        msg = f"input {name!r}: shape {shown(shape)} is not one or two sizes of 0 or more, such as [1] or [1, 13]"
        raise bad_request(msg)
    return datatype, tuple(sizes)


def from_json(name: str, datatype: str, shape: tuple[int, ...], data: object) -> Tensor:
    """Make a tensor of values in JSON, flat or nested.

    Raises:
        RefusedRequest: they are not what datatype and shape say.
    """
    flat = _flat(name, data)
    _check_count(name, shape, len(flat))
    kinds = set(map(type, flat)) - {type(None)}
    if datatype == BYTES:
        if kinds - {str}:
            raise bad_request(f"input {name!r}: BYTES are strings in JSON, but there is {shown(_first(flat, {str}))}")
        try:
            return _of_texts(name, shape, flat)
        except UnicodeEncodeError as error:
            raise bad_request(f"input {name!r}: half of a surrogate pair is no text") from error
    dtype = NUMBER_TYPES[datatype]
    accepted: set[type] = {int, float} if dtype.kind == "f" else {int}
    if kinds - accepted:
        what = "numbers" if dtype.kind == "f" else "whole numbers"
        raise bad_request(f"input {name!r}: {datatype} are {what}, but there is {shown(_first(flat, accepted))}")
    return from_numbers(name, datatype, shape, flat)


def from_bytes(name: str, datatype: str, shape: tuple[int, ...], data: memoryview | bytes) -> Tensor:
    """Make a tensor of bytes, little-endian; each text of BYTES stands behind its length in 4 bytes.

    Raises:
        RefusedRequest: they are not what datatype and shape say.
    """
    if datatype == BYTES:
        return _of_texts(name, shape, _texts(name, shape, data))
    dtype = NUMBER_TYPES[datatype]
    expected = math.prod(shape) * dtype.itemsize
    if len(data) != expected:
        msg = f"input {name!r}: shape {list(shape)} of {datatype} needs {expected:,} bytes, but there are {len(data):,}"
        raise bad_request(msg)
    values: NDArray[Any] = np.frombuffer(data, dtype)
    return Tensor(name, datatype, shape, pl.Series(name, values.astype(np.float32) if dtype.itemsize == 2 else values))


def from_texts(name: str, shape: tuple[int, ...], texts: Sequence[bytes]) -> Tensor:
    """Make a tensor of BYTES from separate texts."""
    _check_count(name, shape, len(texts))
    return _of_texts(name, shape, [_decode(name, text) for text in texts])


def from_numbers(name: str, datatype: str, shape: tuple[int, ...], numbers: Sequence[float]) -> Tensor:
    """Make a tensor of what is known to be numbers."""
    _check_count(name, shape, len(numbers))
    try:
        dtype = NUMBER_TYPES["FP32" if datatype == "FP16" else datatype]
        polars_type = pl.Series(np.empty(0, dtype)).dtype
        return Tensor(name, datatype, shape, pl.Series(name, list(numbers), polars_type))
    except (pl.exceptions.PolarsError, OverflowError, TypeError) as error:
        raise bad_request(f"input {name!r}: a number is beyond what {datatype} can hold") from error


def _texts(name: str, shape: tuple[int, ...], data: memoryview | bytes) -> list[str]:
    count = math.prod(shape)
    if count * _LENGTH.size > len(data):
        raise bad_request(
            f"input {name!r}: shape {list(shape)} of BYTES needs at least {count * 4:,} bytes, there are {len(data):,}"
        )
    texts = []
    position, end, whole = 0, len(data), bytes(data)
    for _ in range(count):
        start = position + _LENGTH.size
        if start > end:
            break
        position = start + _LENGTH.unpack_from(whole, position)[0]
        if position > end:
            break
        texts.append(_decode(name, whole[start:position]))
    if len(texts) != count or position != end:
        msg = f"input {name!r}: {end:,} bytes do not hold exactly {count:,} texts, each behind its length in 4 bytes"
        raise bad_request(msg)
    return texts


def _decode(name: str, text: bytes) -> str:
    try:
        return text.decode()
    except UnicodeDecodeError as error:
        raise bad_request(f"input {name!r}: {shown(text)} is not UTF-8") from error


def _flat(name: str, data: object) -> list[Any]:
    if not isinstance(data, list):
        raise bad_request(f"input {name!r}: needs data, a list, or the parameter binary_data_size")
    if not any(isinstance(item, list) for item in data):
        return data
    if not all(isinstance(item, list) for item in data) or len({len(item) for item in data}) != 1:
        raise bad_request(f"input {name!r}: the rows of data are not lists of the same length")
    return [value for row in data for value in row]


def _check_count(name: str, shape: tuple[int, ...], count: int) -> None:
    if math.prod(shape) != count:
        msg = f"input {name!r}: shape {list(shape)} needs {math.prod(shape):,} values, but there are {count:,}"
        raise bad_request(msg)


def _first(values: Sequence[object], accepted: set[type]) -> object:
    return next(value for value in values if value is not None and type(value) not in accepted)


def _of_texts(name: str, shape: tuple[int, ...], texts: Sequence[str | None]) -> Tensor:
    """Make a tensor of BYTES, in which an empty text is a missing value, as in a log."""
    values = pl.Series(name, texts, pl.String)
    return Tensor(name, BYTES, shape, values.set(values == "", None) if (values == "").any() else values)
