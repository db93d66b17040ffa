"""Rows as JSON has them -> typed columns, by the same reading of cells as a log's.

In: rows as mappings from column name to cell.  Out: a frame of the types that `torchdlrm.data.log` gives.  Cost: half a
millisecond for one row of Criteo's 39 features, a millisecond for 256.

| cell | read as |
| --- | --- |
| absent, null, or an empty text | missing; so is what the column's `null_values` name |
| text | what the same text means in a log |
| a number | itself, in int and float columns; for hex, which is digits of text, an error; for string, its text |
| a list | the values of a multi-valued column |
"""

from collections.abc import Mapping, Sequence

import polars as pl

from torchdlrm.data.bad_rows import REASONS, BadRows
from torchdlrm.data.log.cells import text_frame, to_typed_columns, typed_cells, without_null_values
from torchdlrm.errors import RowError
from torchdlrm.schema import Column, DenseColumn, FeatureSchema, IgnoredColumn, LabelColumn, SparseColumn, TimeColumn

Row = Mapping[str, object]
_MISSING, _TEXT = type(None), {str, type(None)}


class RowReader:
    """Reads rows of a schema; safe to use from many threads.

    Args:
        schema: the columns; a label is read where a row has one, and other columns that are no features are not.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        self._schema = schema
        self._features: list[DenseColumn | SparseColumn] = [*schema.dense, *schema.sparse]
        self._names = frozenset(column.name for column in schema.columns)
        alike: dict[tuple[object, ...], list[DenseColumn | SparseColumn]] = {}
        self._lists: list[SparseColumn] = []
        for column in self._features:
            if isinstance(column, SparseColumn) and column.is_multi_valued:
                self._lists.append(column)
            else:
                alike.setdefault((column.role, column.kind, column.null_values), []).append(column)
        # Columns of the same kind are cast as one: the cost of few rows is that of the casts.
        self._groups = list(alike.values())

    def read(self, rows: Sequence[Row]) -> pl.DataFrame:
        """Read B rows; what a row does not name is missing.

        Returns:
            The features in the order of the schema, and the label (Int8, nullable) if a row has one; B rows.

        Raises:
            RowError: a column that the schema does not have, or a cell that does not fit; names the row, from 0.
        """
        self._check_names(rows)
        label = self._schema.label
        try:
            typed = {column.name: _typed_alone(rows, column, self._schema) for column in self._lists}
            for group in self._groups:
                typed |= self._typed_group(rows, group)
            columns = [typed[column.name] for column in self._features]
            if any(row.get(label.name) is not None for row in rows):
                columns.append(_typed_alone(rows, label, self._schema))
        except UnicodeEncodeError as error:
            msg = f"a row holds the text {error.object!r:.80}, which is not Unicode: a surrogate stands alone"
            raise RowError(msg) from error
        return pl.DataFrame(columns)

    def _check_names(self, rows: Sequence[object]) -> None:
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                msg = f"row {i}: expected the row's cells by column name, not {row!r:.80}"
                raise RowError(msg)
            if not self._names.issuperset(row):
                unknown = next(name for name in row if name not in self._names)
                has = ", ".join(column.name for column in self._features)
                msg = f"row {i}, column {unknown!r}: the model has no such column; it has {has}"
                raise RowError(msg)

    def _typed_group(self, rows: Sequence[Row], group: Sequence[DenseColumn | SparseColumn]) -> dict[str, pl.Series]:
        """Columns of one kind: their cells one after another as a single column."""
        cells = [row.get(column.name) for column in group for row in rows]
        together = _numbers(cells, group[0])
        if together is not None:
            together = without_null_values(together, group[0])
        else:
            if not _TEXT.issuperset(map(type, cells)) or "" in cells:
                columns = (column for column in group for _ in rows)
                numbers = (i for _ in group for i in range(len(rows)))
                cells = [_text(*cell) for cell in zip(cells, columns, numbers, strict=True)]
            together, is_clean = typed_cells(pl.Series(cells, dtype=pl.String), group[0])
            if not is_clean:  # one of them has a bad cell; which, and where?
                return {column.name: _typed_alone(rows, column, self._schema) for column in group}
        return {
            column.name: together.slice(i * len(rows), len(rows)).alias(column.name) for i, column in enumerate(group)
        }


def _numbers(cells: Sequence[object], column: DenseColumn | SparseColumn) -> pl.Series | None:
    """Cells that are JSON numbers of the column's kind, or missing; None where any is something else."""
    kinds = set(map(type, cells)) - {_MISSING}
    try:
        if column.kind == "int" and kinds == {int}:
            return pl.Series(cells, dtype=pl.Int64)
        if column.kind == "float" and kinds and kinds <= {int, float}:
            numbers = pl.Series([None if cell is None else float(cell) for cell in cells], dtype=pl.Float64)  # type: ignore[arg-type]  # as just seen
            return numbers if numbers.is_finite().all() else None
    except (OverflowError, TypeError):
        return None  # too large: read as text it is told where
    return None


