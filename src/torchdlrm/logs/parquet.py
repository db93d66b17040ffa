"""Reads logs in Parquet into the same typed columns that text gives.

In: row groups of a file.  Out: a `ParsedChunk`; a row's "line" is its number in the file, from 1.  Cells are written
out as text and read as the schema says, so that a value is good or bad as it would be in a text file; lists are taken
as the values of a multi-valued column.

Numbers are taken as numbers, as in a request to a server: for a column of kind `hex` they are not read as digits, 3.0
is 3 where the column holds integers, and NaN is a missing value.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.errors import LogError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.cells import to_typed_columns
from torchdlrm.features.columns import Column, SparseColumn, TimeColumn
from torchdlrm.features.kinds import FLOAT, KINDS, map_lists
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.cut import Chunk
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.names import found_by_name
from torchdlrm.logs.text import ParsedChunk

_LIST_TYPES = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
_CELL_TYPES = (
    pa.types.is_boolean,
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_decimal,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_time,
    pa.types.is_null,
)


def plan_row_groups(file: LogFile, schema: FeatureSchema, chunk_bytes: int) -> list[Chunk]:
    """Cut a Parquet file between row groups into chunks of about `chunk_bytes` in memory, at least a row group each.

    Raises:
        LogError: the file cannot be read, lacks a column of the schema, or has one of a type that is no cell.
    """
    with reading_parquet(file.path):
        metadata = pq.read_metadata(file.path)
        arrow_schema = metadata.schema.to_arrow_schema()
    found_by_name(arrow_schema.names, str(file.path), schema, schema.used, f"the schema {schema.name!r}")
    wrong = [fault for column in schema.used if (fault := type_fault(arrow_schema.field(column.log_name).type, column))]
    if wrong:
        raise LogError("\n".join([f"{file.path}: columns that cannot be read as the schema says", *wrong]))
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
    with reading_parquet(file.path):
        names = [column.log_name for column in schema.used]
        table = pq.ParquetFile(file.path).read_row_groups(list(row_groups), columns=names)
    frame = pl.DataFrame(table)
    text = pl.DataFrame([cells_as_text(frame[column.log_name], column, file) for column in schema.used])
    bad_rows = BadRows()
    typed, good = to_typed_columns(text, schema, bad_rows, is_label_optional=is_label_optional)
    return ParsedChunk.of(typed, good, frame.height, bad_rows)


@contextmanager
def reading_parquet(path: Path) -> Iterator[None]:
    """Report what goes wrong inside as a fault of the file.

    Raises:
        LogError: it cannot be read.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        msg = f"{path}: the Parquet file cannot be read ({error}); fetch the file again"
        raise LogError(msg) from error


def type_fault(arrow_type: pa.DataType, column: Column) -> str | None:
    """What is wrong with the type of a column; None: nothing."""
    value_type = arrow_type
    if any(is_list(arrow_type) for is_list in _LIST_TYPES):
        if not (isinstance(column, SparseColumn) and column.is_multi_valued):
            return (
                f"  column {column.log_name}: holds lists, and the schema has one value a row; "
                'give the column a value_separator = "," to take all values'
            )
        value_type = arrow_type.value_type
        if pa.types.is_struct(value_type) and column.weight_separator is not None:
            fields = {field.name: field.type for field in value_type}
            value_type = fields["value"] if fields.keys() == {"value", "weight"} else value_type
    if pa.types.is_dictionary(value_type):
        value_type = value_type.value_type
    if any(is_cell(value_type) for is_cell in _CELL_TYPES):
        return None
    return (
        f"  column {column.log_name}: is of the Parquet type {arrow_type}, which is no number, text or time; "
        "write it as one of these, or leave the column out of the schema"
    )


def cells_as_text(cells: pl.Series, column: Column, file: LogFile) -> pl.Series:
    """Cells of a Parquet file as a text file would have them: String, or lists of it; null where one is missing.

    Raises:
        LogError: they are bytes that are no text.
    """
    cells = cells.alias(column.name)
    if not isinstance(cells.dtype, pl.List | pl.Array):
        text = _values_as_text(cells, column, file)
        # In a text file an empty cell is a missing one.
        return pl.select(pl.when(text != "").then(text).alias(column.name)).to_series()
    return map_lists(cells.cast(pl.List(cells.dtype.inner)), lambda flat: _values_as_text(flat, column, file))


def _weighted_as_text(cells: pl.Series, column: SparseColumn, file: LogFile) -> pl.Series:
    """Structs of a value and its weight as the text of both; no weight is a bad one, and no value none."""
    values = _values_as_text(cells.struct.field("value").alias(column.name), column, file).fill_null("")
    weights = cells.struct.field("weight").cast(pl.String).fill_null("")
    return pl.select(pl.concat_str(values, pl.lit(column.weight_separator), weights)).to_series()


def _values_as_text(cells: pl.Series, column: Column, file: LogFile) -> pl.Series:
    if isinstance(column, SparseColumn) and isinstance(cells.dtype, pl.Struct):
        return _weighted_as_text(cells, column, file)
    if cells.dtype.is_numeric():
        return KINDS.get(getattr(column, "kind", ""), FLOAT).text_of_numbers(cells)
    if cells.dtype == pl.Binary:
        try:
            return cells.cast(pl.String)
        except pl.exceptions.PolarsError as error:
            msg = f"{file.path}, column {column.log_name}: holds bytes that are no text in UTF-8; write them as text"
            raise LogError(msg) from error
    if isinstance(column, TimeColumn) and cells.dtype in (pl.Datetime, pl.Date):
        if getattr(cells.dtype, "time_zone", None):
            cells = cells.dt.convert_time_zone("UTC").dt.replace_time_zone(None)
        return cells.cast(pl.Datetime("us")).dt.to_string("%Y-%m-%d %H:%M:%S%.6f")
    return cells.cast(pl.String)
