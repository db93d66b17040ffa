"""Defines batches: which rows each holds, and the form in which the model receives them.

An epoch is one stream of rows: the row groups of a split one after the other.  Epoch 0 has the dataset's own order
(training rows are shuffled on disk); later epochs permute the row groups.  Batch k is rows [k * B, (k + 1) * B) of the
stream whatever the world size, and rank r reads the r-th contiguous slice of it. Slices that are a row short, where the
ranks do not divide the rows, end with a row of padding. Why: docs/decisions/batches-do-not-depend-on-the-world-size.md.

B rows of the batch on this rank, F sparse features.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_CPU = torch.device("cpu")


@dataclass
class Batch(TorchRecBatch):  # type: ignore[misc]
    """TorchRec's batch, its last rows perhaps padding.

    Every rank's slice of a batch has the same number of rows, whatever the batch has: collectives of tables that are
    cut by rows need that, and no kernel is asked for nothing. A row of padding has no ids, so it touches no table row;
    its dense features and its label are 0. `DLRMTrain` leaves it out of the loss and of what it predicts.

    Attributes:
        dense_features: float32 [B, num_dense_features], and behind them the vectors of each column that has some.
        sparse_features: KJT of F keys in schema order, values int64, stride B.
        labels: float32 [B]; of L labels that are learnt together [B, L].
        row_weights: float32 [B], 0 for padding: how much each row counts in the loss and in metrics; None where the
            dataset has no weights.
        loss_weight: rows that are no padding, times the world size, over the rows of the global batch: 1 unless the
            ranks have different numbers of them.
        num_padding: how many of the B rows, the last ones, are padding: 0 or 1, and 0 on a single rank.
    """

    loss_weight: float = 1.0
    num_padding: int = 0
    row_weights: Tensor | None = None

    def to(self, device: torch.device, non_blocking: bool = False) -> "Batch":  # noqa: FBT001, FBT002
        """Copy the batch to `device`."""
        return self._with_parts(lambda part: part.to(device=device, non_blocking=non_blocking), device)

    def pin_memory(self) -> "Batch":
        """A copy in page-locked memory, from which a GPU can fetch while it computes."""
        return self._with_parts(lambda part: part.pin_memory(), _CPU)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of all parts until what `stream` does with them is done."""
        super().record_stream(stream)
        if self.row_weights is not None:
            self.row_weights.record_stream(stream)

    def _with_parts(self, function: Callable[[Any], Any], device: torch.device) -> "Batch":
        kjt = self.sparse_features
        shape = (len(kjt.keys()), kjt.stride(), self.num_padding)
        if kjt.lengths_or_none() is _lengths_and_offsets(*shape, _CPU)[0]:
            # Shared by all batches of this shape, there as here: only the ids are new.
            moved = _with_one_id_a_cell(kjt.keys(), function(kjt.values()), *shape, device)
        else:
            moved = function(kjt)
        return Batch(
            function(self.dense_features),
            moved,
            function(self.labels),
            self.loss_weight,
            self.num_padding,
            None if self.row_weights is None else function(self.row_weights),
        )


@lru_cache(maxsize=32)
def _lengths_and_offsets(
    num_features: int, num_rows: int, num_padding: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Lengths and offsets of a KJT with one value in each cell; batches of the same shape share them, read-only."""
    if device != _CPU:
        # Not asynchronously: batches on all streams may use them from now on.
        lengths, offsets = _lengths_and_offsets(num_features, num_rows, num_padding, _CPU)
        return lengths.to(device), offsets.to(device)
    lengths_FB = torch.ones(num_features, num_rows, dtype=torch.int32)
    lengths_FB[:, num_rows - num_padding :] = 0
    lengths = lengths_FB.flatten()
    return lengths, torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])


def single_valued_kjt(
    feature_names: Sequence[str], ids_FB: NDArray[np.int64], num_padding: int = 0
) -> KeyedJaggedTensor:
    """A KJT in which every feature of every row has exactly one id, but for rows of padding, which have none.

    Args:
        feature_names: the F keys.
        ids_FB: int64 [F, B - num_padding], contiguous; its memory is shared.
        num_padding: rows without ids at the end.
    """
    num_features, num_rows = ids_FB.shape
    values = torch.from_numpy(ids_FB).view(-1)
    return _with_one_id_a_cell(feature_names, values, num_features, num_rows + num_padding, num_padding, _CPU)


def _with_one_id_a_cell(
    keys: Sequence[str], values: Tensor, num_features: int, num_rows: int, num_padding: int, device: torch.device
) -> KeyedJaggedTensor:
    lengths, offsets = _lengths_and_offsets(num_features, num_rows, num_padding, device)
    num_ids = num_rows - num_padding
    return KeyedJaggedTensor(
        keys=list(keys),
        values=values,
        lengths=lengths,
        offsets=offsets,
        stride=num_rows,
        # Without it, code that permutes or sends the KJT would have to ask the GPU.
        length_per_key=[num_ids] * num_features,
        offset_per_key=[num_ids * feature for feature in range(num_features + 1)],
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


@dataclass(frozen=True)
class BatchSequence:
    """The batches of some epochs.

    Attributes:
        rows: of an epoch.
        batch_size_global: rows of a batch over all ranks.
        first_epoch: with which it begins.
        first_batch: of the first epoch.
        end_epoch: before which it ends.
    """

    rows: int
    batch_size_global: int
    first_epoch: int
    first_batch: int
    end_epoch: int

    def __iter__(self) -> Iterator[tuple[int, range]]:
        """Epoch and rows of each batch."""
        for epoch in range(self.first_epoch, self.end_epoch):
            first = self.first_batch if epoch == self.first_epoch else 0
            for batch in range(first, num_batches(self.rows, self.batch_size_global)):
                yield epoch, batch_rows(batch, rows=self.rows, batch_size_global=self.batch_size_global)


def rank_rows(batch: range, *, rank: int, world_size: int) -> range:
    """The contiguous slice of a batch that `rank` reads; slices differ in size by one row at most."""
    start = batch.start + len(batch) * rank // world_size
    stop = batch.start + len(batch) * (rank + 1) // world_size
    return range(start, stop)


def num_padding_rows(batch: range, *, rank: int, world_size: int) -> int:
    """Rows that a rank's slice of a batch lacks to the longest one."""
    return -(-len(batch) // world_size) - len(rank_rows(batch, rank=rank, world_size=world_size))
