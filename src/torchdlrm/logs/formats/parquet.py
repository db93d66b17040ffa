"""Reads Parquet, row groups at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.logs.tables import TableFile, TableFormat


class _Parquet(TableFormat):
    """Parquet."""

    name: ClassVar[str] = "Parquet"
    text_bytes_a_byte: ClassVar[float] = 3.0

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        return start.startswith(b"PAR1")

    def describe(self, path: Path) -> TableFile:
        about = pq.read_metadata(path)
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        return TableFile(
            about.schema.to_arrow_schema(),
            [group.total_byte_size for group in groups],
            [group.num_rows for group in groups],
        )

    def table(self, path: Path, groups: range, names: Sequence[str]) -> pa.Table:
        return pq.ParquetFile(path).read_row_groups(list(groups), columns=list(names))

    def batches(self, path: Path, group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        # The first rows of a row group cost little.
        with pq.ParquetFile(path, memory_map=True) as file:
            yield from file.iter_batches(batch_rows, row_groups=[group], use_threads=False)


PARQUET = _Parquet()
