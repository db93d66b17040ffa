"""Reads Parquet, row groups at a time, and ORC, stripes at a time."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import orc

from torchdlrm.logs.files import LogFile
from torchdlrm.logs.tables import TableFile, TableFormat

_ORC_MAGIC = b"ORC"
_PAGE_BYTES = 64 << 10
_TEXT = frozenset(range(0x20, 0x7F)) | set(b"\t\r\n") | set(range(0x80, 0x100))


class _Parquet(TableFormat):
    """Parquet."""

    name: ClassVar[str] = "Parquet"
    text_bytes_a_byte: ClassVar[float] = 3.0

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        return start.startswith(b"PAR1")

    def describe(self, file: LogFile) -> TableFile:
        with file.open() as raw:
            about = pq.read_metadata(raw)
        groups = [about.row_group(i) for i in range(about.num_row_groups)]
        return TableFile(
            about.schema.to_arrow_schema(),
            [group.total_byte_size for group in groups],
            [group.num_rows for group in groups],
        )

    def table(self, file: LogFile, groups: range, names: Sequence[str]) -> pa.Table:
        with file.open() as raw:
            return pq.ParquetFile(raw, pre_buffer=True).read_row_groups(list(groups), columns=list(names))

    def batches(self, file: LogFile, group: int, batch_rows: int) -> Iterator[pa.RecordBatch]:
        # The first rows of a row group cost little.
        with file.open() as raw:
            table = pq.ParquetFile(raw, buffer_size=_PAGE_BYTES)
            yield from table.iter_batches(batch_rows, row_groups=[group], use_threads=False)


class _Orc(TableFormat):
    """ORC."""

    name: ClassVar[str] = "ORC"
    text_bytes_a_byte: ClassVar[float] = 3.0

    def recognises(self, start: bytes, path: Path) -> bool:  # noqa: ARG002
        # A column of a text may be named ORC, too.
        return start.startswith(_ORC_MAGIC) and not _TEXT.issuperset(start)

    def describe(self, file: LogFile) -> TableFile:
        with file.open() as raw:
            table = orc.ORCFile(raw)
            # A file does not say how large its stripes are.
            each, more = divmod(table.nrows, max(1, table.nstripes))
            stripe_bytes = int(self.text_bytes_a_byte * table.content_length) // max(1, table.nstripes)
            rows = [each + (i < more) for i in range(table.nstripes)]
            return TableFile(table.schema, [stripe_bytes] * table.nstripes, rows)

    def table(self, file: LogFile, groups: range, names: Sequence[str]) -> pa.Table:
        with file.open() as raw:
            table = orc.ORCFile(raw)
            stripes = [table.read_stripe(i, columns=list(names)) for i in groups]
        return pa.Table.from_batches(stripes).select(list(names))


PARQUET, ORC = _Parquet(), _Orc()
