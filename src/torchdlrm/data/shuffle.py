"""Which part file a training row goes to, and in which order the rows of a part lie.

In: the positions of rows in the whole log and a seed.  Out: for each row a bucket and a sort key, both hashes of its
position: a shuffle of the whole split that any number of workers can carry out, in any order, with the same result.
"""

import numpy as np
import numpy.typing as npt

from torchdlrm.features.value_hash import splitmix

_BUCKET_STREAM, _ORDER_STREAM, _SPLIT_STREAM = 1, 2, 3  # 4 is that of raw values


def num_buckets(num_rows: int, part_rows: int) -> int:
    """Buckets, each of `part_rows` rows on average at most; of the rows of the split alone, so that all runs agree."""
    return max(1, -(-num_rows // part_rows))


def buckets(positions: npt.NDArray[np.int64], seed: int, num_buckets: int) -> npt.NDArray[np.int64]:
    """The bucket of each row, uniform: int64 [B]."""
    high = splitmix(positions, seed, _BUCKET_STREAM) >> np.uint64(32)
    return ((high * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def order_in_bucket(positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """The permutation of a bucket's rows, given in the order of the log: int64 [B]."""
    return np.argsort(splitmix(positions, seed, _ORDER_STREAM), kind="stable")


def uniform_draws(positions: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """A number of each row, uniform from 0 to 2^32 - 1: uint64 [B]."""
    return splitmix(positions, seed, _SPLIT_STREAM) >> np.uint64(32)
