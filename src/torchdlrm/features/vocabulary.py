"""Gives ids to the values of a sparse feature: counted, cut by a threshold and a cap, numbered by falling count.

In: columns of raw values, missing ones null.  Out: a `Vocabulary`, which is also a Parquet file (value, count, id) that
anything can read.  `torchdlrm.preprocessing.vocabularies` gives ids to the values of a log of any size by the rules
here.  Where values come and go, the file also says when a value was first and last seen, and some ids have no value.

Id 0 is "unknown".  A missing value is counted and numbered like any other; it sorts before all others.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.errors import DatasetError
from torchdlrm.features.kinds import KINDS, SparseKindName

DEFAULT_MIN_COUNT = 3
UNKNOWN_ID = 0
MAX_ID = 2**31 - 1
# The columns of files of values; those of a vocabulary, with the periods where its values come and go, and of values
# that are too rare for an id so far, once for each period.
VALUE_COLUMNS = ("value", "count", "id")
PERIOD_COLUMNS = (*VALUE_COLUMNS, "first_period", "last_period")
CANDIDATE_COLUMNS = ("value", "period", "count")
_ROW_GROUP_ROWS = 1 << 20
_IDS_AT_A_TIME = 1 << 16


def rank_counts(counts: pl.DataFrame) -> pl.DataFrame:
    """Rows of value and count in the order of ids: by falling count, ties by value ascending, null first."""
    return counts.sort(["count", "value"], descending=[True, False], nulls_last=False)


def number_values(ranked: pl.DataFrame) -> pl.DataFrame:
    """Give rows in the order of ids their id."""
    ids = pl.int_range(UNKNOWN_ID + 1, UNKNOWN_ID + 1 + ranked.height, dtype=pl.Int32, eager=True)
    return ranked.with_columns(ids.alias("id"))


@dataclass(frozen=True)
class Vocabulary:
    """The values of a feature that have an id of their own.

    `table`: value (String, Int64 or UInt32; at most one null), count (Int64, of the training rows) and id (Int32, from
    1), in the order of ids; where values come and go also first_period and last_period (Int32), and ids have gaps.
    """

    name: str
    kind: SparseKindName
    table: pl.DataFrame

    @property
    def num_embeddings(self) -> int:
        """The largest id + 1; a table whose largest ids have lost their values has more rows."""
        return int(self.table["id"][-1]) + 1 if self.table.height else UNKNOWN_ID + 1

    @property
    def missing_id(self) -> int | None:
        """The id of a missing value, None where it is unknown like any rare value."""
        found = self.table["value"].is_null().arg_true()
        return int(self.table["id"][found[0]]) if len(found) else None

    def lookup(self, values: pl.Series) -> pl.Series:
        """The id of each value: Int32, `UNKNOWN_ID` for a value without one; the name of `values`."""
        ids = (
            pl.DataFrame({"value": values})
            .lazy()
            .join(
                self.table.lazy().select("value", "id"), on="value", how="left", nulls_equal=True, maintain_order="left"
            )
            .select(pl.col("id").fill_null(UNKNOWN_ID).alias(values.name))
            .collect()
        )
        return ids[values.name]

    def text_values(self) -> pl.Series:
        """The values as they are written in the file: hex as 8 lower-case digits."""
        return KINDS[self.kind].to_text(self.table["value"])

    def write(self, path: Path, columns: Sequence[str] = VALUE_COLUMNS) -> None:
        """Write these columns of the table as Parquet."""
        with ValuesWriter(path, self.kind, columns) as writer:
            writer.append(self.table)

    @classmethod
    def read(cls, path: Path, name: str, kind: SparseKindName) -> Self:
        """Read what `write` wrote.

        Raises:
            DatasetError: the file is missing or damaged.
        """
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:  # half the time of pq.read_table
                table = pl.DataFrame(file.read())
        except (OSError, pa.ArrowException) as error:
            msg = f"{path}: the vocabulary cannot be read ({error}); copy or preprocess the dataset again"
            raise DatasetError(msg) from error
        return cls(name, kind, typed_values(table, kind))


def first_difference(path: Path, later: Path, num_ids: int, reset: npt.NDArray[np.int32] | None = None) -> int | None:
    """The first id that stands for another value in a vocabulary's file than in an earlier one's; None: no id does.

    Args:
        path: the earlier file.
        later: the other one.
        num_ids: ids from this on are new.
        reset: ids that may stand for another value, [R]; any other one may have lost its value.  None: no id may.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    try:
        with (
            pq.ParquetFile(path, page_checksum_verification=True) as ours,
            pq.ParquetFile(later, page_checksum_verification=True) as theirs,
        ):
            for old, new in zip_longest(_blocks_of_ids(ours), _blocks_of_ids(theirs)):
                before = new[:0] if old is None else old
                after = old[:0] if new is None else new.filter(pl.col("id") < num_ids)
                found = _ids_of_others(before, after)
                if reset is None:
                    found = np.union1d(found, np.setdiff1d(before["id"], after["id"]))
                elif len(found):
                    found = np.setdiff1d(found, reset)
                if len(found):
                    return int(found[0])
    except (OSError, pa.ArrowException) as error:
        msg = f"{path} or {later}: the vocabulary cannot be read ({error}); copy or preprocess the dataset again"
        raise DatasetError(msg) from error
    return None


