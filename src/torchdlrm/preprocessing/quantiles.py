"""Fits quantiles, which make buckets of a feature's numbers, exactly and in bounded memory.

In: the files of chunks, whose values are counted.  Out: the boundaries between buckets, of the training rows alone.

    sort_values     the numbers of a range in the training rows, in their order
    fit_quantiles   the ranges of a feature -> the boundaries of its buckets
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.data.splits import RowSplit
from torchdlrm.features.columns import SparseColumn
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.jobs.work_folder import Result, WorkFolder
from torchdlrm.jobs.workers import Task, Workers
from torchdlrm.preprocessing.count import ValueRange, summed, training_values
from torchdlrm.preprocessing.read import ChunkFile
from torchdlrm.storage.mirror import fetch


def fit_boundaries(
    ranges: Mapping[str, Sequence[ValueRange]],
    chunks: Sequence[ChunkFile],
    split: RowSplit,
    work: WorkFolder,
    workers: Workers,
) -> dict[str, list[float]]:
    """The boundaries of each feature, whose values are in these ranges."""
    numbers = {
        name: [work.pieces / "counts" / f"{values.name}-numbers" for values in found] for name, found in ranges.items()
    }
    tasks = [
        Task(f"sort-{values.name}", sort_values, (values, chunks, split, target))
        for name, found in ranges.items()
        for values, target in zip(found, numbers[name], strict=True)
    ]
    list(workers.run(tasks, work))
    tasks = [
        Task(f"quantiles-{name}", fit_quantiles, (found[0].column, numbers[name])) for name, found in ranges.items()
    ]
    return {name: result["boundaries"] for name, result in zip(ranges, workers.run(tasks, work), strict=True)}


def sort_values(values: ValueRange, chunks: Sequence[ChunkFile], split: RowSplit, target: Path) -> Result:
    """Task: the numbers of a range in the training rows, ascending, and `rows`: how many have it or a smaller one."""
    dtype = values.column.value_kind.dtype
    frames = [pl.DataFrame(schema={"value": dtype, "count": pl.Int64}), *training_values(values, chunks, split)]
    # + 0 makes 0.0 of -0.0, which falls in the same bucket.
    numbers = summed(pl.concat(frames).with_columns(pl.col("value") + 0)).filter(pl.col("value").is_not_null())
    del frames
    found = numbers.sort("value").select("value", rows=pl.col("count").cum_sum()).collect()
    write_sections(target, {"numbers": found.rechunk().to_arrow()}.items())  # in one piece, as it is searched
    return {"values": found.height}


def fit_quantiles(column: SparseColumn, numbers: Sequence[Path]) -> Result:
    """Task: the boundaries between quantiles of the training rows' numbers, of which there are n.

    Boundary k of q quantiles is the number at place floor(k * n / q), from 0, of the numbers in their order.  Equal
    ones are one, and the smallest number is none: no training row would be in the bucket below it.  `numbers` are what
    `sort_values` wrote, a file for each range, which is searched where it is, on the disk.
    """
    assert column.buckets is not None, "the caller saw to it"
    assert column.buckets.quantiles is not None, "the caller saw to it"
    tables = [table for path in numbers if (table := Sections(fetch(path)).table("numbers")).num_rows]
    if not tables:
        return {"boundaries": []}
    quantiles, num_rows = column.buckets.quantiles, sum(table["rows"][-1].as_py() for table in tables)
    places = np.array([k * num_rows // quantiles for k in range(1, quantiles)], np.int64)
    values = [table["value"].chunk(0).to_numpy() for table in tables]
    found = _numbers_at(places, values, [table["rows"].chunk(0).to_numpy() for table in tables])
    smallest = min(ascending[0] for ascending in values)
    return {"boundaries": [number for number in np.unique(found).tolist() if number > smallest]}


def _numbers_at(
    places: npt.NDArray[np.int64], values: Sequence[npt.NDArray[Any]], rows: Sequence[npt.NDArray[np.int64]]
) -> npt.NDArray[Any]:
    """The numbers at these places, from 0, [Q], in the order of all rows' numbers: bisected, all at a time.

    `values` are int64 or float64, each ascending; `rows`: for each number, how many rows of its array have it or a
    smaller one.
    """
    dtype = values[0].dtype
    ends = np.array([min(found[0] for found in values), max(found[-1] for found in values)], dtype)
    low, high = (np.full(len(places), key) for key in _ascending_keys(ends.view(np.int64), dtype))
    while (low < high).any():
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, of numbers whose sum may not fit
        numbers = _ascending_keys(middle, dtype).view(dtype)
        num_up_to = np.zeros(len(places), np.int64)
        for found, rows_up_to in zip(values, rows, strict=True):
            count = np.searchsorted(found, numbers, side="right")
            num_up_to += np.where(count > 0, rows_up_to[np.maximum(count - 1, 0)], 0)
        is_enough = num_up_to > places
        low, high = np.where(is_enough, low, middle + 1), np.where(is_enough, middle, high)
    return _ascending_keys(high, dtype).view(dtype)


def _ascending_keys(bits: npt.NDArray[np.int64], dtype: np.dtype[Any]) -> npt.NDArray[np.int64]:
    """The bits of numbers changed so that they ascend as the numbers do; and back."""
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits) if dtype.kind == "f" else bits
