"""Rows as JSON has them -> typed columns, by the same reading of cells as a log's.

In: rows as mappings from column name to cell.  Out: a frame of the types that `torchdlrm.data.log` gives.  Cost: half a
millisecond for one row of Criteo's 39 features, a millisecond for 256.

| cell | read as |
| --- | --- |
| absent, null, or an empty text | missing |
| text | what the same text means in a log |
| a number | itself, in int and float columns; for hex, which is digits of text, an error; for string, its text |
| a list | the values of a multi-valued column |
"""

from collections.abc import Mapping, Sequence

import polars as pl

from torchdlrm.data.bad_rows import REASONS, BadRows
from torchdlrm.data.log.cells import text_frame, to_typed_columns, typed_cells
from torchdlrm.errors import RowError
from torchdlrm.schema import Column, DenseColumn, FeatureSchema, IgnoredColumn, LabelColumn, SparseColumn, TimeColumn

Row = Mapping[str, object]
_PLAIN = {str, type(None)}


def parse_rows(rows: Sequence[Row], schema: FeatureSchema) -> pl.DataFrame:
    """Read rows; what a row does not name is missing.

    Args:
        rows: B rows by column name.
        schema: the columns; a label is read where a row has one, and other columns that are no features are not.

    Returns:
        The features in the order of the schema, and the label (Int8, nullable) if a row has one; B rows.

    Raises:
        RowError: a column that the schema does not have, or a cell that does not fit; names row (from 0) and column.
    """
    _check_names(rows, schema)
    try:
        columns = _typed_features(rows, schema)
        if any(row.get(schema.label.name) is not None for row in rows):
            columns.append(_typed_label(rows, schema.label, schema))
    except UnicodeEncodeError as error:
        msg = f"a row holds the text {error.object!r:.80}, which is not Unicode: half of a surrogate pair stands alone"
        raise RowError(msg) from error
    return pl.DataFrame(columns)


def _check_names(rows: Sequence[object], schema: FeatureSchema) -> None:
    names = frozenset(column.name for column in schema.columns)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            msg = f"row {i}: expected the row's cells by column name, not {row!r:.80}"
            raise RowError(msg)
        if not names.issuperset(row):
            unknown = next(name for name in row if name not in names)
            has = ", ".join(column.name for column in _features(schema))
            msg = f"row {i}, column {unknown!r}: the model has no such column; it has {has}"
            raise RowError(msg)


def _features(schema: FeatureSchema) -> list[DenseColumn | SparseColumn]:
    return [*schema.dense, *schema.sparse]


def _typed_features(rows: Sequence[Row], schema: FeatureSchema) -> list[pl.Series]:
    """The features, columns of the same kind cast as one: the cost of few rows is that of the casts."""
    alike: dict[tuple[str, str], list[DenseColumn | SparseColumn]] = {}
    typed: dict[str, pl.Series] = {}
    for column in _features(schema):
        if isinstance(column, SparseColumn) and column.is_multi_valued:
            typed[column.name] = _typed_alone(rows, column, schema)
        else:
            alike.setdefault((column.role, column.kind), []).append(column)
    for group in alike.values():
        cells = [cell for column in group for cell in _cells(rows, column)]
        together, is_clean = typed_cells(pl.Series(cells, dtype=pl.String), group[0])
        for i, column in enumerate(group):
            if is_clean:
                typed[column.name] = together.slice(i * len(rows), len(rows)).alias(column.name)
            else:
                typed[column.name] = _typed_alone(rows, column, schema)
    return [typed[column.name] for column in _features(schema)]


def _typed_label(rows: Sequence[Row], label: LabelColumn, schema: FeatureSchema) -> pl.Series:
    """The labels: of a log no label may be missing, here it may."""
    there = [i for i, row in enumerate(rows) if row.get(label.name) is not None]
    typed = _typed_alone([rows[i] for i in there], label, schema, there)
    labels: list[int | None] = [None] * len(rows)
    for i, value in zip(there, typed.to_list(), strict=True):
        labels[i] = value
    return pl.Series(label.name, labels, dtype=typed.dtype)


def _typed_alone(
    rows: Sequence[Row], column: Column, schema: FeatureSchema, numbers: Sequence[int] | None = None
) -> pl.Series:
    """A column as the reader of logs has it; `numbers` are those of the rows, where they are not 0, 1, ..."""
    bad_rows = BadRows()
    layout = schema.with_columns([column])
    if isinstance(column, SparseColumn) and column.is_multi_valued:
        lists = [_list(row.get(column.name), column, i) for i, row in enumerate(rows)]
        text = pl.DataFrame({column.name: lists}, schema={column.name: pl.List(pl.String)})
    else:
        text = text_frame(layout, {column.name: _cells(rows, column, numbers)})
    typed, _ = to_typed_columns(text, layout, bad_rows)
    for reason, examples in bad_rows.examples.items():
        row = examples[0].line - 1
        at = row if numbers is None else numbers[row]
        msg = f"row {at}, column {column.name!r}: {REASONS[reason]}: {examples[0].value!r}"
        raise RowError(msg)
    return typed[column.name]


def _cells(rows: Sequence[Row], column: Column, numbers: Sequence[int] | None = None) -> list[str | None]:
    name = column.name
    cells = [row.get(name) for row in rows]
    # Nearly always only text: then nothing is done for each cell by itself.
    if _PLAIN.issuperset(map(type, cells)) and "" not in cells:
        return cells  # type: ignore[return-value]  # as just seen
    return [_text(cell, column, i if numbers is None else numbers[i]) for i, cell in enumerate(cells)]


def _list(cell: object, column: SparseColumn, row: int) -> list[str | None] | None:
    """A cell of several values, as the values' texts; empty ones are left out later, as in a log."""
    if isinstance(cell, list | tuple):
        return [_text(value, column, row) or "" for value in cell]
    text = _text(cell, column, row)
    return None if text is None else list(text.split(column.value_separator))


def _text(cell: object, column: Column, row: int) -> str | None:
    """A cell as a log would have it."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        if isinstance(column, LabelColumn):
            return str(int(cell))
    elif isinstance(cell, int | float) and not (isinstance(column, SparseColumn) and column.kind == "hex"):
        # JavaScript writes 3 for 3.0, others 3.0 for 3: as numbers they are the same.
        whole = isinstance(cell, float) and cell.is_integer() and getattr(column, "kind", "") == "int"
        return str(int(cell)) if whole else str(cell)
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