def _typed_alone(rows: Sequence[Row], column: Column, schema: FeatureSchema) -> pl.Series:
    """A column as the reader of logs has it; a label may be missing, as in any row to predict."""
    bad_rows = BadRows()
    layout = schema.with_columns([column])
    if isinstance(column, SparseColumn) and column.is_multi_valued:
        lists = [_list(row.get(column.name), column, i) for i, row in enumerate(rows)]
        text = pl.DataFrame({column.name: lists}, schema={column.name: pl.List(pl.String)})
    else:
        cells = [_text(row.get(column.name), column, i) for i, row in enumerate(rows)]
        text = text_frame(layout, {column.name: cells})
    typed, _ = to_typed_columns(text, layout, bad_rows, is_label_optional=True)
    for reason, examples in bad_rows.examples.items():
        msg = f"row {examples[0].line - 1}, column {column.name!r}: {REASONS[reason]}: {examples[0].value!r}"
        raise RowError(msg)
    return typed[column.name]


def _list(cell: object, column: SparseColumn, row: int) -> list[str | None] | None:
    """A cell of several values, as the values' texts; empty ones are left out later, as in a log."""
    if isinstance(cell, list | tuple):
        return [_text(value, column, row) or "" for value in cell]
    text = _text(cell, column, row)
    return None if text is None or text in (column.null_values or ()) else list(text.split(column.value_separator))


def _text(cell: object, column: Column, row: int) -> str | None:
    """A cell as a log would have it."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        if isinstance(column, LabelColumn):
            return str(cell).lower()
    elif isinstance(cell, int | float) and not (isinstance(column, SparseColumn) and column.kind == "hex"):
        # JavaScript writes 3 for 3.0, others 3.0 for 3: as numbers they are the same.
        if not (isinstance(cell, float) and cell.is_integer() and getattr(column, "kind", "") == "int"):
            return str(cell)
        if abs(cell) <= 2**53:
            return str(int(cell))
        # Parsers of JSON make a float of an integer of more than 64 bits.
        msg = f"row {row}, column {column.name!r}: the float {cell!r} may have been rounded; send an integer of 64 bits"
        raise RowError(msg)
    msg = f"row {row}, column {column.name!r}: {_expected(column)}, not {cell!r:.80}"
    raise RowError(msg)


def _expected(column: Column) -> str:
    assert not isinstance(column, TimeColumn | IgnoredColumn), "only features and labels are read"
    if isinstance(column, LabelColumn):
        return "a label is 0 or 1"
    what = {
        "int": "an integer",
        "float": "a number",
        "hex": "hexadecimal digits as text, such as '68fd1e64'",
        "string": "text",
    }[column.kind]
    several = isinstance(column, SparseColumn) and column.is_multi_valued
    return f"expected {what}, or a list of such" if several else f"expected {what}"
