"""Hashes raw values in the same way on every machine and forever; ids of hashed features are made of it.

In: raw values of a sparse feature, missing ones null.  Out: 64 bits each.  Numbers go through SplitMix64; text through
FNV-1a (64 bits) of its UTF-8 bytes, then SplitMix64; a missing value is hashed as no number and no text is.
"""

from functools import cache

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_VALUE_STREAM = 4  # 1 to 3 shuffle and split rows
_FNV_START, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_MISSING = np.uint64(0x6D697373696E6721)
# A text of more bytes than the first is long: the rest of it is hashed by itself where few texts are long.  To begin
# with one costs as much as the second number of places of all texts.
_LONG_BYTES, _TEXT_PER_PLACE = 64, 32
_BLOCK_BYTES = 1 << 16
_POWERS = np.multiply.accumulate(np.full(_BLOCK_BYTES, _FNV_PRIME))  # of the prime, from the first
_LOW_PRIME = np.uint8(int(_FNV_PRIME) & 0xFF)


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
    """The hash that `hash_values` gives a text, in plain Python: microseconds for a short one, slow for many."""
    if len(value) > _LONG_BYTES:
        return int(hash_values(pl.Series([value]))[0])
    x = int(_FNV_START)
    for byte in value.encode():
        x = (x ^ byte) * int(_FNV_PRIME) % 2**64
    return hash_number(x)


def _hash_text(values: pl.Series) -> npt.NDArray[np.uint64]:
    """FNV-1a of each text; null as the empty text.

    A byte of all texts at a time, as long as that is many of them; then the rest of each long text by itself.  So the
    cost is that of the bytes there are, and one long text does not make many short ones wait.
    """
    array = values.fill_null("").to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
    offsets = np.frombuffer(array.buffers()[1], np.int64)[array.offset : array.offset + len(array) + 1]
    data = array.buffers()[2]
    codes = np.frombuffer(data, np.uint8) if data is not None else np.zeros(0, np.uint8)
    hashes = np.full(len(array), _FNV_START)
    lengths = np.diff(offsets)
    # Longest first, so that the texts that have a byte at some place are the first ones.
    order = np.argsort(-lengths, kind="stable")
    starts, falling = offsets[:-1][order], -lengths[order]
    longest = int(lengths.max(initial=0))
    for place in range(longest):
        count = int(np.searchsorted(falling, -place, side="left"))
        if place % _LONG_BYTES == 0 and place and count * _TEXT_PER_PLACE < longest - place:
            for i in range(count):
                hashes[i : i + 1] = _hash_on(hashes[i : i + 1], codes[starts[i] + place : starts[i] - falling[i]])
            break
        hashes[:count] = (hashes[:count] ^ codes[starts[:count] + place]) * _FNV_PRIME
    result = np.empty_like(hashes)
    result[order] = hashes
    return result


def _hash_on(start: npt.NDArray[np.uint64], codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """FNV-1a of more bytes, from the hash of those before, uint64 [1], in some twenty calls of NumPy for each 64 KiB.

    A byte changes nothing but the lowest byte of the hash before the product.  So those lowest bytes are found first,
    bit by bit from the lowest: a bit is the exclusive or of all that went into it before.  What the bytes add to the
    hash is then known, and the hash is a sum of these by powers of the prime.
    """
    for first in range(0, len(codes), _BLOCK_BYTES):
        block = codes[first : first + _BLOCK_BYTES]
        low = np.zeros(len(block), np.uint8)  # of the hash before each product, as far as its bits are known
        for bit in range(8):
            carried = np.empty_like(low)  # by the product of the byte before, into this bit
            carried[0] = start[0] & np.uint64(0xFF)
            carried[1:] = low[:-1] * _LOW_PRIME
            low |= np.bitwise_xor.accumulate((carried ^ block) >> bit & 1) << bit
        added = low.astype(np.uint64) - (low ^ block)
        powers = _POWERS[: len(block)][::-1]
        start = start * powers[:1] + (added * powers).sum(keepdims=True)
    return start


def hash_numbers(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of each number, the same everywhere and forever: uint64 [B]."""
    return splitmix(numbers, 0, _VALUE_STREAM)


def hash_number(number: int) -> int:
    """The hash that `hash_numbers` gives one number, in plain Python: a microsecond instead of ten for so few."""
    x = (_VALUE_START + (number + 1) * int(_GOLDEN)) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def splitmix(positions: npt.NDArray[np.int64], seed: int, stream: int) -> npt.NDArray[np.uint64]:
    """SplitMix64 (Steele, Lea and Flood 2014) started at a mix of seed and stream: one jump a row."""
    return _mix(_start(seed, stream) + (positions.astype(np.uint64) + np.uint64(1)) * _GOLDEN)


@cache
def _start(seed: int, stream: int) -> npt.NDArray[np.uint64]:
    return _mix(_mix(np.array([seed], np.uint64) * _GOLDEN) + np.uint64(stream))


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_VALUE_START = int(_start(0, _VALUE_STREAM)[0])
