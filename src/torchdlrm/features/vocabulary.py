"""Values of a sparse feature -> ids: counted, cut by a threshold and a cap, numbered by falling count.

In: columns of raw values, missing ones null.  Out: a `Vocabulary`, which is also a Parquet file (value, count, id) that
anything can read.  Counting works on chunks: `dictionary_encode` hashes each value of a chunk once, and both the counts
and, later, the ids are got from its codes.

Id 0 is "unknown".  A missing value is counted and numbered like any other; it sorts before all others.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from torchdlrm.errors import DatasetError
from torchdlrm.features.kinds import KINDS, SparseKindName

DEFAULT_MIN_COUNT = 3
UNKNOWN_ID = 0
MAX_ID = 2**31 - 1
_ROW_GROUP_ROWS = 1 << 20


@dataclass(frozen=True)
class DictionaryColumn:
    """A column of B rows as its D distinct values (null among them) and, for each row, the position of its value.

    `values`: Series [D], in the order of first appearance.  `codes`: int32 [B].
    """

    values: pl.Series
    codes: npt.NDArray[np.int32]

    def counts(self, rows: slice) -> npt.NDArray[np.int64]:
        """How many of `rows` have each value: int64 [D]."""
        return np.bincount(self.codes[rows], minlength=len(self.values))


def dictionary_encode(column: pl.Series) -> DictionaryColumn:
    """Hash every value of a column once."""
    encoded = pc.dictionary_encode(column.to_arrow(), null_encoding="encode")
    values = pl.Series(column.name, encoded.dictionary, dtype=column.dtype)
    return DictionaryColumn(values, encoded.indices.to_numpy())


def merge_counts(partial_counts: Iterable[tuple[pl.Series, npt.NDArray[np.int64]]]) -> pl.DataFrame:
    """Add up (values, count of each): a frame of value and count (Int64), each value once, none that was never met."""
    frames = [pl.DataFrame({"value": values, "count": counts}) for values, counts in partial_counts]
    counts = pl.concat(frames).lazy().filter(pl.col("count") > 0).group_by("value").agg(pl.col("count").sum())
    return counts.collect()


@dataclass(frozen=True)
class Vocabulary:
    """The values of a feature that have an id of their own.

    `table`: value (String, Int64 or UInt32; at most one null), count (Int64, of the training rows) and id (Int32, from
    1), in the order of ids.
    """

    name: str
    kind: SparseKindName
    table: pl.DataFrame

    @classmethod
    def from_counts(
        cls, name: str, kind: SparseKindName, counts: pl.DataFrame, *, min_count: int, max_rows: int | None
    ) -> Self:
        """Number the values of at least `min_count` rows by falling count, ties by value ascending, null first.

        Args:
            name: the feature.
            kind: the kind of its values.
            counts: value and count, each value once.
            min_count: a value of fewer rows is unknown.
            max_rows: rows of the feature's table, row 0 for the unknown among them; rarer values are cut.
        """
        kept = (
            counts.filter(pl.col("count") >= min_count)
            .sort(["count", "value"], descending=[True, False], nulls_last=False)
            .head(min(MAX_ID, max_rows - 1 if max_rows is not None else MAX_ID))
        )
        ids = pl.int_range(1, kept.height + 1, dtype=pl.Int32, eager=True).alias("id")
        return cls(name, kind, kept.with_columns(ids))

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
        self._writer = pq.ParquetWriter(
            path, self._schema, compression="zstd", use_dictionary=False, write_page_checksum=True, store_schema=False
        )
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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


def typed_values(table: pl.DataFrame, kind: SparseKindName) -> pl.DataFrame:
    """A vocabulary as it is written -> its values as columns of that kind have them."""
    return table.with_columns(KINDS[kind].from_file(table["value"]))
