"""Runs tasks on vocabularies whose values come and go from one period of a log to the next.

A period (an hour, a day) is a number.  A value that was not seen in the training rows of so many periods loses its id;
one that has none gets one when it is frequent enough over some periods, the smallest free one first; and where there
are more values than a table may have rows, those that were seen last are kept.  An id never moves from a value to
another while both have one.  Like the tasks of `count`, these work on one sparse feature:

    update_values  a range of its values: those with ids, and the counts of others -> the same after this period
    assign_ids     all ranges -> the vocabulary, the ids that stand for another value than before, and the values that
                   are too rare so far; and for each range value, id
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.data.splits import RowSplit
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.vocabulary import (
    CANDIDATE_COLUMNS,
    PERIOD_COLUMNS,
    UNKNOWN_ID,
    ValuesWriter,
    rank_counts,
    write_rows,
)
from torchdlrm.files import replacing
from torchdlrm.preprocessing.count import ValueRange, by_value, in_order, ranked, read_section, training_counts
from torchdlrm.preprocessing.read import ChunkFile
from torchdlrm.preprocessing.work_folder import Result, write_sections


@dataclass(frozen=True)
class Period:
    """The number of a log's period, and by what rules values come and go in it.

    Attributes:
        number: of the period.
        expire_after: a value that was not seen in so many periods, this one included, loses its id; None: none does.
        admit_over: over so many periods, this one included, a value is counted until it has an id.
    """

    number: int
    expire_after: int | None
    admit_over: int


@dataclass(frozen=True)
class Known:
    """What a feature had before: the rows of its table, and how many values had ids."""

    num_embeddings: int = UNKNOWN_ID + 1
    num_values: int = 0


def update_values(
    values: ValueRange,
    chunks: Sequence[ChunkFile],
    split: RowSplit,
    min_count: int,
    known: Path | None,
    candidates: Path | None,
    period: Period,
    target: Path,
) -> Result:
    """Task: what a period's log makes of the values of a range.

    Args:
        values: the range.
        chunks: of the log.
        split: says which rows are for training.
        min_count: a value that is counted less often gets no id.
        known: the values of the range that have ids; `spread_values` wrote it.
        candidates: counts, by period, of values of the range that have none; likewise.
        period: the rules.
        target: the file to write: `kept`, the values that keep their ids, in the order of ids; `new`, those that are
            frequent enough for one, by falling count; `candidates`, the counts that the next period asks for of all
            values without ids, whether frequent enough or not.
    """
    counted = training_counts(values, chunks, split)
    before = _known_values(values.column, known, period)
    is_seen = pl.col("today").is_not_null()
    kept = before.join(counted.rename({"count": "today"}), on="value", how="left", nulls_equal=True).select(
        "value",
        pl.col("count") + pl.col("today").fill_null(0),
        "id",
        "first_period",
        pl.when(is_seen).then(pl.lit(period.number, pl.Int32)).otherwise("last_period").alias("last_period"),
    )
    if period.expire_after is not None:
        kept = kept.filter(period.number - pl.col("last_period") < period.expire_after)
    without = counted.join(before, on="value", how="anti", nulls_equal=True)
    counts = _counts_by_period(without, candidates, period)
    new = (
        counts.filter(pl.col("period") > period.number - period.admit_over)
        .group_by("value")
        .agg(pl.col("count").sum(), pl.col("period").min().alias("first_period"), pl.col("period").max())
        .filter((pl.col("count") >= min_count) & (pl.col("period") == period.number))
        .select("value", "count", "first_period")
    )
    still_asked = counts.filter(pl.col("period") > period.number + 1 - period.admit_over)
    write_sections(
        target,
        {
            "kept": kept.sort("id").to_arrow(),
            "new": rank_counts(new).to_arrow(),
            "candidates": still_asked.sort("value", "period").to_arrow(),
        },
    )
    return {"values": kept.height + new.height}


def _known_values(column: SparseColumn, known: Path | None, period: Period) -> pl.DataFrame:
    """The values that have ids; where nobody noted their periods, they were all seen in the one before."""
    if known is None:
        numbers = {name: pl.Int64 if name == "count" else pl.Int32 for name in PERIOD_COLUMNS[1:]}
        return pl.DataFrame(schema={"value": column.vocabulary_dtype, **numbers})
    found = pl.DataFrame(read_section(known, "ids"))
    if "last_period" in found.columns:
        return found
    before = pl.lit(period.number - 1, pl.Int32)
    return found.with_columns(first_period=before, last_period=before)


def _counts_by_period(counted: pl.DataFrame, candidates: Path | None, period: Period) -> pl.DataFrame:
    """value, period, count: of this period and of earlier ones, each value at most once for a period."""
    counts = counted.select("value", pl.lit(period.number, pl.Int32).alias("period"), "count")
    if candidates is None:
        return counts
    earlier = pl.DataFrame(read_section(candidates, "counts")).select(CANDIDATE_COLUMNS)
    return pl.concat([earlier, counts]).group_by("value", "period").agg(pl.col("count").sum())


def assign_ids(
    column: SparseColumn,
    updated: Sequence[Path],
    known: Known,
    period: Period,
    max_ids: int,
    values_at_a_time: int,
    targets: Sequence[Path],
    dataset: Path,
) -> Result:
    """Task: give ids to the new values of all ranges of a feature; and write what the dataset has of it.

    Args:
        column: the feature.
        updated: what `update_values` wrote, a file for each range.
        known: what the feature had before.
        period: the rules.
        max_ids: most values with ids.
        values_at_a_time: how many values memory holds.
        targets: the file of value and id of each range.
        dataset: its folder, with the folders vocabulary, reset and candidates; the files of the last two are written
            where they have rows.
    """
    kept = [pl.DataFrame(read_section(path, "kept")) for path in updated]
    new = [pl.DataFrame(read_section(path, "new")) for path in updated]
    stays, num_new = _choose(kept, new, period, max_ids)
    kept = [table.filter(pl.Series(mask)) for table, mask in zip(kept, stays, strict=True)]
    new_ids = _smallest_free([table["id"].to_numpy() for table in kept], num_new)
    for i, ids in enumerate(_ids_of_ranges(new, new_ids, values_at_a_time)):
        admitted = (
            new[i]
            .head(len(ids))
            .with_columns(id=pl.Series(ids, dtype=pl.Int32), last_period=pl.lit(period.number, pl.Int32))
        )
        rows = pl.concat([table.select(PERIOD_COLUMNS) for table in (kept[i], admitted)]).sort("id")
        write_sections(targets[i], {"ids": rows.to_arrow()})
    num_ids = _write_vocabulary(column, targets, values_at_a_time, dataset / "vocabulary" / f"{column.name}.parquet")
    reset = new_ids[new_ids < known.num_embeddings]
    if len(reset):
        with replacing(dataset / "reset" / f"{column.name}.parquet") as temporary:
            schema = pa.schema([pa.field("id", pa.int32(), nullable=False)])
            write_rows(temporary, pa.table({"id": reset}, schema=schema))
    num_kept = sum(table.height for table in kept)
    return {
        "num_embeddings": max(known.num_embeddings, num_ids + 1),
        "num_values": num_kept + num_new,
        "admitted": num_new,
        "expired": known.num_values - num_kept,
        "reset": len(reset),
        "candidates": _write_candidates(
            column, updated, targets, values_at_a_time, dataset / "candidates" / f"{column.name}.parquet"
        ),
    }


def _choose(
    kept: Sequence[pl.DataFrame], new: Sequence[pl.DataFrame], period: Period, max_ids: int
) -> tuple[list[npt.NDArray[np.bool_]], int]:
    """Which values keep their ids, [D] of each range, and how many new ones get one, by falling count.

    Those that were seen last come first, then the frequent ones, then those that had an id, by their ids.
    """
    sizes = [table.height for table in kept]
    num_kept, num_new = sum(sizes), sum(table.height for table in new)
    stays = np.ones(num_kept, np.bool_)
    if num_kept + num_new > max_ids:
        last_period, counts, ids = (
            np.concatenate([table[name].to_numpy() for table in kept]) for name in ("last_period", "count", "id")
        )
        new_counts = -np.sort(-np.concatenate([table["count"].to_numpy() for table in new]))
        is_new = np.repeat([False, True], [num_kept, num_new])
        order = np.lexsort(
            (
                np.concatenate([ids, np.arange(num_new)]),
                is_new,
                -np.concatenate([counts, new_counts]),
                -np.concatenate([last_period, np.full(num_new, period.number)]),
            )
        )[:max_ids]
        stays[:] = False
        stays[order[order < num_kept]] = True
        num_new = int((order >= num_kept).sum())
    return np.split(stays, np.cumsum(sizes)[:-1]), num_new


def _smallest_free(used: Sequence[npt.NDArray[np.int32]], count: int) -> npt.NDArray[np.int32]:
    """The smallest ids that are not used, ascending: int32 [count]."""
    most = sum(map(len, used)) + count
    is_free = np.ones(most + 1, np.bool_)
    is_free[UNKNOWN_ID] = False
    for ids in used:
        is_free[ids[ids <= most]] = False
    return np.flatnonzero(is_free)[:count].astype(np.int32)


def _ids_of_ranges(
    new: Sequence[pl.DataFrame], new_ids: npt.NDArray[np.int32], values_at_a_time: int
) -> list[npt.NDArray[np.int32]]:
    """The ids of the first values of each range, which are sorted by falling count; the others get none."""
    ids: list[list[npt.NDArray[np.int32]]] = [[np.zeros(0, np.int32)] for _ in new]
    numbered = 0
    for slices in in_order(new, values_at_a_time):
        tables = ranked(new, slices, 0, len(new_ids) - numbered)["table"].to_numpy()
        here = new_ids[numbered : numbered + len(tables)]
        for i, pieces in enumerate(ids):
            pieces.append(here[tables == i])
        numbered += len(tables)
        if numbered == len(new_ids):
            break
    return [np.concatenate(pieces) for pieces in ids]


def _write_vocabulary(column: SparseColumn, tables: Sequence[Path], values_at_a_time: int, path: Path) -> int:
    """Write the vocabulary of which each range has a table; returns its largest id."""
    ranges = [pl.DataFrame(read_section(table, "ids")) for table in tables]
    num_ids = max((int(rows["id"][-1]) for rows in ranges if rows.height), default=UNKNOWN_ID)
    with replacing(path) as temporary, ValuesWriter(temporary, column.vocabulary_kind, PERIOD_COLUMNS) as writer:
        for first in range(0, num_ids + 1, values_at_a_time):
            edges = (
                [int(rows["id"].search_sorted(first + width)) for width in (0, values_at_a_time)] for rows in ranges
            )
            pieces = [rows[start:end] for rows, (start, end) in zip(ranges, edges, strict=True)]
            writer.append(pl.concat(pieces).sort("id"))
    return num_ids


def _write_candidates(
    column: SparseColumn, updated: Sequence[Path], tables: Sequence[Path], values_at_a_time: int, path: Path
) -> int:
    """Write the counts of values without ids, by value and period; returns their number, of which 0 make no file."""
    ranges = [
        pl.DataFrame(read_section(counts, "candidates")).join(
            pl.DataFrame(read_section(table, "ids")).select("value"),
            on="value",
            how="anti",
            nulls_equal=True,
            maintain_order="left",
        )
        for counts, table in zip(updated, tables, strict=True)
    ]
    sizes = [rows.height for rows in ranges]
    if not any(sizes):
        return 0
    with replacing(path) as temporary, ValuesWriter(temporary, column.vocabulary_kind, CANDIDATE_COLUMNS) as writer:
        for slices in by_value(ranges, [0] * len(sizes), sizes, -(-sum(sizes) // values_at_a_time)):
            pieces = [rows[piece] for rows, piece in zip(ranges, slices, strict=True)]
            writer.append(pl.concat(pieces).sort("value", "period"))
    return sum(sizes)
