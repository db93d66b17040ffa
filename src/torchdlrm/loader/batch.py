"""Defines batches: which rows each holds, and the form in which the model receives them.

An epoch is one stream of rows: the row groups of a split one after the other.  Epoch 0 has the dataset's own order
(training rows are shuffled on disk); later epochs permute the row groups.  Batch k is rows [k * B, (k + 1) * B) of the
stream whatever the world size, and rank r reads the r-th contiguous slice of it.

B rows of the batch on this rank, F sparse features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor


@dataclass
class Batch(TorchRecBatch):  # type: ignore[misc]
    """TorchRec's batch and one field more.

    Attributes:
        dense_features: float32 [B, num_dense_features].
        sparse_features: KJT of F keys in schema order, values int64, stride B.
        labels: float32 [B].
        loss_weight: B times the world size over the rows of the global batch: 1 unless the slices differ in size.
    """

    loss_weight: float = 1.0

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":  # noqa: FBT001, FBT002
        """Copy the batch to `device`."""
        return self._with_parts(lambda part: part.to(device=device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU can fetch while it computes."""
        return self._with_parts(lambda part: part.pin_memory())

    def _with_parts(self, function: Callable[[Any], Any]) -> "Batch":
        return Batch(
            function(self.dense_features), function(self.sparse_features), function(self.labels), self.loss_weight
        )


@lru_cache(maxsize=8)
def _ones_and_offsets(num_values: int) -> tuple[Tensor, Tensor]:
    """Lengths and offsets of a KJT with one value in each cell; batches of the same size share them, read-only."""
    return torch.ones(num_values, dtype=torch.int32), torch.arange(num_values + 1, dtype=torch.int32)


def single_valued_kjt(feature_names: Sequence[str], ids_FB: NDArray[np.int64]) -> KeyedJaggedTensor:
    """A KJT in which every feature of every row has exactly one id.

    Args:
        feature_names: the F keys.
        ids_FB: int64 [F, B], contiguous; its memory is shared.
    """
    num_features, num_rows = ids_FB.shape
    lengths, offsets = _ones_and_offsets(num_features * num_rows)
    return KeyedJaggedTensor(
        keys=list(feature_names),
        values=torch.from_numpy(ids_FB).view(-1),
        lengths=lengths,
        offsets=offsets,
        stride=num_rows,
    )


@dataclass(frozen=True)
class RowGroup:
    """A row group of a file of the split."""

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
