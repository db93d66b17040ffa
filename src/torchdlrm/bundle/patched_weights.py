"""Puts the rows that a delta changed over a mapped weights file: the weights of its result, without a copy of the rest.

In: the weights of a bundle, and a delta to it.  Out: the same surface over another layout, and numbers of rows by which
the lookup kernel finds changed ones.

The kernel takes one address range, in which row i of a table lies i rows behind its first.  So a range is made that has
of each table the pages of the file, mapped as they are, and behind them memory of its own for changed rows:

    | pages of table 0 | its changed rows | pages of table 1 | its changed rows | ...

To the kernel changed rows are rows of the same table with larger numbers.  Memory is needed for the rows that changed
since the file was written, each once, whatever the number of deltas, and for finding them: 8 to 12 bytes a row.
Writing into private pages of the file instead would cost a page of 4,096 bytes a row.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchdlrm.bundle.delta import CHANGES_NAME, Delta, TableRecipe
from torchdlrm.bundle.delta_weights import changes, check_tables
from torchdlrm.bundle.weights_file import PADDING_BYTES, MappedWeights, TablePlace, WeightsLayout
from torchdlrm.errors import BundleError

_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
# Tables lie in the range as they do in the file but for multiples of this, so that its large pages are mapped as such.
_LARGE_PAGE_BYTES = 2 << 20
_PROT_NONE, _MAP_FIXED, _FAILED = 0, 0x10, ctypes.c_void_p(-1).value
# What spreads keys over 64 bits: 2^64 by the golden ratio.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# Of the filter of changed rows: one key in five to nine that is not changed is looked for among them in vain.
_SLOTS_PER_ROW = 4
_PIECE_ROWS = 4096

# The ids of T tables, [T, B] or of each table -> int64, as many.
RowNumbers = Callable[[NDArray[np.integer] | Sequence[NDArray[np.integer]]], NDArray[np.int64]]


@dataclass(frozen=True)
class _Table:
    """A table of which K rows are changed.

    Attributes:
        place: of its rows in the file and in the range.
        first_key: of its row 0, among the rows of all tables.
        first: which of all changed rows its first one is.
        count: K.
        first_number: by which the kernel finds its first changed row.
    """

    place: TablePlace
    first_key: int
    first: int
    count: int
    first_number: int

    @property
    def changed(self) -> slice:
        """Where its changed rows lie in the range."""
        start = self.place.start + self.first_number * self.place.row_bytes
        return slice(start, start + self.count * self.place.row_bytes)


class PatchedWeights(WeightsLayout):
    """The weights of a delta's result.

    Args:
        before: the weights of the delta's base, mapped or themselves patched: then their changed rows are copied.
        delta: what changed.

    Attributes:
        data: the range, uint8.  Not to be written to.
        num_rows: how many have changed since the file was written.

    Raises:
        BundleError: the delta is not to these weights, or says what cannot be.
    """

    def __init__(self, before: "MappedWeights | PatchedWeights", delta: Delta) -> None:
        check_tables(before, delta)
        self._file: MappedWeights = before if isinstance(before, MappedWeights) else before._file
        self._parts, ids = _read(delta)
        size_bytes = delta.manifest.weights.result_bytes
        super().__init__(delta.path / CHANGES_NAME, memoryview(self._parts.get(0, bytearray(8))), size_bytes)
        recipes = delta.manifest.weights.tables
        kept = {recipe.table: _changed_before(before, recipe) for recipe in recipes}
        ids = {name: np.union1d(kept[name], own) if len(kept[name]) else own for name, own in ids.items()}
        self._tables: dict[str, _Table] = {}
        self._arrange(before, delta, {name: len(own) for name, own in ids.items()})
        self.data = _range_of(self._file.file, self._tables.values())
        self.num_rows = sum(map(len, ids.values()))
        # Ends with a key that no row has, so that each search ends within.
        kind = np.uint32 if sum(recipe.num_rows for recipe in recipes) < 2**32 else np.uint64
        self._keys: NDArray[np.unsignedinteger] = np.full(self.num_rows + 1, np.iinfo(kind).max, kind)
        self._may_be_changed = np.zeros(1 << (_SLOTS_PER_ROW * self.num_rows).bit_length(), np.bool_)
        for name, own in ids.items():
            table = self._tables[name]
            for part in _pieces(table.count):
                keys = own[part].astype(np.int64) + table.first_key
                self._keys[table.first + part.start : table.first + part.start + len(keys)] = keys
                self._may_be_changed[_slots(keys, len(self._may_be_changed))] = True
        for name, own in kept.items():
            for part in _pieces(len(own)):
                assert isinstance(before, PatchedWeights), "a file has no changed rows"
                self._put(name, own[part], before._rows(name)[before._search(name, own[part])])
        for change in changes(delta):
            if not isinstance(change, bytes):
                self._put(change.recipe.table, change.ids, change.rows)

    @property
    def memory_bytes(self) -> int:
        """Of the changed rows and of what finds them."""
        rows = sum(table.count * table.place.row_bytes for table in self._tables.values())
        return rows + self._keys.nbytes + self._may_be_changed.nbytes

    def tensor(self, name: str) -> Tensor:
        """A copy of a tensor that is no table.

        Raises:
            BundleError: there is none of that name.
        """
        start, end = self._span_of(name)
        for first, part in self._parts.items():
            if first <= start and end <= first + len(part):
                return self._shaped(
                    name, torch.frombuffer(part, dtype=torch.uint8)[start - first : end - first].clone()
                )
        raise BundleError(f"{self.path}: tensor {name} is a table, or lies across one; the delta is damaged")

    def place(self, name: str) -> TablePlace:
        """Where the rows of a table are.

        Raises:
            BundleError: the delta has no such table.
        """
        if name not in self._tables:
            raise BundleError(f"{self.path}: {name} is no table of it; the delta is damaged")
        return self._tables[name].place

    def numbers(self, names: Sequence[str]) -> RowNumbers:
        """What gives, for ids of these T tables, the numbers of their rows in `data`, table by table."""
        keys_of_changed, may_be_changed = self._keys, self._may_be_changed
        tables = [self._tables[name] for name in names]
        first_keys = np.array([table.first_key for table in tables], np.int64)
        beyond = np.array([table.first_number - table.first for table in tables], np.int64)

        def find(ids_T: NDArray[np.integer] | Sequence[NDArray[np.integer]]) -> NDArray[np.int64]:
            if isinstance(ids_T, np.ndarray):
                numbers = ids_T.reshape(-1).astype(np.int64)
                keys = (ids_T + first_keys[:, None]).reshape(-1)
            else:
                numbers = np.concatenate(ids_T).astype(np.int64)
                keys = np.concatenate([ids + first for ids, first in zip(ids_T, first_keys, strict=True)])
            likely = np.flatnonzero(may_be_changed[_slots(keys, len(may_be_changed))])
            wanted = keys[likely].astype(keys_of_changed.dtype)
            found = np.searchsorted(keys_of_changed, wanted)
            is_changed = keys_of_changed[found] == wanted
            changed = likely[is_changed]
            if isinstance(ids_T, np.ndarray):
                table_of = changed // max(1, ids_T.shape[1])
            else:
                table_of = np.searchsorted(np.cumsum([len(ids) for ids in ids_T]), changed, side="right")
            numbers[changed] = found[is_changed] + beyond[table_of]
            return numbers

        return find

    def _arrange(self, before: "MappedWeights | PatchedWeights", delta: Delta, num_changed: dict[str, int]) -> None:
        """Say where the tables and their changed rows come to lie in the range."""
        start = first_key = first = position = 0
        for piece in delta.manifest.weights.pieces:
            if isinstance(piece, int):
                position += piece
                continue
            name, row_bytes, count = piece.table, piece.row_bytes, num_changed[piece.table]
            end = position + piece.num_rows * row_bytes
            if name in self._tables or name not in self.shapes or self.span(name) != (position, end):
                raise BundleError(f"{self.path}: {name} is not where its header says; the delta is damaged")
            position = end
            old = before.place(name) if piece.base_rows else TablePlace(0, 0, 0, row_bytes)
            start += (old.file_start - old.file_start % mmap.PAGESIZE - start) % _LARGE_PAGE_BYTES
            head = old.file_start % mmap.PAGESIZE
            place = TablePlace(start + head, old.file_start, old.file_rows, row_bytes)
            first_number = -(-(_mapped_bytes(place) - head) // row_bytes)
            table = _Table(place, first_key, first, count, first_number)
            self._tables[name] = table
            start = _whole_pages(table.changed.stop + PADDING_BYTES)
            first_key, first = first_key + piece.num_rows, first + count

    def _ids(self, name: str) -> NDArray[np.int32]:
        """Of a table's changed rows: int32 [K], ascending."""
        table = self._tables[name]
        keys = self._keys[table.first : table.first + table.count]
        return (keys - keys.dtype.type(table.first_key)).astype(np.int32)

    def _search(self, name: str, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """Which of a table's changed rows have these ids."""
        table = self._tables[name]
        keys = self._keys[table.first : table.first + table.count]
        return np.searchsorted(keys, (ids.astype(np.int64) + table.first_key).astype(keys.dtype))

    def _rows(self, name: str) -> NDArray[np.uint8]:
        """A table's changed rows: uint8 [K, row_bytes]."""
        table = self._tables[name]
        return self.data[table.changed].numpy().reshape(table.count, table.place.row_bytes)

    def _put(self, name: str, ids: NDArray[np.integer], rows: NDArray[np.uint8]) -> None:
        self._rows(name)[self._search(name, ids)] = rows


def _read(delta: Delta) -> tuple[dict[int, bytearray], dict[str, NDArray[np.int32]]]:
    """What is no table, in pieces that lie together, by where they begin; and the ids of each table's changed rows."""
    parts: dict[int, bytearray] = {}
    tables = delta.manifest.weights.tables
    ids = {recipe.table: np.empty(sum(recipe.changed_rows), np.int32) for recipe in tables}
    filled = dict.fromkeys(ids, 0)
    position, part = 0, bytearray()
    for change in changes(delta):
        if isinstance(change, bytes):
            part = parts.setdefault(position - len(part), part)
            part += change
            position += len(change)
        else:
            part, name, first = bytearray(), change.recipe.table, filled[change.recipe.table]
            filled[name] += len(change.ids)
            ids[name][first : filled[name]] = change.ids
            position += (change.stop - change.start) * change.recipe.row_bytes
    return parts, ids


def _changed_before(before: MappedWeights | PatchedWeights, recipe: TableRecipe) -> NDArray[np.int32]:
    """Ids of a table's rows that had changed already: they are copied, and replaced where they change again."""
    if isinstance(before, MappedWeights) or not recipe.base_rows:
        return np.empty(0, np.int32)
    ids = before._ids(recipe.table)
    return ids[ids < recipe.base_rows]


def _pieces(count: int) -> Iterator[slice]:
    """Slices of `count` rows, few at a time: the C library keeps for the thread what was taken at once."""
    for start in range(0, count, _PIECE_ROWS):
        yield slice(start, start + _PIECE_ROWS)


def _slots(keys: NDArray[np.int64], num_slots: int) -> NDArray[np.uint64]:
    """Where keys are in a filter of `num_slots` slots, a power of two."""
    spread: NDArray[np.uint64] = keys.view(np.uint64) * _FACTOR
    return spread >> np.uint64(65 - num_slots.bit_length())


def _whole_pages(num_bytes: int) -> int:
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE


def _mapped_bytes(place: TablePlace) -> int:
    """Of the pages in which the file has rows of a table."""
    return _whole_pages(place.file_start % mmap.PAGESIZE + place.file_rows * place.row_bytes) if place.file_rows else 0


def _range_of(file: int, tables: Iterable[_Table]) -> Tensor:
    """An address range with the pages of each table, and memory behind them; given back with its last user."""
    size_bytes = max((_whole_pages(table.changed.stop + PADDING_BYTES) for table in tables), default=mmap.PAGESIZE)
    # For pages that may not be touched no memory is accounted.
    anonymous = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    reserved = _map(None, size_bytes + _LARGE_PAGE_BYTES, _PROT_NONE, anonymous, -1, 0)
    start = reserved + -reserved % _LARGE_PAGE_BYTES
    memory = (ctypes.c_ubyte * size_bytes).from_address(start)
    weakref.finalize(memory, _LIBC.munmap, reserved, size_bytes + _LARGE_PAGE_BYTES).atexit = False
    for table in tables:
        head, mapped = table.place.file_start % mmap.PAGESIZE, _mapped_bytes(table.place)
        begin, end = start + table.place.start - head, start + _whole_pages(table.changed.stop + PADDING_BYTES)
        if mapped:
            _map(begin, mapped, mmap.PROT_READ, mmap.MAP_SHARED | _MAP_FIXED, file, table.place.file_start - head)
            _LIBC.madvise(begin, mapped, mmap.MADV_RANDOM)
        writable = mmap.PROT_READ | mmap.PROT_WRITE
        _map(begin + mapped, end - begin - mapped, writable, anonymous | _MAP_FIXED, -1, 0)
    return torch.frombuffer(memory, dtype=torch.uint8)


def _map(address: int | None, size_bytes: int, protection: int, flags: int, file: int, offset: int) -> int:
    found: int = _LIBC.mmap(address, size_bytes, protection, flags, file, offset)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, f"{size_bytes:,} bytes cannot be mapped: {os.strerror(number)}")
    return found
