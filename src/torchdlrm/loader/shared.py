"""Lets the ranks of one host decode each row group once between them, into memory that all of them can read.

In: the row groups that these ranks will read, in order.  Out: columns, views of the memory of the rank that decoded
them.  Cost: one copy of what is decoded, and on each rank memory for two row groups.

Of n ranks each decodes every n-th row group, ahead of its own reading, into slots of its own memory, and says how far
it is: what it has decoded, and which row group it reads. A slot is filled again when all have read past what is in it.
No rank depends on another: one that does not get a row group in time, because its owner is dead, has stopped or found
it damaged, decodes it for itself. So an error is the same on every rank, and at the row where it was without sharing.

Why: docs/decisions/ranks-of-a-host-decode-for-each-other.md.
"""

import mmap
import os
import struct
import threading
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import accumulate, groupby, islice
from operator import itemgetter
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from torchdlrm.loader.batch import BatchSequence, rank_rows
from torchdlrm.loader.row_groups import Columns, IdColumn, RowGroupReader
from torchdlrm.shared_memory import FIRST_FREE_BYTE, Address, AllGather, SharedMemory

_NUM_SLOTS = 2
# Waiting costs a look each so often: decoding takes some milliseconds, and what is decoded lasts for several.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0005, 0.004
_LOOK_FOR_THE_DEAD_EVERY_S = 0.1
_PATIENCE_S = 2.0
_FINISHED = 2**62
_HEADER_BYTES, _ALIGNMENT = 4096, 64


def share(
    reader: RowGroupReader,
    sequence: BatchSequence,
    all_gather: AllGather,
    *,
    rank: int,
    world_size: int,
    stopped: threading.Event,
) -> "SharedRowGroups | None":
    """Agree with the other ranks of this host on who decodes what of these batches; every rank must call this.

    Returns:
        None where this rank is alone on its host, or its ranks cannot open each other's memory.
    """
    layout = _Layout(reader)
    mine = _Memory.make("torchdlrm-loader", layout.num_bytes)
    addresses: Sequence[Address | None] = all_gather(mine.address if mine is not None else None)
    local = [
        other
        for other, address in enumerate(addresses)
        if mine is not None and address is not None and address.host == mine.address.host
    ]
    memories = [
        mine if other == rank else _Memory.open(address, layout.num_bytes, writable=False)
        for other, address in enumerate(addresses)
        if address is not None and other in local
    ]
    is_ready = all_gather(len(local) > 1 and None not in memories)
    if mine is None or not all(is_ready[other] for other in local):
        for memory in memories:
            if memory is not None:
                memory.close()
        return None
    return SharedRowGroups(
        reader,
        mine,
        [memory for memory in memories if memory is not None],
        layout,
        local.index(rank),
        partial(_row_groups_of, reader, sequence, local[0], local[-1], world_size),
        stopped,
    )


def _row_groups_of(
    reader: RowGroupReader, sequence: BatchSequence, first_rank: int, last_rank: int, world_size: int
) -> Iterator[tuple[int, int]]:
    """Epoch, and place in its order, of every row group that these ranks or one between them will read, once each."""
    for epoch, batches in groupby(sequence, key=itemgetter(0)):
        starts = [0, *accumulate(group.rows for group in reader.order(epoch))]
        done = 0
        for _, everyone in batches:
            start = rank_rows(everyone, rank=first_rank, world_size=world_size).start
            stop = rank_rows(everyone, rank=last_rank, world_size=world_size).stop
            if start < stop:
                end = bisect_left(starts, stop)
                for index in range(max(done, bisect_right(starts, start) - 1), end):
                    yield epoch, index
                done = end


