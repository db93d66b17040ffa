"""Counts the values of the training rows, gives the values of each chunk their ids, and sums numbers exactly.

These work on a range of the partitions of one sparse feature, so that memory holds its values; between them
`torchdlrm.preprocessing.vocabularies` gives ids to values:

    spread_values    the vocabulary of another dataset -> its part in each range
    training_counts  the values of a range in all chunks -> value, count of the training rows
    look_up_values   the values of a range in all chunks, again -> their ids, chunk after chunk

and `sum_moments` on the dense columns of one chunk.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.splits import RowSplit
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.transforms import DenseTransform, Moments
from torchdlrm.features.vocabulary import UNKNOWN_ID, rank_counts, typed_values
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.jobs.work_folder import Result
from torchdlrm.preprocessing.read import ChunkFile, partitions_of, stored_categories
from torchdlrm.storage.mirror import fetch
from torchdlrm.storage.reading import read_each


@dataclass(frozen=True)
class ValueRange:
    """The partitions `start` to `end` of a feature's values; the last range of a feature ends it.

    Values that other columns share are counted together: `sharing` are these columns.
    """

    column: SparseColumn
    index: int
    start: int
    end: int
    sharing: tuple[SparseColumn, ...] = ()

    @property
    def name(self) -> str:
        """A name for files and tasks."""
        return f"{self.column.name}-{self.index:03d}"

    def of_chunk(self, sections: Sections, column: SparseColumn) -> tuple[pa.Table, slice]:
        """All values of a column of a chunk, and where among them those of this range stand."""
        table = sections.table(f"values/{column.name}")
        if f"bounds/{column.name}" not in sections:
            return table, slice(0, table.num_rows)
        starts = sections.table(f"bounds/{column.name}")["start"]
        return table, slice(starts[self.start].as_py(), starts[self.end].as_py())


def training_counts(values: ValueRange, chunks: Sequence[ChunkFile], split: RowSplit) -> pl.DataFrame:
    """The values of a range in the training rows, each once, and their counts (Int64)."""
    frames = [pl.DataFrame(schema={"value": values.column.vocabulary_dtype, "count": pl.Int64})]
    for frame in training_values(values, chunks, split):
        if values.column.needs_fit:  # memory holds a few buckets, but not the numbers of all chunks
            buckets = frame.with_columns(stored_categories(frame["value"], values.column))
            frames.append(summed(buckets).collect())
        else:
            frames.append(frame)
    return summed(pl.concat(frames)).collect()


def training_values(values: ValueRange, chunks: Sequence[ChunkFile], split: RowSplit) -> Iterator[pl.DataFrame]:
    """For each chunk value and count (Int64, of its training rows) of the values of a range, column after column."""

    def read(chunk: ChunkFile) -> pl.DataFrame:
        sections, frames = Sections(chunk.path), []
        for column in (values.column, *values.sharing):
            table, here = values.of_chunk(sections, column)
            frame = pl.DataFrame(table[here])
            if chunk.rows_of_split[0] < chunk.num_rows:
                counts = _counts_of_chunk(column, chunk, split, sections, table.num_rows)
                frame = frame.with_columns(pl.Series("count", counts[here]))
            frames.append(frame.with_columns(pl.col("count").cast(pl.Int64)))
        return pl.concat(frames)

    return read_each([chunk for chunk in chunks if chunk.rows_of_split[0]], read)


def summed(frame: pl.DataFrame) -> pl.LazyFrame:
    """The values of training rows, each once with its count."""
    return frame.lazy().filter(pl.col("count") > 0).group_by("value").agg(pl.col("count").sum())


def _counts_of_chunk(
    column: SparseColumn, chunk: ChunkFile, split: RowSplit, sections: Sections, num_values: int
) -> npt.NDArray[np.int64]:
    """How many training rows (values, where there are several in a row) of a chunk have each value: int64 [D]."""
    is_train = chunk.split_of_rows(split, sections) == 0
    codes = sections.table(f"rows/{column.name}")[column.name].to_numpy()
    if column.is_multi_valued:
        is_train = np.repeat(is_train, codes)
        codes = sections.table(f"codes/{column.name}")["code"].to_numpy()
    return np.bincount(codes[is_train], minlength=num_values)


def in_order(tables: Sequence[pl.DataFrame], values_at_a_time: int) -> Iterator[list[slice]]:
    """Slices of the tables, each sorted by falling count and rising value, that together follow that same order."""
    counts = [table["count"].to_numpy() for table in tables]
    histogram: dict[int, int] = {}
    for column in counts:
        for count, number in zip(*np.unique(column, return_counts=True), strict=True):
            histogram[int(count)] = histogram.get(int(count), 0) + int(number)
    starts = [0] * len(tables)
    gathered = 0
    falling = sorted(histogram, reverse=True)
    for i, count in enumerate(falling):
        gathered += histogram[count]
        if i + 1 < len(falling) and gathered + histogram[falling[i + 1]] <= values_at_a_time:
            continue
        ends = [int(np.searchsorted(-column, -count, side="right")) for column in counts]
        if histogram[count] == gathered > values_at_a_time:
            yield from by_value(tables, starts, ends, -(-gathered // values_at_a_time))
        else:
            yield [slice(start, end) for start, end in zip(starts, ends, strict=True)]
        starts, gathered = ends, 0


def by_value(
    tables: Sequence[pl.DataFrame], starts: Sequence[int], ends: Sequence[int], num_pieces: int
) -> Iterator[list[slice]]:
    """Cut slices that are sorted by value at the same values; one table alone is a fair sample of all."""
    values = [table["value"][start:end] for table, start, end in zip(tables, starts, ends, strict=True)]
    sample = max((column.drop_nulls() for column in values), key=len)
    num_pieces = num_pieces if len(sample) else 1  # a null alone
    pivots = [sample[i * len(sample) // num_pieces] for i in range(1, num_pieces)]
    # A null sorts first and takes one place.
    edges = [
        [start + column.null_count() + int(column.drop_nulls().search_sorted(pivot)) for pivot in pivots]
        for column, start in zip(values, starts, strict=True)
    ]
    for piece in range(num_pieces):
        yield [
            slice(edge[piece - 1] if piece else start, edge[piece] if piece < num_pieces - 1 else end)
            for edge, start, end in zip(edges, starts, ends, strict=True)
        ]


def ranked(tables: Sequence[pl.DataFrame], slices: Sequence[slice]) -> pl.DataFrame:
    """What the tables have in these slices, and the number of the table of each row, in the order of ids."""
    rows = pl.concat(
        table[rows].with_columns(pl.lit(i, pl.Int32).alias("table"))
        for i, (table, rows) in enumerate(zip(tables, slices, strict=True))
    )
    return rank_counts(rows) if len(tables) > 1 else rows


def look_up_values(values: ValueRange, chunks: Sequence[ChunkFile], ids: Path, target: Path) -> Result:
    """Task: the ids of a range's values in all chunks: `ids` int32, and where each chunk starts among them: `start`."""
    frames = [pl.DataFrame(schema={"value": values.column.vocabulary_dtype})]
    starts = [0]

    def read(chunk: ChunkFile) -> pl.Series:
        sections = Sections(chunk.path)
        table, here = values.of_chunk(sections, values.column)
        return stored_categories(pl.Series("value", table[here]["value"]), values.column)

    for found in read_each(chunks, read):
        frames.append(found.to_frame())
        starts.append(starts[-1] + len(found))
    table = pl.DataFrame(Sections(ids).table("ids").select(["value", "id"]))
    looked_up = (
        pl.concat(frames)
        .lazy()
        .join(table.lazy(), on="value", how="left", nulls_equal=True, maintain_order="left")
        .select(pl.col("id").fill_null(UNKNOWN_ID))
        .collect()
    )
    write_sections(target, {"ids": looked_up["id"].to_numpy(), "start": np.array(starts, np.int64)}.items())
    return {"values": starts[-1]}


