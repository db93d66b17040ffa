"""Typed columns -> cells as a log has them: for the scores of a file, and for rows sent to a server."""

import polars as pl
import pyarrow as pa

from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vocabulary import hex_digits


def as_json_rows(frame: pl.DataFrame, schema: FeatureSchema) -> list[dict[str, object]]:
    """The features of each row by column name, without the missing ones; what `RowReader` reads as the same rows."""
    features = [column.name for column in (*schema.dense, *schema.sparse)]
    written = pl.DataFrame([format_cells(frame[name], schema, as_text=False) for name in features])
    return [{name: cell for name, cell in row.items() if cell is not None} for row in written.iter_rows(named=True)]


def format_cells(cells: pl.Series, schema: FeatureSchema, *, as_text: bool) -> pl.Series:
    """A column as a log has it: hex values as digits; lists as lists, or in a CSV file joined."""
    column = next((column for column in schema.sparse if column.name == cells.name), None)
    if column is None:
        return cells
    if column.kind == "hex" and column.is_multi_valued:
        lists = cells.fill_null([])
        flat = hex_digits(lists.explode(empty_as_null=False))
        offsets = pa.concat_arrays([pa.array([0], pa.int64()), lists.list.len().cum_sum().cast(pl.Int64).to_arrow()])
        digits = pl.Series(cells.name, pa.LargeListArray.from_arrays(offsets, flat.to_arrow().cast(pa.large_string())))
        cells = pl.select(pl.when(cells.is_not_null()).then(digits).alias(cells.name)).to_series()
    elif column.kind == "hex":
        return hex_digits(cells)
    if column.is_multi_valued and as_text:
        return cells.cast(pl.List(pl.String)).list.join(column.value_separator or "")
    return cells
