"""Logs in Parquet -> the same typed columns as text gives.

In: row groups of a file.  Out: a `ParsedChunk`; a row's "line" is its number in the file, from 1.  Cells are written
out as text and read as the schema says, so that a value is good or bad as it would be in a text file; lists are taken
as the values of a multi-valued column.
"""

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.bad_rows import BadRows
from torchdlrm.data.log.cells import to_typed_columns
from torchdlrm.data.log.cut import Chunk
from torchdlrm.data.log.files import LogFile
from torchdlrm.data.log.text import ParsedChunk
from torchdlrm.errors import LogError
from torchdlrm.schema import Column, FeatureSchema, IgnoredColumn, SparseColumn, TimeColumn


def plan_row_groups(file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
    """Cut a Parquet file between row groups into chunks of about `chunk_bytes` in memory, at least a row group each.

    Raises:
        LogError: the file cannot be read, or lacks a column of the schema.
    """
    try:
        metadata = pq.read_metadata(file.path)
    except (OSError, pa.ArrowException) as error:
        raise LogError(_unreadable(file, error)) from error
    found = metadata.schema.to_arrow_schema().names
    missing = [column.log_name for column in _used(schema) if column.log_name not in found]
    if missing:
        msg = (
            f"{file.path}: has no column {', '.join(missing)}, which the schema {schema.name!r} names; "
            f"its columns are {', '.join(found)}"
        )
        raise LogError(msg)
    chunks, start, size_bytes = [], 0, 0
    for i in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(i).total_byte_size
        if size_bytes >= chunk_bytes or i == metadata.num_row_groups - 1:
            chunks.append(Chunk(start, i + 1))
            start, size_bytes = i + 1, 0
    return chunks


def read_row_groups(
    file: LogFile, row_groups: range, schema: FeatureSchema, *, is_label_optional: bool = False
) -> ParsedChunk:
    """Read row groups as the schema says; a label may be missing where `is_label_optional`.

    Raises:
        LogError: the file is damaged, or a list stands where the schema has one value.
    """
    used = _used(schema)
    try:
        names = [column.log_name for column in used]
        table = pq.ParquetFile(file.path).read_row_groups(list(row_groups), columns=names)
    except (OSError, pa.ArrowException) as error:
        raise LogError(_unreadable(file, error)) from error
    frame = pl.DataFrame(table)
    text = pl.DataFrame([_as_text(frame[column.log_name], column, file) for column in used])
    bad_rows = BadRows()
    typed, good = to_typed_columns(text, schema, bad_rows, is_label_optional=is_label_optional)
    return ParsedChunk.of(typed, good, frame.height, bad_rows)


def _used(schema: FeatureSchema) -> list[Column]:
    return [column for column in schema.columns if not isinstance(column, IgnoredColumn)]


def _unreadable(file: LogFile, error: Exception) -> str:
    return f"{file.path}: the Parquet file cannot be read ({error}); fetch the file again"


def _as_text(cells: pl.Series, column: Column, file: LogFile) -> pl.Series:
    cells = cells.alias(column.name)
    is_multi_valued = isinstance(column, SparseColumn) and column.is_multi_valued
    if isinstance(cells.dtype, pl.List | pl.Array):
        if not is_multi_valued:
            msg = (
                f"{file.path}, column {column.log_name}: holds lists, and the schema has one value a row; "
                'give the column a value_separator = "," to take all values'
            )
            raise LogError(msg)
        return cells.cast(pl.List(pl.String))
    if isinstance(cells.dtype, pl.Categorical | pl.Enum | pl.Decimal):
        cells = cells.cast(pl.String)
    if cells.dtype == pl.Binary:
        return cells.cast(pl.String, strict=False)
    if isinstance(column, TimeColumn) and cells.dtype in (pl.Datetime, pl.Date):
        if getattr(cells.dtype, "time_zone", None):
            cells = cells.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return cells.cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f")
    text = cells.cast(pl.String)
    # In a text file an empty cell is a missing one.
    return pl.select(pl.when(text != "").then(text).alias(column.name)).to_series()
