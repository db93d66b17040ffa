"""Stores a vocabulary as a hash table on disk: looks up single ids in microseconds, shared by all processes.

In: a `Vocabulary`.  Out: a file, and a `ValueIndex` over it that gives the same ids as `Vocabulary.lookup`.

The file is an Arrow IPC file of one record batch whose rows are the slots of the table, 2 for each value.  A value
stands in the slot that its hash points to, or behind it in the first one that was free (linear probing); so a lookup
starts at that slot and ends at the value or at an empty slot.  Nothing is compressed: the file is mapped into memory as
it is, and only the pages that are met become resident.

| column | type | holds |
| --- | --- | --- |
| key | uint32, int64 or uint64 | the value (hex, int), or the 64-bit hash of a text |
| id | int32 | the value's id; 0 in an empty slot |
| text | large_string | the text itself, where the kind is `string`: equal hashes are no equal texts |
"""

import struct
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from torchdlrm.errors import DatasetError
from torchdlrm.features.kinds import KINDS, SparseKindName
from torchdlrm.features.value_hash import hash_number, hash_numbers, hash_text, hash_values
from torchdlrm.features.vocabulary import UNKNOWN_ID, Vocabulary
from torchdlrm.files import replacing

FORMAT_VERSION = 1
_ARROW_TYPES = {
    "key": (pa.uint32(), pa.int64(), pa.uint64()),
    "id": (pa.int32(),),
    "text": (pa.large_string(),),
}
_MAGIC, _MAGIC_BYTES = b"ARROW1", 8
_SLOTS_PER_VALUE = 2
# Of half-empty slots a run of hundreds is not to be expected. A run of this length takes two milliseconds to walk.
_MAX_RUN = 65_536
_CHECKED_SLOTS = 1 << 22
# Up to this many rows plain Python is faster than some dozen calls of NumPy, or of Arrow for texts.
_FEW_NUMBERS, _FEW_TEXTS = 32, 64
# A probe of many rows looks at one slot first, since most end there; of fewer rows at several, to need fewer calls.
_MANY_ROWS, _NARROW, _WIDE = 4_096, 1, 8


def write_index(vocabulary: Vocabulary, path: Path) -> None:
    """Write the hash table of a vocabulary; the file is written atomically, its bytes depend on the values alone.

    Costs 16 bytes a value of disk (hex), 24 (int), or 40 and the text (string), and some five times that of memory.
    """
    values, ids = vocabulary.table["value"], vocabulary.table["id"]
    has_value = values.is_not_null()
    batch, num_home_slots = _slots(values.filter(has_value), ids.filter(has_value).to_numpy(), vocabulary.kind)
    about = {
        "format": "torchdlrm-value-index",
        "format_version": str(FORMAT_VERSION),
        "kind": vocabulary.kind,
        "missing_id": str(vocabulary.missing_id or UNKNOWN_ID),
        "num_home_slots": str(num_home_slots),
    }
    schema = batch.schema.with_metadata(about)
    with (
        replacing(path) as temporary,
        pa.OSFile(str(temporary), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        writer.write_batch(batch.cast(schema))


def _slots(
    values: pl.Series, value_ids: npt.NDArray[np.int32], kind_name: SparseKindName
) -> tuple[pa.RecordBatch, int]:
    """The hash table of some values, none of them null, and in how many of its slots searches begin."""
    kind = KINDS[kind_name]
    hashes = hash_values(values)
    num_home_slots = num_slots = _SLOTS_PER_VALUE * len(values) + 1
    home = _home_slots(hashes, num_slots)
    order = np.lexsort((hashes, home))
    # Each value in its own slot, or in the first one behind that is free: the running maximum carries what is taken.
    rows = np.arange(len(values))
    slots = np.maximum.accumulate(home[order] - rows) + rows
    num_slots = max(num_slots, int(slots[-1]) + 2) if len(slots) else num_slots  # the last slot stays empty
    keys = np.zeros(num_slots, kind.key_type)
    keys[slots] = (hashes if kind.is_text else values.to_numpy())[order]
    ids = np.zeros(num_slots, np.int32)
    ids[slots] = value_ids[order]
    columns = {"key": pa.array(keys), "id": pa.array(ids)}
    if kind.is_text:
        places = np.full(num_slots, -1, np.int64)
        places[slots] = order
        text = values.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_string())
        columns["text"] = text.take(pa.array(places, mask=places < 0)).fill_null("")
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns)), num_home_slots