def spread_values(
    column: SparseColumn,
    file: Path,
    columns: Sequence[str],
    section: str,
    ranges: Sequence[ValueRange],
    targets: Sequence[Path],
    num_partitions: int,
) -> Result:
    """Task: a vocabulary of another dataset, or its candidates -> `section`, the columns that it has of each range."""
    pieces: list[list[pl.DataFrame]] = [[] for _ in ranges]
    for piece in _read_values(file, column):
        partitions = partitions_of(piece["value"], num_partitions)
        there = [name for name in columns if name in piece.columns]
        for values, found in zip(ranges, pieces, strict=True):
            mask = pl.Series((partitions >= values.start) & (partitions < values.end))
            found.append(piece.filter(mask).select(there))
    for found, target in zip(pieces, targets, strict=True):
        write_sections(target, {section: pl.concat(found).to_arrow()}.items())
    return {}


def _read_values(path: Path, column: SparseColumn) -> Iterator[pl.DataFrame]:
    """The rows of a file of values, a row group at a time; of an empty one, none."""
    file = pq.ParquetFile(fetch(path), page_checksum_verification=True)
    for group in range(file.num_row_groups):
        yield typed_values(pl.DataFrame(file.read_row_group(group)), column.vocabulary_kind)
    if not file.num_row_groups:
        yield typed_values(pl.DataFrame(file.schema_arrow.empty_table()), column.vocabulary_kind)


def sum_moments(chunk: ChunkFile, split: RowSplit, transforms: Mapping[str, type[DenseTransform]]) -> Result:
    """Task: the exact sums of dense columns over the training rows of a chunk, as each transform's `fit` needs them."""
    names = list(transforms)
    found = {name: Moments() for name in names}
    if chunk.rows_of_split[0]:
        sections = Sections(chunk.path)
        rows = sections.table("rows")
        frame = pl.DataFrame(rows.select(list(names))).filter(pl.Series(chunk.split_of_rows(split, sections) == 0))
        for name, transform in transforms.items():
            if transform.needs_moments:
                found[name].add(frame[name])
            elif frame[name].null_count():
                found[name].num_missing += frame[name].null_count()
            else:
                fitted = transform.fit(None)
                found[name].add(frame.select(fitted.expression(name)).to_series(), has_squares=False)
    return {
        name: [moments.count, str(moments.total), str(moments.total_of_squares), moments.num_missing]
        for name, moments in found.items()
    }


def add_moments(total: dict[str, Moments], result: dict[str, Any]) -> None:
    """Add the sums that a task found."""
    for name, (count, values, squares, num_missing) in result.items():
        total[name].count += count
        total[name].total += Fraction(values)
        total[name].total_of_squares += Fraction(squares)
        total[name].num_missing += num_missing
