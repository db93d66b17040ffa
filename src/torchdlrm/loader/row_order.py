"""Which rank reads which rows, in which order: pure arithmetic, no files.

An epoch is one stream of rows: the row groups of a split one after the other. Epoch 0 has the dataset's own order
(training rows are shuffled on disk); later epochs permute the row groups. Batch k is rows [k * B, (k + 1) * B) of the
stream whatever the world size, and rank r reads the r-th contiguous slice of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RowGroup:
    """Where a run of rows lies on disk."""

    file_index: int
    group_index: int
    rows: int


def epoch_order(row_groups: Sequence[RowGroup], *, epoch: int, seed: int) -> list[RowGroup]:
    """The row groups in the order in which that epoch reads them."""
    if epoch == 0:
        return list(row_groups)
    order = np.random.default_rng([seed, epoch]).permutation(len(row_groups))
    return [row_groups[i] for i in order]


def num_batches(rows: int, batch_size_global: int) -> int:
    """Batches of an epoch; the last one may be smaller."""
    return -(-rows // batch_size_global)


def batch_rows(batch: int, *, rows: int, batch_size_global: int) -> range:
    """The rows of the stream that batch `batch` holds, over all ranks."""
    return range(batch * batch_size_global, min((batch + 1) * batch_size_global, rows))


def rank_rows(batch: range, *, rank: int, world_size: int) -> range:
    """The contiguous slice of a batch that `rank` reads; slices differ in size by one row at most."""
    start = batch.start + len(batch) * rank // world_size
    stop = batch.start + len(batch) * (rank + 1) // world_size
    return range(start, stop)