class ValueIndex:
    """Ids of the values of a sparse feature, out of mapped memory; safe to use from many threads.

    Attributes:
        missing_id: of a missing value; 0 where it has none of its own.
    """

    def __init__(
        self, batch: pa.RecordBatch, kind: SparseKindName, missing_id: int, num_home_slots: int, longest_bytes: int
    ) -> None:
        self._longest_bytes = longest_bytes  # of its texts: a longer one is not worth hashing
        self.missing_id = missing_id
        self._num_home_slots = num_home_slots
        self._keys: npt.NDArray[np.integer] = batch.column("key").to_numpy()
        self._ids: npt.NDArray[np.int32] = batch.column("id").to_numpy()
        self._texts: pa.LargeStringArray | None = batch.column("text") if KINDS[kind].is_text else None
        # Reading an element of a memoryview takes a third of the time that it takes of an array.
        self._key_at, self._id_at = memoryview(self._keys), memoryview(self._ids)

    @classmethod
    def open(cls, path: Path, *, kind: SparseKindName, num_ids: int) -> Self:
        """Map the file into memory, after one pass over it: whatever it holds, a lookup ends, and with an id.

        Args:
            path: written by `write_index`.
            kind: the kind of the values that will be looked up.
            num_ids: ids are below it.

        Raises:
            DatasetError: the file is missing, damaged, of another version, or of another kind of values.
        """
        try:
            batch, about = _read(path)
            names = ["key", "id", "text"] if KINDS[kind].is_text else ["key", "id"]
            if about["format_version"] != str(FORMAT_VERSION) or about["kind"] != kind or batch.schema.names != names:
                found = f"version {about['format_version']}, of values of kind {about['kind']}"
                msg = f"{path}: an index of {found}; expected version {FORMAT_VERSION}, kind {kind}; export again"
                raise DatasetError(msg)
            missing_id, num_home_slots = int(about["missing_id"]), int(about["num_home_slots"])
            if not 0 <= missing_id < num_ids:
                raise ValueError(f"the id of a missing value is {missing_id} of {num_ids}")
            passed_over = _read(path)[0]  # in a mapping whose pages do not stay resident
            _check(passed_over, kind, num_ids, num_home_slots)
            longest_bytes = _longest_bytes(passed_over.column("text")) if KINDS[kind].is_text else 0
        except (OSError, pa.ArrowException, StopIteration, struct.error, KeyError, ValueError) as error:
            if isinstance(error, DatasetError):
                raise
            msg = f"{path}: the index of a vocabulary cannot be read ({error}); copy or export it again"
            raise DatasetError(msg) from error
        return cls(batch, kind, missing_id, num_home_slots, longest_bytes)

    @classmethod
    def of(cls, values: pl.Series, ids: npt.NDArray[np.int32], kind: SparseKindName, missing_id: int) -> Self:
        """An index in memory of its own.

        Args:
            values: of that kind, all different, none null.
            ids: of each, int32.
            kind: of the values.
            missing_id: of a missing value.
        """
        batch, num_home_slots = _slots(values, ids, kind)
        longest_bytes = _longest_bytes(batch.column("text")) if KINDS[kind].is_text else 0
        return cls(batch, kind, missing_id, num_home_slots, longest_bytes)

    @property
    def size_bytes(self) -> int:
        """Of the hash table."""
        texts = 0 if self._texts is None else self._texts.nbytes
        return self._keys.nbytes + self._ids.nbytes + texts

    def lookup(self, values: pl.Series) -> pl.Series:
        """The id of each value: Int32, 0 for a value without one; the name of `values`.

        Args:
            values: UInt32 (hex), Int64 (int) or String, nullable, B rows.
        """
        if len(values) <= (_FEW_NUMBERS if self._texts is None else _FEW_TEXTS):
            return pl.Series(values.name, [self.id_of(value) for value in values.to_list()], pl.Int32)
        if self._texts is not None:
            return pl.Series(values.name, self._ids_of_texts(values, self._texts))
        array = values.rechunk().to_arrow()
        start, width = array.offset, self._keys.dtype.itemsize
        # The buffer itself, null or not: filling nulls would cost more than finding the ids of some hundred rows.
        numbers = np.frombuffer(array.buffers()[1], self._keys.dtype, len(array), start * width)
        is_missing = array.is_null().to_numpy(zero_copy_only=False) if array.null_count else None
        return pl.Series(values.name, self.ids_of_numbers(numbers, is_missing))

    def ids_of_numbers(
        self, numbers: npt.NDArray[np.integer], is_missing: npt.NDArray[np.bool_] | None = None
    ) -> npt.NDArray[np.int32]:
        """The id of each number: int32 [B].

        Args:
            numbers: uint32 (hex) or int64 (int), [B].
            is_missing: where there is none, whatever stands in its place, [B]; None: nowhere.
        """
        ids, _ = self._find(numbers, hash_numbers(numbers.astype(np.int64)))
        if is_missing is not None:
            ids[is_missing] = self.missing_id
        return ids

    def _ids_of_texts(self, values: pl.Series, texts: pa.LargeStringArray) -> npt.NDArray[np.int32]:
        """Every distinct text is hashed and compared once: int32 [B]."""
        encoded = pc.dictionary_encode(values.to_arrow(compat_level=pl.CompatLevel.oldest()), null_encoding="encode")
        wanted = encoded.dictionary.cast(pa.large_string())
        offsets = np.frombuffer(wanted.buffers()[1], np.int64)[wanted.offset : wanted.offset + len(wanted) + 1]
        is_long = np.diff(offsets) > self._longest_bytes
        if has_long := is_long.any():
            wanted = pc.if_else(pa.array(is_long), "", wanted)
        hashes = hash_values(pl.Series(wanted))
        ids, slots = self._find(hashes, hashes)
        found = np.flatnonzero(ids)
        same = pc.equal(texts.take(pa.array(slots[found])), wanted.take(pa.array(found)))
        for i in found[~pc.fill_null(same, fill_value=False).to_numpy(zero_copy_only=False)]:
            ids[i] = self.id_of(wanted[int(i)].as_py())
        if has_long:
            ids[is_long] = UNKNOWN_ID
        if wanted.null_count:
            ids[wanted.is_null().to_numpy(zero_copy_only=False)] = self.missing_id
        return ids[encoded.indices.to_numpy()]

    def _find(
        self, keys: npt.NDArray[np.integer], hashes: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """The first slot of each key, or the empty one where its search ended, and the id there: int32, int64 [B]."""
        slots = _home_slots(hashes, self._num_home_slots)
        ids = np.empty(len(keys), np.int32)
        places: npt.NDArray[np.int64] | slice = slice(None)  # of the rows that are still searched
        starts, wanted = slots, keys
        width = _NARROW if len(keys) >= _MANY_ROWS else _WIDE
        while True:
            window = starts[:, None] + np.arange(width)
            ids_here = self._ids.take(window, mode="clip")
            # An empty slot holds the key 0, and to find it is right too: its id says unknown.
            ends = (self._keys.take(window, mode="clip") == wanted[:, None]) | (ids_here == UNKNOWN_ID)
            first = ends.argmax(axis=1)
            rows = np.arange(len(starts))
            ids[places] = ids_here[rows, first]
            slots[places] = np.minimum(starts + first, len(self._ids) - 1)
            rest = np.flatnonzero(~ends[rows, first])
            if not len(rest):
                return ids, slots
            places = rest if isinstance(places, slice) else places[rest]
            starts, wanted = starts[rest] + width, wanted[rest]
            width = max(_WIDE, 2 * width)

    def id_of(self, value: int | str | None) -> int:
        """The id of one value, in a microsecond; None is a missing one."""
        if value is None:
            return self.missing_id
        if isinstance(value, str) and len(value) > self._longest_bytes:
            return UNKNOWN_ID
        hashed = hash_text(value) if isinstance(value, str) else hash_number(value)
        key = hashed if isinstance(value, str) else value
        slot = (hashed >> 32) * self._num_home_slots >> 32
        while (found := self._id_at[slot]) != UNKNOWN_ID:
            if self._key_at[slot] == key and (self._texts is None or self._texts[slot].as_py() == value):
                return found
            slot += 1
        return UNKNOWN_ID


def _read(path: Path) -> tuple[pa.RecordBatch, dict[str, str]]:
    """The record batch of an index, mapped and as yet unchecked, and what its schema says about it."""
    with pa.memory_map(str(path), "r") as file:
        if file.size() < 2 * _MAGIC_BYTES or file.read_at(len(_MAGIC), file.size() - len(_MAGIC)) != _MAGIC:
            raise ValueError("it has no end")
        _check_messages(file)
        file.seek(_MAGIC_BYTES)  # what follows is a stream, which also says all that the footer does
        with pa.ipc.open_stream(file) as reader:
            schema = reader.schema
            if any(field.type not in _ARROW_TYPES.get(field.name, ()) for field in schema):
                raise ValueError(f"it has the columns {schema.names} of {schema.types}")
            batch = reader.read_next_batch()
    return batch, {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}


def _check_messages(file: pa.MemoryMappedFile) -> None:
    """See that Arrow will unpack nothing, which could get any size: that the record batch names no compression.

    Arrow does not tell; the place is that of its format (Message.fbs).
    """
    schema, start = _message(file, _MAGIC_BYTES)
    body = schema.field(schema.root, 3)
    if body is not None and struct.unpack_from("<q", schema.data, body)[0]:
        raise ValueError("its schema has a body")
    batch, _ = _message(file, start)
    header = batch.field(batch.root, 2)
    if header is None or batch.field(batch.follow(header), 3) is not None:
        raise ValueError("it is compressed")


def _message(file: pa.MemoryMappedFile, start: int) -> tuple["_Flatbuffer", int]:
    """The metadata of the message that begins at a byte of the file, and where the next one does if it has no body."""
    marker, length = struct.unpack("<Ii", file.read_at(8, start))
    if marker != 0xFFFFFFFF or not 0 <= length <= file.size() - start:
        raise ValueError("it is no stream of messages")
    return _Flatbuffer(file.read_at(length, start + 8)), start + 8 + length


class _Flatbuffer:
    """Finds fields of tables in a flatbuffer; raises ValueError or struct.error where they are outside of it."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.root = self.follow(0)

    def follow(self, place: int) -> int:
        """Where the table begins whose offset stands at a place."""
        return place + int(struct.unpack_from("<I", self.data, place)[0])

    def field(self, table: int, number: int) -> int | None:
        """Where a field of a table stands; None where it is left out."""
        places = table - struct.unpack_from("<i", self.data, table)[0]
        if places < 0:
            raise ValueError("a table without places")
        place = 4 + 2 * number
        if place >= struct.unpack_from("<H", self.data, places)[0]:
            return None
        offset = int(struct.unpack_from("<H", self.data, places + place)[0])
        return table + offset if offset else None


def _check(batch: pa.RecordBatch, kind: SparseKindName, num_ids: int, num_home_slots: int) -> None:
    """See that lookups in an index stay inside of it, and end; raises ValueError, or what Arrow finds."""
    batch.validate(full=True)
    ids: npt.NDArray[np.int32] = batch.column("id").to_numpy()
    keys = batch.column("key").to_numpy()
    if keys.dtype != KINDS[kind].key_type or any(column.null_count for column in batch.columns):
        raise ValueError("its keys are of another type, or missing")
    if not 1 <= num_home_slots <= len(ids) or ids[-1] != UNKNOWN_ID:
        raise ValueError(f"{len(ids)} slots, the last of them taken, or {num_home_slots} to begin at")
    run = 0  # of slots without an empty one, which a lookup may have to walk
    for start in range(0, len(ids), _CHECKED_SLOTS):
        part = ids[start : start + _CHECKED_SLOTS]
        empty = np.flatnonzero(part == UNKNOWN_ID)
        edges = np.concatenate([[-1 - run], empty])
        run = int(len(part) - 1 - edges[-1])
        longest = max(int(np.diff(edges).max(initial=0)), run)
        if part.min() < 0 or part.max() >= num_ids or longest > _MAX_RUN:
            msg = f"ids from {part.min()} to {part.max()} of {num_ids}, {longest:,} slots in a row without an empty one"
            raise ValueError(msg)


def _longest_bytes(texts: pa.LargeStringArray) -> int:
    pieces = (texts.slice(start, _CHECKED_SLOTS) for start in range(0, len(texts), _CHECKED_SLOTS))
    return max((pc.max(pc.binary_length(piece)).as_py() for piece in pieces), default=0)


def _home_slots(hashes: npt.NDArray[np.uint64], num_slots: int) -> npt.NDArray[np.int64]:
    """The slot that each hash points to, from 0 to `num_slots` - 1: int64 [B]."""
    assert num_slots < 2**32, "a vocabulary has fewer than 2^31 values"
    return ((hashes >> np.uint64(32)) * np.uint64(num_slots) >> np.uint64(32)).astype(np.int64)
