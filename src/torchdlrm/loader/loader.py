"""Reads the batches of a dataset's split for this rank; a thread reads ahead.

Stages: row group on disk (Parquet) -> columns (Arrow) -> slice of this rank's rows (NumPy) -> `Batch` (torch).
Cost: a rank decodes every row group and copies only its own rows.
"""

import itertools
import queue
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import DatasetError
from torchdlrm.loader.batch import (
    Batch,
    RowGroup,
    batch_rows,
    epoch_order,
    num_batches,
    num_padding_rows,
    rank_rows,
    single_valued_kjt,
)


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
        max_rows: read only the first so many rows of the split.
        prefetch_batches: how many batches the reading thread keeps ready.
        pin_memory: hand out batches in page-locked memory, for a GPU.

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
        max_rows: int | None = None,
        prefetch_batches: int = 8,
        pin_memory: bool = False,
    ) -> None:
        if split not in dataset.splits or dataset.splits[split].rows == 0:
            there = ", ".join(f"{name} ({part.rows:,} rows)" for name, part in dataset.splits.items())
            msg = f"{dataset.path}: nothing to read in split {split!r}; the dataset has {there}"
            raise DatasetError(msg)
        self.rows = min(dataset.splits[split].rows, max_rows or dataset.splits[split].rows)
        self.batches_per_epoch = num_batches(self.rows, batch_size_global)
        self._reader = _RowGroupReader(dataset, split)
        self._batch_size_global = batch_size_global
        self._rank, self._world_size = rank, world_size
        self._epochs, self._seed = epochs, seed
        self._prefetch_batches, self._pin_memory = prefetch_batches, pin_memory
        self._first_epoch, self._first_batch = 0, 0

    def first_dense_rows(self) -> NDArray[np.float32]:
        """Dense features of the split's first row group, float32 [rows, num_dense]: a sample, the same on each rank."""
        group = self._reader.read(self._reader.row_groups[0])
        return np.array(group.dense, np.float32).reshape(len(group.dense), len(group.labels)).T

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Start behind the first `batches_consumed` batches of `epoch`, whatever the world size was that consumed them.

        The trainer knows the state: batches that were read ahead may not have been trained on.
        """
        self._first_epoch, self._first_batch = state["epoch"], state["batches_consumed"]

    def __iter__(self) -> Generator[Batch, None, None]:  # noqa: PYI058 - who stops early closes it
        return _read_ahead(self._batches(), depth=self._prefetch_batches)

    def _batches(self) -> Iterator[Batch]:
        for epoch in range(self._first_epoch, self._epochs):
            stream = _RowStream(self._reader, epoch_order(self._reader.row_groups, epoch=epoch, seed=self._seed))
            for index in range(self._first_batch if epoch == self._first_epoch else 0, self.batches_per_epoch):
                everyone = batch_rows(index, rows=self.rows, batch_size_global=self._batch_size_global)
                mine = rank_rows(everyone, rank=self._rank, world_size=self._world_size)
                num_padding = num_padding_rows(everyone, rank=self._rank, world_size=self._world_size)
                labels_B, dense, kjt = stream.read(mine, num_padding=num_padding)
                batch = Batch(
                    dense_features=torch.from_numpy(dense),
                    sparse_features=kjt,
                    labels=torch.from_numpy(labels_B),
                    loss_weight=len(mine) * self._world_size / len(everyone),
                    num_padding=num_padding,
                )
                yield batch.pin_memory() if self._pin_memory else batch


class _IdColumn:
    """The ids of one feature in one row group.

    Attributes:
        values: int32, the ids of all rows one after the other.
        offsets: where each row's ids begin, int [n + 1]; None when every row has exactly one.
    """

    def __init__(self, column: Any) -> None:
        array = column.combine_chunks()
        self.offsets: NDArray[Any] | None = None
        if pa.types.is_list(array.type):
            self.offsets = array.offsets.to_numpy()
            array = array.values
        self.values: NDArray[np.int32] = array.to_numpy(zero_copy_only=False)

    def part(self, rows: slice) -> tuple[NDArray[np.int32], NDArray[np.int32] | None]:
        """The ids of these rows, and how many each row has (None for one each)."""
        if self.offsets is None:
            return self.values[rows], None
        offsets = self.offsets[rows.start : rows.stop + 1]
        return self.values[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int32)

    def row_of(self, position: int) -> int:
        """The row that the id at this position of `values` belongs to."""
        return position if self.offsets is None else int(np.searchsorted(self.offsets, position, side="right")) - 1


class _Columns:
    """The rows of one row group: labels [n], and a column for each dense and each sparse feature."""

    def __init__(self, table: Any, dataset: Dataset) -> None:
        self.labels: NDArray[Any] = table.column(dataset.label_name).to_numpy()
        self.dense = [table.column(name).to_numpy() for name in dataset.dense_names]
        self.ids = [_IdColumn(table.column(name)) for name in dataset.sparse_names]

    def outside(self, num_embeddings: Mapping[str, int]) -> tuple[str, int, int] | None:
        """The first feature that has an id outside its table, with that id and its row in the group; None is well."""
        for column, (name, rows) in zip(self.ids, num_embeddings.items(), strict=True):
            values = column.values
            if values.size and not 0 <= values.min() <= values.max() < rows:
                position = int(np.argmax((values < 0) | (values >= rows)))
                return name, int(values[position]), column.row_of(position)
        return None


class _RowGroupReader:
    """Opens the files of a split and decodes their row groups."""

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._dataset = dataset
        self._paths = [file.path for file in dataset.splits[split].files]
        self._num_embeddings = dataset.num_embeddings
        self._open: tuple[int, Any] | None = None
        self.num_dense, self.feature_names = len(dataset.dense_names), dataset.sparse_names
        self.row_groups: list[RowGroup] = []
        for file_index, path in enumerate(self._paths):
            try:
                metadata = pq.read_metadata(path)
            except (OSError, ValueError) as error:
                msg = f"{path}: cannot be read: {error}; run dlrm preprocess again"
                raise DatasetError(msg) from error
            self.row_groups += [
                RowGroup(file_index, group, metadata.row_group(group).num_rows)
                for group in range(metadata.num_row_groups)
            ]

    def read(self, where: RowGroup) -> _Columns:
        path = self._paths[where.file_index]
        if self._open is None or self._open[0] != where.file_index:
            self._open = (where.file_index, pq.ParquetFile(path, page_checksum_verification=True))
        try:
            # One thread: this already runs during the step, which wants the other cores.
            table = self._open[1].read_row_group(where.group_index, use_threads=False)
        except OSError as error:
            msg = f"{path}: row group {where.group_index} is damaged: {error}"
            raise DatasetError(msg) from error
        columns = _Columns(table, self._dataset)
        # Checksums hold only what preprocessing wrote, and files may come from elsewhere. FBGEMM would read and write
        # past the end of the table: a crash, or worse, none. 26 columns of a row group take a few milliseconds.
        found = columns.outside(self._num_embeddings)
        if found is not None:
            feature, value, row = found
            msg = (
                f"{path}: row group {where.group_index}, row {row}: {feature} has the id {value}, but its table has "
                f"{self._num_embeddings[feature]:,} rows (ids from 0, num_embeddings in dataset.json); run dlrm "
                "preprocess again"
            )
            raise DatasetError(msg)
        return columns


class _RowStream:
    """Row groups as one stream of rows; ranges must be read in rising order."""

    def __init__(self, reader: _RowGroupReader, order: Sequence[RowGroup]) -> None:
        self._reader = reader
        self._order = order
        self._starts = np.concatenate([[0], np.cumsum([group.rows for group in order])])
        self._current: tuple[int, _Columns] | None = None

    def read(
        self, rows: range, *, num_padding: int
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], KeyedJaggedTensor]:
        """Labels [B], dense features [B, num_dense] and ids (F keys, stride B) of these rows of the stream and padding.

        Args:
            rows: of the stream.
            num_padding: rows of zeros and without ids behind them; with them they are B.
        """
        labels_B = np.empty(len(rows) + num_padding, dtype=np.float32)
        dense = np.empty((len(rows) + num_padding, self._reader.num_dense), dtype=np.float32)
        labels_B[len(rows) :], dense[len(rows) :] = 0, 0
        pieces: list[list[tuple[NDArray[np.int32], NDArray[np.int32] | None]]] = []
        position = rows.start
        while position < rows.stop:
            index = int(np.searchsorted(self._starts, position, side="right")) - 1
            if self._current is None or self._current[0] != index:
                self._current = (index, self._reader.read(self._order[index]))
            group = self._current[1]
            stop = min(rows.stop, int(self._starts[index + 1]))
            source = slice(position - int(self._starts[index]), stop - int(self._starts[index]))
            target = slice(position - rows.start, stop - rows.start)
            labels_B[target] = group.labels[source]
            for column, values in enumerate(group.dense):
                dense[target, column] = values[source]
            pieces.append([column.part(source) for column in group.ids])
            position = stop
        kjt = _to_kjt(self._reader.feature_names, pieces, num_rows=len(rows), num_padding=num_padding)
        return labels_B, dense, kjt


def _to_kjt(
    feature_names: Sequence[str], pieces: Sequence[Sequence[tuple[Any, Any]]], *, num_rows: int, num_padding: int
) -> KeyedJaggedTensor:
    """Pieces of row groups, each with (ids, lengths) of every feature -> one KJT of int64 ids, copied once."""
    by_feature = [[piece[feature] for piece in pieces] for feature in range(len(feature_names))]
    if all(lengths is None for parts in by_feature for _, lengths in parts):
        ids_FB = np.empty((len(feature_names), num_rows), dtype=np.int64)
        for feature, parts in enumerate(by_feature):
            np.concatenate([ids for ids, _ in parts] or [ids_FB[feature]], out=ids_FB[feature], casting="safe")
        return single_valued_kjt(feature_names, ids_FB, num_padding)
    lengths: list[NDArray[np.int32]] = []
    for parts in by_feature:
        lengths += [np.ones(len(ids), dtype=np.int32) if counts is None else counts for ids, counts in parts]
        lengths.append(np.zeros(num_padding, dtype=np.int32))
    length_per_key = [sum(len(ids) for ids, _ in parts) for parts in by_feature]
    return KeyedJaggedTensor(
        keys=list(feature_names),
        values=torch.from_numpy(np.concatenate([ids for parts in by_feature for ids, _ in parts], dtype=np.int64)),
        lengths=torch.from_numpy(np.concatenate(lengths)),
        stride=num_rows + num_padding,
        length_per_key=length_per_key,
        offset_per_key=[0, *itertools.accumulate(length_per_key)],
    )


def _read_ahead(batches: Iterator[Batch], *, depth: int) -> Generator[Batch, None, None]:
    """The same batches, made by a thread that is up to `depth` ahead; its errors arrive here."""
    ready: queue.Queue[Batch | BaseException | None] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(item: Batch | BaseException | None) -> None:
        while not stopped.is_set():
            with suppress(queue.Full):  # look again whether anybody still wants it
                ready.put(item, timeout=0.1)
                return

    def produce() -> None:
        try:
            for batch in batches:
                put(batch)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            put(error)

    thread = threading.Thread(target=produce, name="torchdlrm-loader", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
