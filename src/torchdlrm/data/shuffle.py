"""Which part file a training row goes to, and in which order the rows of a part lie.

In: the positions of rows in the whole log and a seed.  Out: for each row a bucket and a sort key, both hashes of its
position: a shuffle of the whole split that any number of workers can carry out, in any order, with the same result.
"""

from functools import cache

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_BUCKET_STREAM, _ORDER_STREAM, _SPLIT_STREAM, _VALUE_STREAM = 1, 2, 3, 4


def num_buckets(num_rows: int, part_rows: int) -> int:
    """Buckets, each of `part_rows` rows on average at most; of the rows of the split alone, so that all runs agree."""
    return max(1, -(-num_rows // part_rows))


def buckets(positions: npt.NDArray[np.int64], seed: int, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each row, uniform: int64 [B]."""
    high = _hash(positions, seed, _BUCKET_STREAM) >> np.uint64(32)
    return ((high * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def order_in_bucket(positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The permutation of a bucket's rows, given in the order of the log: int64 [B]."""
    return np.argsort(_hash(positions, seed, _ORDER_STREAM), kind="stable")


def uniform_draws(positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A number of each row, uniform from 0 to 2^32 - 1: uint64 [B]."""
    return _hash(positions, seed, _SPLIT_STREAM) >> np.uint64(32)


def hash_numbers(numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """A hash of each number, the same everywhere and for ever: uint64 [B]."""
    return _hash(numbers, 0, _VALUE_STREAM)


def hash_number(number: int) -> int:
    """The hash that `hash_numbers` gives one number, in plain Python: a microsecond instead of ten for so few."""
    x = (_VALUE_START + (number + 1) * int(_GOLDEN)) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def _hash(positions: npt.NDArray[np.int64], seed: int, stream: int) -> npt.NDArray[np.uint64]:
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