class SharedRowGroups:
    """Row groups of which this rank decodes some; inside `with` a thread does so.

    Args:
        reader: decodes them.
        mine: the memory of this rank.
        memories: of all ranks that share, this one too.
        layout: of each memory.
        place: of this rank among them.
        row_groups: lists, from the start at each call, what they will read, as epoch and place in its order.
        stopped: set when no more is wanted.
    """

    def __init__(
        self,
        reader: RowGroupReader,
        mine: "_Memory",
        memories: Sequence["_Memory"],
        layout: "_Layout",
        place: int,
        row_groups: Callable[[], Iterator[tuple[int, int]]],
        stopped: threading.Event,
    ) -> None:
        self._reader, self._mine, self._memories, self._place = reader, mine, memories, place
        self._slots = [[layout.slot(memory.map, number) for number in range(_NUM_SLOTS)] for memory in memories]
        self._row_groups, self._stopped = row_groups, stopped
        self._places = enumerate(row_groups())
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._decode_ahead, name="torchdlrm-decoder", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
        for memory in self._memories:
            memory.close()

    def read(self, epoch: int, index: int) -> Columns:
        """The row group at a place of an epoch's order, good until the next one is asked for; places must rise.

        Raises:
            DatasetError: it is damaged, or an id is outside its table.
        """
        place = next(place for place, where in self._places if where == (epoch, index))
        self._mine.position = place
        turn, owner = divmod(place, len(self._memories))
        if self._wait_for(self._memories[owner], turn):
            return self._slots[owner][turn % _NUM_SLOTS].first_rows(self._reader.order(epoch)[index].rows)
        return self._reader.read(epoch, index)

    def _wait_for(self, owner: "_Memory", turn: int) -> bool:
        """Wait until a rank has decoded its row group number `turn`; False when it will not, or is late."""
        started_s = time.monotonic()
        for is_time_to_look in _pauses():
            if owner.num_decoded > turn:
                return True
            is_late = time.monotonic() - started_s > _PATIENCE_S
            if self._stopped.is_set() or is_late or owner.has_stopped or (is_time_to_look and not owner.is_alive):
                return owner.num_decoded > turn
        raise AssertionError

    def _decode_ahead(self) -> None:
        reader = self._reader.another()
        num_ranks = len(self._memories)
        try:
            for place, (epoch, index) in enumerate(self._row_groups()):
                turn, owner = divmod(place, num_ranks)
                if owner != self._place:
                    continue
                if not self._wait_until_all_are_past(place - num_ranks * _NUM_SLOTS):
                    return
                self._slots[self._place][turn % _NUM_SLOTS].fill(reader.read(epoch, index))
                self._mine.num_decoded = turn + 1
        except Exception:  # noqa: BLE001 - who needs this row group decodes it for itself, and has the same error
            return
        finally:
            self._mine.has_stopped = True

    def _wait_until_all_are_past(self, place: int) -> bool:
        """Wait until no rank will read the row group at `place`; False when no more is wanted."""
        late = list(self._memories)
        for is_time_to_look in _pauses():
            late = [memory for memory in late if memory.position <= place]
            if is_time_to_look:
                late = [memory for memory in late if memory.is_alive]
            if not late or self._stopped.is_set():
                return not self._stopped.is_set()
        raise AssertionError


def _pauses() -> Iterator[bool]:
    """Sleeps between looks, longer and longer; says whether it is time to look who is dead."""
    pause_s, looked_s = _FIRST_PAUSE_S, time.monotonic()
    yield False
    while True:
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        is_time_to_look = time.monotonic() - looked_s > _LOOK_FOR_THE_DEAD_EVERY_S
        yield is_time_to_look
        if is_time_to_look:
            looked_s = time.monotonic()


class _Number:
    """A number in the header of a memory, this many bytes behind its begin."""

    def __init__(self, offset: int) -> None:
        self._first_byte = FIRST_FREE_BYTE + offset

    def __get__(self, memory: "_Memory", _: type) -> int:
        return struct.unpack("=q", os.pread(memory.fd, 8, self._first_byte))[0]

    def __set__(self, memory: "_Memory", number: int) -> None:
        os.pwrite(memory.fd, struct.pack("=q", number), self._first_byte)


