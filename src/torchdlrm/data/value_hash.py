"""A hash of raw values that is the same on every machine and for ever: ids of hashed features are made of it.

In: raw values of a sparse feature, missing ones null.  Out: 64 bits each.  Numbers go through SplitMix64; text through
FNV-1a (64 bits) of its UTF-8 bytes, then SplitMix64; a missing value is hashed as no number and no text is.
"""

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.data.shuffle import hash_number, hash_numbers

_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MISSING = np.uint64(0x6D697373696E6721)


def hash_values(values: pl.Series) -> npt.NDArray[np.uint64]:
    """The hash of each value (Int64, UInt32 or String): uint64 [D]."""
    if values.dtype == pl.String:
        numbers = _hash_text(values).view(np.int64)
    else:
        numbers = values.fill_null(0).to_numpy().astype(np.int64)
    return hash_integers(numbers, values.is_null().to_numpy() if values.null_count() else None)


def hash_integers(
    numbers: npt.NDArray[np.int64], is_missing: npt.NDArray[np.bool_] | None = None
) -> npt.NDArray[np.uint64]:
    """The hash of each integer: uint64, of the shape of `numbers`.

    Args:
        numbers: of any shape.
        is_missing: where there is none, whatever stands in its place, of the same shape; None: nowhere.
    """
    hashes = hash_numbers(numbers)
    if is_missing is not None:
        hashes[is_missing] = _MISSING
    return hashes


def hashed_ids(values: pl.Series, num_embeddings: int) -> npt.NDArray[np.int32]:
    """The id of each value of a hashed feature, from 0 to `num_embeddings` - 1: int32 [D]."""
    return (hash_values(values) % np.uint64(num_embeddings)).astype(np.int32)


def hash_text(value: str) -> int:
    """The hash that `hash_values` gives a text, in plain Python: microseconds for one, slow for many."""
    x = int(_FNV_START)
    for byte in value.encode():
        x = (x ^ byte) * int(_FNV_PRIME) % 2**64
    return hash_number(x)


def _hash_text(values: pl.Series) -> npt.NDArray[np.uint64]:
    """FNV-1a of each text, a byte of all texts at a time; null as the empty text."""
    array = values.fill_null("").to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    codes = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    hashes = np.full(len(array), _FNV_START)
    lengths = np.diff(offsets)
    # Longest first, so that the texts that have a byte at some place are the first ones.
    order = np.argsort(-lengths, kind="stable")
    starts, falling = offsets[:-1][order], -lengths[order]
    for place in range(int(lengths.max(initial=0))):
        count = int(np.searchsorted(falling, -place, side="left"))
        hashes[:count] = (hashes[:count] ^ codes[starts[:count] + place]) * _FNV_PRIME
    result = np.empty_like(hashes)
    result[order] = hashes
    return result
