"""Reads the batches of a dataset's split for this rank; a thread reads ahead.

Stages: row group on disk (Parquet) -> columns (`row_groups.py`) -> slice of the rank (NumPy) -> `Batch` (torch).
Cost: a rank decodes every row group that has rows of its own and copies those; ranks of one host that can talk to each
other decode each row group once between them (`shared.py`).
"""

import itertools
import queue
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from operator import itemgetter

import numpy as np
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.features.tables import FeatureTable, sources
from torchdlrm.loader.batch import (
    Batch,
    BatchSequence,
    num_batches,
    num_padding_rows,
    rank_rows,
    single_valued_kjt,
)
from torchdlrm.loader.row_groups import Columns, IdColumn, RowGroupReader
from torchdlrm.loader.shared import share
from torchdlrm.shared_memory import AllGather
from torchdlrm.toml import did_you_mean


class Loader:
    """Iterates over the batches of one or more epochs, any number of times; from where `load_state_dict` has put it.

    In a process of its own, `for batch in Loader(dataset, "train")` reads the whole split.

    Args:
        dataset: an encoded dataset.
        split: `train`, `val` or `test`.
        batch_size_global: rows per batch over all ranks.
        rank: this process.
        world_size: number of processes.
        epochs: passes over the split.
        seed: of the order of row groups in later epochs.
        tables: of the model that the batches are for (`ModelShape.tables`), in which a feature may have several keys;
            None: every feature has its own name as its key.
        max_rows: read only the first `max_rows` rows of the split.
        prefetch_batches: how many batches the reading thread keeps ready.
        pin_memory: hand out batches in page-locked memory, for a GPU.
        all_gather: a function that gives every rank's value to every rank, in a list by rank. With it the ranks of one
            host decode each row group once between them. Then all must begin to iterate at the same point of their
            programs, as with any collective, and take their batches at about the same pace.

    Raises:
        DatasetError: the split is not there, or holds no rows, or a file of it cannot be read; while iterating, also
            when a row group is damaged or an id is outside its table.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        *,
        batch_size_global: int = 2048,
        rank: int = 0,
        world_size: int = 1,
        epochs: int = 1,
        seed: int = 0,
        tables: Sequence[FeatureTable] | None = None,
        max_rows: int | None = None,
        prefetch_batches: int = 8,
        pin_memory: bool = False,
        all_gather: AllGather | None = None,
    ) -> None:
        if split not in dataset.splits or dataset.splits[split].rows == 0:
            there = ", ".join(f"{name} ({part.rows:,} rows)" for name, part in dataset.splits.items())
            msg = f"{dataset.path}: nothing to read in split {split!r}; the dataset has {there}"
            msg += did_you_mean(split, dataset.splits)
            raise DatasetError(msg)
        self.rows = min(dataset.splits[split].rows, max_rows or dataset.splits[split].rows)
        self.batches_per_epoch = num_batches(self.rows, batch_size_global)
        self._reader = RowGroupReader(dataset, split, seed=seed)
        names = dataset.sparse_names
        self._keys = list(names) if tables is None else [table.key for table in tables]
        self._sources = None if tables is None else sources(tables, names)
        self._batch_size_global = batch_size_global
        self._rank, self._world_size = rank, world_size
        self._epochs, self._all_gather = epochs, all_gather
        self._prefetch_batches, self._pin_memory = prefetch_batches, pin_memory
        self._first_epoch, self._first_batch = 0, 0

    def first_dense_rows(self) -> NDArray[np.float32]:
        """Dense features of the split's first row group, float32 [rows, num_dense]: a sample, the same on each rank."""
        group = self._reader.read(0, 0)
        return np.array(group.dense, np.float32).reshape(len(group.dense), len(group.labels)).T

    def rows_of(self, rank: int) -> Iterator[range]:
        """The rows of the split that a rank has of each batch of an epoch."""
        for _, batch in BatchSequence(self.rows, self._batch_size_global, 0, 0, end_epoch=1):
            yield rank_rows(batch, rank=rank, world_size=self._world_size)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start behind the first `batches_consumed` batches of `epoch`, whatever the world size was that consumed them.

        The trainer knows the state: batches that were read ahead may not have been trained on.
        """
        self._first_epoch, self._first_batch = state["epoch"], state["batches_consumed"]

    def __iter__(self) -> Generator[Batch, None, None]:  # who stops early closes it
        sequence = BatchSequence(
            self.rows, self._batch_size_global, self._first_epoch, self._first_batch, end_epoch=self._epochs
        )
        stopped, shared = threading.Event(), None
        if self._all_gather is not None and self._world_size > 1:
            # Here and not when the first batch is asked for: that may happen in a thread, beside other exchanges.
            shared = share(
                self._reader,
                sequence,
                self._all_gather,
                rank=self._rank,
                world_size=self._world_size,
                stopped=stopped,
            )
        batches = self._batches(sequence, self._reader.read if shared is None else shared.read)
        return _read_ahead(
            batches,
            depth=self._prefetch_batches,
            stopped=stopped,
            decoding=shared or nullcontext(),
            gpu=torch.cuda.current_device() if self._pin_memory else None,
        )

    def _batches(self, sequence: BatchSequence, read_group: Callable[[int, int], Columns]) -> Iterator[Batch]:
        for epoch, batches in itertools.groupby(sequence, key=itemgetter(0)):
            num_rows = [group.rows for group in self._reader.order(epoch)]
            stream = _RowStream(partial(self._split, read_group, epoch), num_rows, self._keys)
            for _, everyone in batches:
                mine = rank_rows(everyone, rank=self._rank, world_size=self._world_size)
                num_padding = num_padding_rows(everyone, rank=self._rank, world_size=self._world_size)
                num_dense = self._reader.num_dense + sum(self._reader.vector_sizes)
                sizes = {"num_labels": self._reader.num_labels, "num_dense": num_dense}
                batch = stream.read(mine, **sizes, num_padding=num_padding)
                batch.loss_weight = len(mine) * self._world_size / len(everyone)
                yield batch.pin_memory() if self._pin_memory else batch

    def _split(self, read_group: Callable[[int, int], Columns], epoch: int, index: int) -> Columns:
        columns = read_group(epoch, index)
        return columns if self._sources is None else columns.of_keys(self._sources)


class _RowStream:
    """Row groups of an epoch as one stream of rows; ranges must be read in rising order.

    Args:
        read_group: gives the row group of a place in the epoch's order; what it gave before is not looked at again.
        num_rows: of each row group in that order.
        keys: of the KJT, one for each column of ids.
    """

    def __init__(self, read_group: Callable[[int], Columns], num_rows: Sequence[int], keys: Sequence[str]) -> None:
        self._read_group, self._keys = read_group, keys
        self._starts = [0, *itertools.accumulate(num_rows)]
        self._current: tuple[int, Columns] | None = None

    def read(self, rows: range, *, num_labels: int, num_dense: int, num_padding: int) -> Batch:
        """The B rows of a batch: these of the stream, and padding.

        Args:
            rows: of the stream.
            num_labels: that are learnt.
            num_dense: number of dense features, and of numbers of vectors.
            num_padding: rows of zeros and without ids behind them; with them they are B.
        """
        num_rows = len(rows) + num_padding
        labels = np.empty((num_rows, num_labels) if num_labels > 1 else num_rows, dtype=np.float32)
        dense = np.empty((num_rows, num_dense), dtype=np.float32)
        labels[len(rows) :], dense[len(rows) :] = 0, 0
        row_weights_B: NDArray[np.float32] | None = None
        ids = _Ids(len(self._keys), len(rows))
        for group, source, target in self._pieces(rows):
            labels[target] = group.labels[source]
            for column, values in enumerate(group.dense):
                dense[target, column] = values[source]
            begin = len(group.dense)
            for vectors in group.vectors:
                end = begin + vectors.shape[1]
                dense[target, begin:end], begin = vectors[source], end
            if group.row_weights is not None:
                row_weights_B = np.zeros(num_rows, np.float32) if row_weights_B is None else row_weights_B
                row_weights_B[target] = group.row_weights[source]
            ids.add(group.ids, source, target)
        return Batch(
            dense_features=torch.from_numpy(dense),
            sparse_features=ids.as_kjt(self._keys, num_padding),
            labels=torch.from_numpy(labels),
            num_padding=num_padding,
            row_weights=None if row_weights_B is None else torch.from_numpy(row_weights_B),
        )

    def _pieces(self, rows: range) -> Iterator[tuple[Columns, slice, slice]]:
        """Row groups that have some of these rows: which of the group's, and which of these."""
        position = rows.start
        while position < rows.stop:
            index = bisect_right(self._starts, position) - 1
            if self._current is None or self._current[0] != index:
                self._current = (index, self._read_group(index))
            start, end = self._starts[index : index + 2]
            stop = min(rows.stop, end)
            source, target = slice(position - start, stop - start), slice(position - rows.start, stop - rows.start)
            yield self._current[1], source, target
            position = stop