class _Memory(SharedMemory):
    """The memory of one rank, which that rank alone writes.

    Its header is read and written by system calls: they also keep the order of what is written before and after them
    on processors that would change it.

    Attributes:
        num_decoded: how many of its row groups the rank has decoded.
        has_stopped: whether no more are coming.
        position: the place that the rank reads; it is past all before.
    """

    num_decoded, has_stopped, position = _Number(0), _Number(8), _Number(16)

    @property
    def is_alive(self) -> bool:
        """Whether the rank's process is there."""
        try:
            os.kill(self.address.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def close(self) -> None:
        """Close the file; the rank that writes it says before that it reads no more and decodes no more.

        That is one step and not two objects' work: an iterator of which no batch was ever taken ends with its last
        reference, and Python ends objects that refer to each other in an order of its own.
        """
        if self.writable and self.fd >= 0:
            self.position, self.has_stopped = _FINISHED, True
        super().close()


class _Layout:
    """How a memory is divided: a header, then slots, each with the columns of a row group one after the other.

    Attributes:
        num_bytes: size of a memory.
    """

    def __init__(self, reader: RowGroupReader) -> None:
        self._reader = reader
        most_rows = max(group.rows for group in reader.row_groups)
        # Labels, weights if there are some, dense features, vectors; then ids, offsets and weights of those in lists.
        numbers_a_row = [reader.num_labels, *[1] * (reader.has_row_weights + reader.num_dense), *reader.vector_sizes]
        lengths = [most_rows * numbers for numbers in numbers_a_row]
        self._num_floats = len(lengths)
        self._kinds = [*zip(reader.most_ids(), reader.has_weights, strict=True)]
        for most, has_weights in self._kinds:
            lengths += [most_rows] if most is None else [most, most_rows + 1, *[most] * has_weights]
        self._lengths, self._starts = lengths, [0, *accumulate(map(_aligned_bytes, lengths))]
        self.num_bytes = _HEADER_BYTES + _NUM_SLOTS * self._starts[-1]

    def slot(self, memory: mmap.mmap, number: int) -> "_Slot":
        """Views of a slot's arrays."""
        first = _HEADER_BYTES + number * self._starts[-1]
        arrays: Iterator[NDArray[Any]] = (
            np.frombuffer(memory, np.float32 if place < self._num_floats else np.int32, length, first + start)
            for place, (length, start) in enumerate(zip(self._lengths, self._starts, strict=False))
        )
        labels, row_weights = next(arrays), next(arrays) if self._reader.has_row_weights else None
        labels = labels if self._reader.num_labels == 1 else labels.reshape(-1, self._reader.num_labels)
        dense = list(islice(arrays, self._reader.num_dense))
        vectors = [next(arrays).reshape(-1, size) for size in self._reader.vector_sizes]
        ids = [
            IdColumn(
                next(arrays),
                None if most is None else next(arrays),
                next(arrays).view(np.float32) if has_weights else None,
            )
            for most, has_weights in self._kinds
        ]
        return _Slot(Columns(labels, dense, ids, row_weights, vectors))


def _aligned_bytes(num_elements: int) -> int:
    """Bytes of this many elements of 4 bytes, in whole cache lines."""
    return -(-4 * num_elements // _ALIGNMENT) * _ALIGNMENT


class _Slot(NamedTuple):
    """Room for a row group, as long as the longest."""

    columns: Columns

    def fill(self, given: Columns) -> None:
        """Copy a row group into it."""
        for room, values in zip(_arrays(self.columns), _arrays(given), strict=True):
            np.copyto(room[: len(values)], values, casting="unsafe")

    def first_rows(self, num_rows: int) -> Columns:
        """The row group in it."""
        row_weights = self.columns.row_weights
        return Columns(
            self.columns.labels[:num_rows],
            [values[:num_rows] for values in self.columns.dense],
            [
                IdColumn(column.values[:num_rows], None)
                if column.offsets is None
                else IdColumn(column.values, column.offsets[: num_rows + 1], column.weights)
                for column in self.columns.ids
            ],
            None if row_weights is None else row_weights[:num_rows],
            [vectors[:num_rows] for vectors in self.columns.vectors],
        )


def _arrays(columns: Columns) -> list[NDArray[Any]]:
    """Of a row group, in the order of a slot."""
    ids = [part for column in columns.ids for part in (column.values, column.offsets, column.weights)]
    return [
        part
        for part in (columns.labels, columns.row_weights, *columns.dense, *columns.vectors, *ids)
        if part is not None
    ]
