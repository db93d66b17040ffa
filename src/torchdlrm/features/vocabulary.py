"""Gives ids to the values of a sparse feature: counted, cut by a threshold and a cap, numbered by falling count.

In: columns of raw values, missing ones null.  Out: a `Vocabulary`, which is also a Parquet file (value, count, id) that
anything can read.  `torchdlrm.preprocessing.count` counts and ranks the values of a log of any size by the rules here.

Id 0 is "unknown".  A missing value is counted and numbered like any other; it sorts before all others.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.errors import DatasetError
from torchdlrm.features.kinds import KINDS, SparseKindName

DEFAULT_MIN_COUNT = 3
UNKNOWN_ID = 0
MAX_ID = 2**31 - 1
_ROW_GROUP_ROWS = 1 << 20
_BATCH_ROWS = 1 << 16  # divides that, so that batches of two files have the same ids


def rank_counts(counts: pl.DataFrame) -> pl.DataFrame:
    """Rows of value and count in the order of ids: by falling count, ties by value ascending, null first."""
    return counts.sort(["count", "value"], descending=[True, False], nulls_last=False)


def number_values(ranked: pl.DataFrame, *, first_id: int = UNKNOWN_ID + 1) -> pl.DataFrame:
    """Give rows in the order of ids their id."""
    ids = pl.int_range(first_id, first_id + ranked.height, dtype=pl.Int32, eager=True)
    return ranked.with_columns(ids.alias("id"))


@dataclass(frozen=True)
class Vocabulary:
    """The values of a feature that have an id of their own.

    `table`: value (String, Int64 or UInt32; at most one null), count (Int64, of the training rows) and id (Int32, from
    1), in the order of ids.
    """

    name: str
    kind: SparseKindName
    table: pl.DataFrame

    @property
    def num_embeddings(self) -> int:
        """Rows of the feature's table: the largest id + 1."""
        return self.table.height + 1

    @property
    def missing_id(self) -> int | None:
        """The id of a missing value, None where it is unknown like any rare value."""
        found = self.table.filter(pl.col("value").is_null())["id"]
        return int(found[0]) if len(found) else None

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

    def write(self, path: Path) -> None:
        """Write value, count, id as Parquet."""
        with VocabularyWriter(path, self.kind) as writer:
            writer.append(self.table)

    @classmethod
    def read(cls, path: Path, name: str, kind: SparseKindName) -> Self:
        """Read what `write` wrote.

        Raises:
            DatasetError: the file is missing or damaged.
        """
        try:
            table = pl.DataFrame(pq.read_table(path, page_checksum_verification=True))
        except (OSError, pa.ArrowException) as error:
            msg = f"{path}: the vocabulary cannot be read ({error}); copy or preprocess the dataset again"
            raise DatasetError(msg) from error
        return cls(name, kind, typed_values(table, kind))


def first_difference(path: Path, longer: Path) -> int | None:
    """The first id of a vocabulary's file that stands for another value in a longer one, or for none; None: no id does.

    Raises:
        DatasetError: a file is missing or damaged.
    """
    first_id = UNKNOWN_ID + 1
    try:
        with (
            pq.ParquetFile(path, page_checksum_verification=True) as ours,
            pq.ParquetFile(longer, page_checksum_verification=True) as theirs,
        ):
            batches = theirs.iter_batches(_BATCH_ROWS, columns=["value"])
            for batch in ours.iter_batches(_BATCH_ROWS, columns=["value"]):
                values = batch.column(0)
                other = next(batches, batch.slice(0, 0)).column(0)
                if not values.equals(other[: len(values)]):
                    pairs = zip(values.to_pylist(), other.to_pylist(), strict=False)
                    differ = (row for row, (mine, its) in enumerate(pairs) if mine != its)
                    return first_id + next(differ, len(other))
                first_id += len(values)
    except (OSError, pa.ArrowException) as error:
        msg = f"{path} or {longer}: the vocabulary cannot be read ({error}); copy or preprocess the dataset again"
        raise DatasetError(msg) from error
    return None


class VocabularyWriter:
    """Writes a vocabulary piece by piece; the pieces leave no trace in the bytes.  A context manager."""

    def __init__(self, path: Path, kind: SparseKindName) -> None:
        self._kind = KINDS[kind]
        self._schema = pa.schema(
            [
                pa.field("value", self._kind.file_type),
                pa.field("count", pa.int64(), nullable=False),
                pa.field("id", pa.int32(), nullable=False),
            ]
        )
        self._writer = _parquet_writer(path, self._schema)
        self._rest: pl.DataFrame | None = None

    def __enter__(self) -> Self:
        return self

    def append(self, table: pl.DataFrame) -> None:
        """Add value, count and id, in the order of ids."""
        rows = table if self._rest is None else pl.concat([self._rest, table])
        while rows.height >= _ROW_GROUP_ROWS:
            self._write(rows.head(_ROW_GROUP_ROWS))
            rows = rows.slice(_ROW_GROUP_ROWS)
        self._rest = rows

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None and self._rest is not None and self._rest.height:
            self._write(self._rest)
        self._writer.close()

    def _write(self, rows: pl.DataFrame) -> None:
        values = self._kind.to_text(rows["value"])
        columns = [values, rows["count"], rows["id"]]
        arrays = [
            column.rechunk().to_arrow().cast(field.type) for column, field in zip(columns, self._schema, strict=True)
        ]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema), row_group_size=_ROW_GROUP_ROWS)


def write_rows(path: Path, rows: pa.Table) -> None:
    """Write rows of a vocabulary's file, whatever their columns, as `VocabularyWriter` does: the same bytes."""
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
