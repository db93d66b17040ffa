"""Runs tasks that give ids to the values of a sparse feature, which may come and go from one period to the next.

Values are numbered by falling count in the training rows, ties by value, null first; those that have an id in a dataset
whose vocabulary is extended keep it.  Where values come and go, a period (an hour, a day) is a number.  A value that
was not seen in the training rows of a number of periods loses its id; one that has none gets one when it is frequent
enough over some periods, the smallest free one first; and where there are more values than a table may have rows, those
that were seen last are kept.  An id never moves from a value to another while both have one.

    count_values  a range of the values: those with ids, and the counts of others -> the same after this log
    assign_ids    all ranges -> the vocabulary, the ids that stand for another value than before, and the values that
                  are too rare so far; and for each range value, id
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from torchdlrm.data.manifest import FileRecord
from torchdlrm.data.splits import RowSplit
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.vocabulary import (
    CANDIDATE_COLUMNS,
    PERIOD_COLUMNS,
    UNKNOWN_ID,
    VALUE_COLUMNS,
    ValuesWriter,
    rank_counts,
    write_rows,
)
from torchdlrm.files import replacing_durably
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.jobs.work_folder import Result
from torchdlrm.preprocessing.count import ValueRange, by_value, in_order, ranked, training_counts
from torchdlrm.preprocessing.read import ChunkFile
from torchdlrm.storage.mirror import fetch


@dataclass(frozen=True)
class Period:
    """The number of a log's period, and by what rules values come and go in it.

    A value that was not seen in `expire_after` periods, this one included, loses its id (None: none does); over
    `admit_over` periods, this one included, a value is counted until it has one.
    """

    number: int
    expire_after: int | None
    admit_over: int


def count_values(
    values: ValueRange,
    chunks: Sequence[ChunkFile],
    split: RowSplit,
    min_count: int,
    known: Path | None,
    candidates: Path | None,
    period: Period | None,
    target: Path,
) -> Result:
    """Task: what a log makes of the values of a range.

    `spread_values` wrote `known`, the values that have ids, and `candidates`, counts by period of those that have none.
    The file gets `kept`, the values that keep their ids, in the order of ids; `new`, those that are frequent enough for
    one, by falling count; and where values come and go `candidates`, the counts that the next period asks for of all
    values without ids, whether frequent enough or not.
    """
    counted = training_counts(values, chunks, split)
    kept = _known_values(values.column, known, period)
    new = counted if known is None else counted.join(kept, on="value", how="anti", nulls_equal=True)
    tables = {}
    if period is not None:
        earlier = _read_candidates(values.column, candidates, period.number - period.admit_over)
        tables["candidates"] = _asked(earlier, new, period)
        kept, new = _still_known(kept, counted, period), _over_periods(new, earlier, period)
    del counted
    new = rank_counts(new.filter(pl.col("count") >= min_count))
    tables |= {"kept": kept.sort("id"), "new": new}
    write_sections(target, {name: table.to_arrow() for name, table in tables.items()}.items())
    return {"values": kept.height + new.height}


def _known_values(column: SparseColumn, known: Path | None, period: Period | None) -> pl.DataFrame:
    """The values that have ids; where their periods were not noted, they were all seen in the one before."""
    names = VALUE_COLUMNS if period is None else PERIOD_COLUMNS
    if known is None:
        numbers = {name: pl.Int64 if name == "count" else pl.Int32 for name in names[1:]}
        return pl.DataFrame(schema={"value": column.vocabulary_dtype, **numbers})
    found = pl.DataFrame(Sections(known).table("ids"))
    if period is None or "last_period" in found.columns:
        return found
    before = pl.lit(period.number - 1, pl.Int32)
    return found.with_columns(first_period=before, last_period=before)


def _still_known(known: pl.DataFrame, counted: pl.DataFrame, period: Period) -> pl.DataFrame:
    """The values that had ids and were seen lately, with what was counted in this period."""
    is_seen = pl.col("today").is_not_null()
    kept = known.join(counted.rename({"count": "today"}), on="value", how="left", nulls_equal=True).select(
        "value",
        pl.col("count") + pl.col("today").fill_null(0),
        "id",
        "first_period",
        pl.when(is_seen).then(pl.lit(period.number, pl.Int32)).otherwise("last_period").alias("last_period"),
    )
    if period.expire_after is None:
        return kept
    return kept.filter(period.number - pl.col("last_period") < period.expire_after)


def _over_periods(today: pl.DataFrame, earlier: pl.DataFrame, period: Period) -> pl.DataFrame:
    """The values of this period that have no id, with their rows in earlier periods and the first one."""
    totals = earlier.group_by("value").agg(pl.col("count").sum(), pl.col("period").min())
    return today.join(totals, on="value", how="left", nulls_equal=True, suffix="_before").select(
        "value",
        pl.col("count") + pl.col("count_before").fill_null(0),
        pl.col("period").fill_null(period.number).alias("first_period"),
    )


def _asked(earlier: pl.DataFrame, today: pl.DataFrame, period: Period) -> pl.DataFrame:
    """The counts of values without ids that the next period asks for."""
    asked = pl.concat([earlier, today.select("value", pl.lit(period.number, pl.Int32).alias("period"), "count")])
    return asked.filter(pl.col("period") > period.number + 1 - period.admit_over).sort(CANDIDATE_COLUMNS)


def _read_candidates(column: SparseColumn, candidates: Path | None, before: int) -> pl.DataFrame:
    """value, period and count of the values without ids in the periods after one."""
    if candidates is None:
        return pl.DataFrame(schema={"value": column.vocabulary_dtype, "period": pl.Int32, "count": pl.Int64})
    return pl.DataFrame(Sections(candidates).table("counts")).filter(pl.col("period") > before)


def assign_ids(
    column: SparseColumn,
    counted: Sequence[Path],
    known_rows: int,
    num_known: int,
    period: Period | None,
    max_ids: int,
    values_at_a_time: int,
    targets: Sequence[Path],
    dataset: Path,
) -> Result:
    """Task: give ids to the new values of all ranges of a feature; and write what the dataset has of it.

    `counted` are the files of `count_values`, one for each range.  Before, the feature's table had `known_rows`, 1 if
    there was none, and `num_known` values had ids; at most `max_ids` get some; memory holds `values_at_a_time`.  The
    file of each range in `targets` gets value and id, and the values without one; the folders vocabulary, reset and
    candidates of the `dataset` a file each, the last two where they have rows.
    """
    for path in counted:
        fetch(path)
    stays, num_new = _choose(counted, period, max_ids)
    used = [_column(path, "kept", "id")[mask] for path, mask in zip(counted, stays, strict=True)]
    new_ids = _smallest_free(used, num_new)
    ids_of_ranges = _ids_of_ranges(counted, new_ids, values_at_a_time)
    columns = VALUE_COLUMNS if period is None else PERIOD_COLUMNS
    # One range after the other: what is mapped into memory counts, too.
    for path, mask, ids, target in zip(counted, stays, ids_of_ranges, targets, strict=True):
        admitted = pl.DataFrame(Sections(path).table("new")).head(len(ids)).with_columns(pl.Series("id", ids))
        if period is not None:
            admitted = admitted.with_columns(last_period=pl.lit(period.number, pl.Int32))
        staying = pl.DataFrame(Sections(path).table("kept")).filter(pl.Series(mask))
        rows = pl.concat([staying.select(columns), admitted.select(columns)])
        rows = rows if rows["id"].is_sorted() else rows.sort("id")
        tables = {"ids": rows}
        if period is not None:
            asked = pl.DataFrame(Sections(path).table("candidates"))
            tables["candidates"] = asked.join(rows, on="value", how="anti", nulls_equal=True, maintain_order="left")
        write_sections(target, {name: table.to_arrow() for name, table in tables.items()}.items())
    name = f"{column.name}.parquet"
    num_ids = _write_vocabulary(column, columns, targets, values_at_a_time, dataset / "vocabulary" / name)
    reset = new_ids[new_ids < known_rows]
    if len(reset):
        with replacing_durably(dataset / "reset" / name) as temporary:
            schema = pa.schema([pa.field("id", pa.int32(), nullable=False)])
            write_rows(temporary, pa.table({"id": reset}, schema=schema))
    num_kept = sum(map(len, used))
    written = {"vocabulary": num_kept + num_new, "reset": len(reset)}
    if period is not None:
        written["candidates"] = _write_candidates(column, targets, values_at_a_time, dataset / "candidates" / name)
    return {
        "num_embeddings": max(known_rows, num_ids + 1),
        "num_values": num_kept + num_new,
        "admitted": num_new,
        "expired": num_known - num_kept,
        "records": {
            what: FileRecord.of(dataset, f"{what}/{name}", count).model_dump()
            for what, count in written.items()
            if count or what == "vocabulary"
        },
    }


def _column(path: Path, section: str, name: str) -> npt.NDArray[Any]:
    """A copy of a column of numbers, so that the file does not stay mapped."""
    return np.array(Sections(path).table(section)[name])


def _choose(counted: Sequence[Path], period: Period | None, max_ids: int) -> tuple[list[npt.NDArray[np.bool_]], int]:
    """Which values keep their ids, [D] of each range, and how many new ones get one, by falling count.

    Where values come and go, those that were seen last come first, then the frequent ones, then those that had an id,
    by their ids; else all that had one keep it.
    """
    sizes = [Sections(path).table("kept").num_rows for path in counted]
    num_kept, num_new = sum(sizes), sum(Sections(path).table("new").num_rows for path in counted)
    stays = np.ones(num_kept, np.bool_)
    if period is None:
        num_new = min(num_new, max(0, max_ids - num_kept))
    elif num_kept + num_new > max_ids:
        last_period, counts, ids = (
            np.concatenate([_column(path, "kept", name) for path in counted]) for name in ("last_period", "count", "id")
        )
        new_counts = -np.sort(-np.concatenate([_column(path, "new", "count") for path in counted]))
        is_new = np.repeat([False, True], [num_kept, num_new])
        order = np.lexsort(
            (
                np.concatenate([ids, np.arange(num_new, dtype=np.int32)]),
                is_new,
                -np.concatenate([counts, new_counts]),
                -np.concatenate([last_period, np.full(num_new, period.number, np.int32)]),
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
    counted: Sequence[Path], new_ids: npt.NDArray[np.int32], values_at_a_time: int
) -> list[npt.NDArray[np.int32]]:
    """The ids of the first new values of each range, which are sorted by falling count; the others get none."""
    new = [pl.DataFrame(Sections(path).table("new")) for path in counted]
    ids: list[list[npt.NDArray[np.int32]]] = [[np.zeros(0, np.int32)] for _ in new]
    numbered = 0
    for slices in in_order(new, values_at_a_time):
        tables = ranked(new, slices)["table"].to_numpy()[: len(new_ids) - numbered]
        here = new_ids[numbered : numbered + len(tables)]
        for i, pieces in enumerate(ids):
            pieces.append(here[tables == i])
        numbered += len(tables)
        if numbered == len(new_ids):
            break
    return [np.concatenate(pieces) for pieces in ids]


def _write_vocabulary(
    column: SparseColumn, columns: Sequence[str], tables: Sequence[Path], values_at_a_time: int, path: Path
) -> int:
    """Write the vocabulary of which each range has a table; returns its largest id."""
    num_ids = max(Sections(table).table("ids")["id"][-1:].to_pylist() or [UNKNOWN_ID] for table in tables)[0]
    with (
        replacing_durably(path) as temporary,
        ValuesWriter(temporary, column.vocabulary_kind, columns) as writer,
    ):
        for first in range(0, num_ids + 1, values_at_a_time):
            pieces = []
            for table in tables:
                rows = pl.DataFrame(Sections(table).table("ids"))
                edges = first, min(first + values_at_a_time, num_ids + 1)
                start, end = (int(rows["id"].search_sorted(edge)) for edge in edges)
                pieces.append(rows[start:end])
            writer.append(pl.concat(pieces).sort("id") if len(pieces) > 1 else pieces[0])
    return num_ids


def _write_candidates(column: SparseColumn, tables: Sequence[Path], values_at_a_time: int, path: Path) -> int:
    """Write the counts of values without ids, by value and period; returns their number, of which 0 make no file."""
    ranges = [pl.DataFrame(Sections(table).table("candidates")) for table in tables]
    sizes = [rows.height for rows in ranges]
    if not any(sizes):
        return 0
    with (
        replacing_durably(path) as temporary,
        ValuesWriter(temporary, column.vocabulary_kind, CANDIDATE_COLUMNS) as writer,
    ):
        for slices in by_value(ranges, [0] * len(sizes), sizes, -(-sum(sizes) // values_at_a_time)):
            pieces = [rows[piece] for rows, piece in zip(ranges, slices, strict=True)]
            writer.append(pl.concat(pieces).sort("value", "period"))
    return sum(sizes)