def _ids_of_others(before: pl.DataFrame, after: pl.DataFrame) -> npt.NDArray[np.int32]:
    """The ids of a block that have a value which they had not before, ascending; both are in the order of ids."""
    ids, old_ids = after["id"].to_numpy(), before["id"].to_numpy()
    if not len(old_ids):
        return ids
    places = np.searchsorted(old_ids, ids).clip(max=len(old_ids) - 1)
    is_same = after["value"].eq_missing(before["value"].gather(places)).to_numpy()
    return ids[~is_same | (old_ids[places] != ids)]


def _blocks_of_ids(file: pq.ParquetFile) -> Iterator[pl.DataFrame]:
    """Frames of value and id of a vocabulary's file, each of as many ids, whether or not they have values."""
    end, rows = _IDS_AT_A_TIME, pl.DataFrame(file.schema_arrow.empty_table().select(["value", "id"]))
    for batch in file.iter_batches(_IDS_AT_A_TIME, columns=["value", "id"]):
        rows = pl.concat([rows, pl.DataFrame(pa.table(batch))])
        while rows.height and rows["id"][-1] >= end:
            cut = int(rows["id"].search_sorted(end))
            yield rows[:cut]
            rows, end = rows[cut:], end + _IDS_AT_A_TIME
    yield rows


class ValuesWriter:
    """Writes a vocabulary, or other columns of values, piece by piece; the pieces leave no trace in the bytes.

    A context manager.
    """

    def __init__(self, path: Path, kind: SparseKindName, columns: Sequence[str] = VALUE_COLUMNS) -> None:
        self._kind = KINDS[kind]
        numbers = {name: pa.int64() if name == "count" else pa.int32() for name in columns if name != "value"}
        self._schema = pa.schema(
            [
                pa.field("value", self._kind.file_type),
                *(pa.field(name, number_type, nullable=False) for name, number_type in numbers.items()),
            ]
        )
        self._writer = _parquet_writer(path, self._schema)
        self._rest: pl.DataFrame | None = None

    def __enter__(self) -> Self:
        return self

    def append(self, table: pl.DataFrame) -> None:
        """Add rows, of a vocabulary in the order of ids."""
        rows = table.select(self._schema.names)
        rows = rows if self._rest is None else pl.concat([self._rest, rows])
        while rows.height >= _ROW_GROUP_ROWS:
            self._write(rows.head(_ROW_GROUP_ROWS))
            rows = rows.slice(_ROW_GROUP_ROWS)
        self._rest = rows

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and self._rest is not None and self._rest.height:
            self._write(self._rest)
        self._writer.close()

    def _write(self, rows: pl.DataFrame) -> None:
        columns = [self._kind.to_text(rows["value"]), *(rows[name] for name in self._schema.names[1:])]
        arrays = [
            column.rechunk().to_arrow().cast(field.type) for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=_ROW_GROUP_ROWS)


def write_rows(path: Path, rows: pa.Table) -> None:
    """Write rows of a vocabulary's file, whatever their columns, as `ValuesWriter` does: the same bytes."""
    with _parquet_writer(path, rows.schema) as writer:
        for start in range(0, rows.num_rows, _ROW_GROUP_ROWS):
            writer.write_table(rows.slice(start, _ROW_GROUP_ROWS), row_group_size=_ROW_GROUP_ROWS)


def _parquet_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=False
    )


def typed_values(table: pl.DataFrame, kind: SparseKindName) -> pl.DataFrame:
    """A vocabulary as it is written -> its values as columns of that kind have them."""
    return table.with_columns(KINDS[kind].from_file(table["value"]))