class _Ids:
    """Collects the ids of a batch as int64; those of features that have one in each row are copied once."""

    def __init__(self, num_features: int, num_rows: int) -> None:
        self._ids_FB = np.empty((num_features, num_rows), dtype=np.int64)
        self._lists: list[list[tuple[NDArray[np.int64], NDArray[np.int32]]]] = [[] for _ in range(num_features)]
        self._weights: list[list[NDArray[np.float32]]] = [[] for _ in range(num_features)]
        self._has_lists = self._has_weights = False

    def add(self, columns: Sequence[IdColumn], source: slice, target: slice) -> None:
        """Copy rows `source` of the columns as rows `target` of the batch; every call must be of the same kinds."""
        self._has_lists = any(column.offsets is not None for column in columns)
        self._has_weights = any(column.weights is not None for column in columns)
        for feature, column in enumerate(columns):
            if self._has_lists:
                self._lists[feature].append(column.part(source))
            else:
                self._ids_FB[feature, target] = column.values[source]
            if self._has_weights:
                self._weights[feature].append(column.weights_of(source))

    def as_kjt(self, feature_names: Sequence[str], num_padding: int) -> KeyedJaggedTensor:
        """All that was added, and rows without ids behind it.

        Where a feature has weights, the ids of others have the weight 1: TorchRec takes weights of all or of none.
        """
        num_rows = self._ids_FB.shape[1]
        if not self._has_lists:
            return single_valued_kjt(feature_names, self._ids_FB, num_padding)
        values = [ids for parts in self._lists for ids, _ in parts]
        none = np.zeros(num_padding, dtype=np.int32)
        lengths = [counts for parts in self._lists for counts in [*(counts for _, counts in parts), none]]
        length_per_key = [sum(len(ids) for ids, _ in parts) for parts in self._lists]
        return KeyedJaggedTensor(
            keys=list(feature_names),
            values=torch.from_numpy(np.concatenate(values)),
            weights=torch.from_numpy(np.concatenate(list(itertools.chain.from_iterable(self._weights))))
            if self._has_weights
            else None,
            lengths=torch.from_numpy(np.concatenate(lengths)),
            stride=num_rows + num_padding,
            length_per_key=length_per_key,
            offset_per_key=[0, *itertools.accumulate(length_per_key)],
        )


def _read_ahead(
    batches: Iterator[Batch],
    *,
    depth: int,
    stopped: threading.Event,
    decoding: AbstractContextManager[object],
    gpu: int | None,
) -> Generator[Batch, None, None]:
    """The same batches, made by a thread that is up to `depth` ahead; its errors arrive here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):  # look again whether it is still wanted
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)  # each thread begins with the first one, and would make a context there
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            put(error)

    thread = threading.Thread(target=produce, name="torchdlrm-loader", daemon=True)
    with decoding:
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            thread.join()
