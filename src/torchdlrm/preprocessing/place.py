"""Computes the position in the log, and the split, of each chunk's rows, once all chunks are read.

In: the rows of each chunk, the schema's rule.  Out: a `RowSplit` and a `ChunkFile` for each chunk.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from torchdlrm.data.splits import (
    RandomSplit,
    RowSplit,
    TimeSplit,
    check_split,
    criteo_split,
    folder_split,
    order_split,
)
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.jobs.sections import Sections
from torchdlrm.logs.files import LogFile
from torchdlrm.preprocessing.read import TIME, ChunkFile

Times = Callable[[], Iterator[npt.NDArray[np.int64]]]


def place_chunks(
    files: Sequence[LogFile],
    rows_of_files: Sequence[int],
    chunks: Sequence[tuple[Path, int]],
    schema: FeatureSchema,
    seed: int,
) -> tuple[RowSplit, list[ChunkFile]]:
    """Decide the split of a log whose chunks are given as file and rows.

    Raises:
        LogError: a split has no rows.
    """
    split = _choose_split(files, rows_of_files, [path for path, _ in chunks], schema, seed)
    placed = []
    first_row, before = 0, (0, 0, 0)
    for path, num_rows in chunks:
        times = _read_times(path) if isinstance(split, TimeSplit) else None
        train, val, test = np.bincount(split.split_of_rows(first_row, num_rows, times), minlength=3).tolist()
        placed.append(ChunkFile(path, first_row, num_rows, before, (train, val, test)))
        first_row += num_rows
        before = (before[0] + train, before[1] + val, before[2] + test)
    check_split(schema.split, before)
    return split, placed


def _choose_split(
    files: Sequence[LogFile], rows_of_files: Sequence[int], chunks: Sequence[Path], schema: FeatureSchema, seed: int
) -> RowSplit:
    rule, num_rows = schema.split, sum(rows_of_files)
    if rule.rule == "criteo":
        return criteo_split(files, rows_of_files)
    if rule.rule == "folder":
        return folder_split(files, rows_of_files)
    if rule.rule == "order":
        return order_split(num_rows, rule)
    if rule.rule == "random":
        return RandomSplit(rule.val, rule.test, seed)
    assert schema.time is not None, "the schema was checked"
    val_rows, test_rows = round(num_rows * rule.val), round(num_rows * rule.test)
    test_from = smallest(lambda: map(_read_times, chunks), num_rows - test_rows) if test_rows else None
    val_from = smallest(lambda: map(_read_times, chunks), num_rows - test_rows - val_rows) if val_rows else None
    return TimeSplit(schema.time, val_from, test_from)


def smallest(numbers: Times, rank: int) -> int:
    """The number at place `rank`, from 0, of all numbers in rising order: 16 bits a pass, whatever their number."""
    found = 0
    for shift in (48, 32, 16, 0):
        counts = np.zeros(1 << 16, np.int64)
        for column in numbers():
            # With the sign flipped, unsigned numbers stand in the same order.
            bits = column.view(np.uint64) ^ np.uint64(1 << 63)
            same = bits if shift == 48 else bits[bits >> np.uint64(shift + 16) == np.uint64(found)]
            digits = (same >> np.uint64(shift)) & np.uint64(0xFFFF)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << 16)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, rank, side="right"))
        rank -= int(ends[digit - 1]) if digit else 0
        found = (found << 16) | digit
    return found - (1 << 63)


def _read_times(path: Path) -> npt.NDArray[np.int64]:
    sections = Sections(path)
    return sections.table("time")[TIME].to_numpy()
