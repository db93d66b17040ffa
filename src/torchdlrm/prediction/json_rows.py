"""Converts JSON rows to typed columns, reading cells as in a log; and back.

In: rows as mappings from column name to cell.  Out: a frame of the types that a parsed log has (`features.cells`).
Cost: half a millisecond for one row of Criteo's 39 features, a millisecond for 256.

A column is called by its `name`, or by its `header_name`, as in a log.

| cell | read as |
| --- | --- |
| absent, null, or an empty text | missing; so is what the column's `null_values` name |
| text | what the same text means in a log |
| a number | itself, in int and float columns; for hex, which is digits of text, an error; for string, its text |
| a list | the values of a multi-valued column, with a weight behind one's separator where the column has weights |
| an object | where the column has weights: the weight of each value |

A text of more than 65,536 characters, or a list of more values, is refused: there is no end to what it could cost.

Rows may share some of their cells, as those of one user with many candidates do (`SharedRows`): these are never written
out, as there would be as many copies of them as there are rows.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, overload

import polars as pl

from torchdlrm.errors import RowError, shown
from torchdlrm.features.bad_rows import REASONS, BadRow, BadRows
from torchdlrm.features.casts import without_null_values
from torchdlrm.features.cells import text_frame, to_typed_columns, typed_cells, written_cells
from torchdlrm.features.columns import Column, Feature, LabelColumn, SparseColumn
from torchdlrm.features.kinds import FLOAT
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import cells_of_json, is_vector

MAX_CELL_CHARACTERS = 1 << 16  # or values, where the cell is a list
_MISSING, _TEXT = type(None), {str, type(None)}

Row = Mapping[str, object]
# Cells in common, and rows of which each has other cells of its own.
Part = tuple[Row, Sequence[Row]]


class SharedRows(Sequence[Row]):
    """Rows in parts, one after another.

    Args:
        parts: none of their rows has a column that the part has in common.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = parts
        self._num_rows = sum(len(rows) for _, rows in parts)

    def __len__(self) -> int:
        return self._num_rows

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        """A row, or some, with all their cells."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        for shared, rows in self.parts:
            if place < len(rows):
                return {**shared, **rows[place]}
            place -= len(rows)
        raise IndexError(index)


def parts_of(rows: Sequence[Row]) -> Sequence[Part]:
    """The parts of rows, whichever way they are held."""
    return rows.parts if isinstance(rows, SharedRows) else [({}, rows)]


def joined(requests: Sequence[Sequence[Row]]) -> Sequence[Row]:
    """The rows of some requests, one after another."""
    if not any(isinstance(rows, SharedRows) for rows in requests):
        return requests[0] if len(requests) == 1 else [row for rows in requests for row in rows]
    return SharedRows([part for rows in requests for part in parts_of(rows)])


def cells_of(parts: Sequence[Part], names: Sequence[str]) -> list[Any]:
    """The cells of columns, one column after another, each of all rows; None where a row has none."""
    if len(parts) == 1 and not parts[0][0]:
        rows = parts[0][1]
        return [row.get(name) for name in names for row in rows]
    cells: list[Any] = []
    for name in names:
        for shared, rows in parts:
            cells += [shared[name]] * len(rows) if name in shared else [row.get(name) for row in rows]
    return cells


class RowNames:
    """What rows call the columns of a schema: by `name`, or by `header_name` where that is no column's name."""

    def __init__(self, schema: FeatureSchema) -> None:
        self._features = schema.features
        self._names = frozenset(column.name for column in schema.columns)
        others = [column for column in schema.columns if column.log_name not in self._names]
        self._header_names = {column.name: column.log_name for column in others}
        self.known = self._names.union(self._header_names.values())

    def keys(self, column: Column) -> Collection[str]:
        """What a row may call a column."""
        return dict.fromkeys((column.name, self._header_names.get(column.name, column.name)))

    def named(self, row: Row, number: int | None) -> Row:
        """A row with each cell by its column's `name`: the same one where that is so; `number` None: `shared`.

        Raises:
            RowError: a column that the schema does not have, or one that is there by both its names.
        """
        if self._names.issuperset(row):
            return row
        where = "shared" if number is None else f"row {number}"
        if not self.known.issuperset(row):
            unknown = next(name for name in row if name not in self.known)
            has = ", ".join(column.name for column in self._features)
            msg = f"{where}, column {shown(unknown)}: the model has no such column; it has {has}"
            raise RowError(msg)
        named = {name: cell for name, cell in row.items() if name in self._names}
        for name, header_name in self._header_names.items():
            if header_name in row and name in row:
                msg = f"{where}, column {name!r}: is also there as {header_name!r}, its header_name; leave one out"
                raise RowError(msg)
            if header_name in row:
                named[name] = row[header_name]
        return named


class RowReader:
    """Reads rows of a schema; safe to use from many threads.

    Args:
        schema: the columns; a label is read where a row has one, and other columns that are no features are not.
    """

    def __init__(self, schema: FeatureSchema) -> None:
        self._schema = schema
        self._features = schema.features
        self._names = RowNames(schema)
        alike: dict[tuple[object, ...], list[Feature]] = {}
        self._lists: list[Feature] = []
        for column in self._features:
            if column.is_multi_valued:
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
        parts = self._named(parts_of(rows))
        label = self._schema.label
        try:
            typed = {column.name: self._typed_column(parts, column) for column in self._lists}
            for group in self._groups:
                typed |= self._typed_group(parts, group)
            columns = [typed[column.name] for column in self._features]
            if any(cell is not None for cell in cells_of(parts, [label.name])):
                columns.append(self._typed_column(parts, label))
        except UnicodeEncodeError as error:
            msg = f"a row holds the text {shown(error.object)}, which is not Unicode: a surrogate stands alone"
            raise RowError(msg) from error
        return pl.DataFrame(columns)

    def _named(self, parts: Sequence[Part]) -> Sequence[Part]:
        start, named = 0, []
        for shared, rows in parts:
            common = self._named_row(shared, start, {})
            named.append((common, [self._named_row(row, i, common) for i, row in enumerate(rows, start)]))
            start += len(rows)
        return named

    def _named_row(self, row: object, number: int, shared: Row) -> Row:
        if not isinstance(row, Mapping):
            msg = f"row {number}: expected the row's cells by column name, not {shown(row)}"
            raise RowError(msg)
        named = self._names.named(row, number)
        if named is not row and not shared.keys().isdisjoint(named):
            raise RowError(in_shared_too(number, next(name for name in named if name in shared)))
        return named

    def _typed_column(self, parts: Sequence[Part], column: Column) -> pl.Series:
        """A column as the reader of logs has it; a label may be missing, as in any row to predict."""
        cells = cells_of(parts, [column.name])
        bad_rows = BadRows()
        layout = self._schema.with_columns([column])
        if is_vector(column):
            vectors, faults = cells_of_json(cells, column)
            for i, fault in faults.items():
                bad_rows.add(column.kind, 1, [BadRow(line=i + 1, column=column.name, value=fault)])
            text = vectors.to_frame()
        elif isinstance(column, SparseColumn) and column.is_multi_valued:
            lists = [_list(cell, column, i) for i, cell in enumerate(cells)]
            text = pl.DataFrame({column.name: lists}, schema={column.name: pl.List(pl.String)})
        else:
            texts = [_text(cell, column, i) for i, cell in enumerate(cells)]
            text = text_frame(layout, {column.name: texts})
        typed, _ = to_typed_columns(text, layout, bad_rows, is_label_optional=True)
        check_cells(bad_rows)
        return typed[column.name]

    def _typed_group(self, parts: Sequence[Part], group: Sequence[Feature]) -> dict[str, pl.Series]:
        """Columns of one kind: their cells one after another as a single column."""
        cells = cells_of(parts, [column.name for column in group])
        num_rows = len(cells) // len(group)
        together = _numbers(cells, group[0])
        if together is not None:
            together = without_null_values(together, group[0])
        else:
            if not _TEXT.issuperset(map(type, cells)) or "" in cells or _has_long(cells):
                columns = (column for column in group for _ in range(num_rows))
                numbers = (i for _ in group for i in range(num_rows))
                cells = [_text(*cell) for cell in zip(cells, columns, numbers, strict=True)]
            together, is_clean = typed_cells(pl.Series(cells, dtype=pl.String), group[0])
            if not is_clean:  # one of them has a bad cell; which, and where?
                return {column.name: self._typed_column(parts, column) for column in group}
        return {
            column.name: together.slice(i * num_rows, num_rows).alias(column.name) for i, column in enumerate(group)
        }


def _numbers(cells: Sequence[object], column: Feature) -> pl.Series | None:
    """Cells that are JSON numbers of the column's kind, or missing; None where any is something else."""
    types = set(map(type, cells)) - {_MISSING}
    if not types or not types <= column.value_kind.json_types - {str}:
        return None
    try:
        if types == {int}:
            numbers = pl.Series(cells, dtype=pl.Int64)
        else:
            numbers = pl.Series([None if cell is None else float(cell) for cell in cells], dtype=pl.Float64)  # type: ignore[arg-type]  # as just seen
    except (OverflowError, TypeError):
        return None  # too large: reading it as text reports where it is
    typed, bad = column.value_kind.from_numbers(numbers)
    return typed if bad is None and typed.null_count() == numbers.null_count() else None  # NaN is no number in JSON


def in_shared_too(row: int, name: str) -> str:
    """Says that a candidate has a cell that its request's candidates have in common."""
    return f"row {row}, column {name!r}: stands in 'shared' and in the candidate; leave it out of one"


def check_cells(bad_rows: BadRows) -> None:
    """Refuse rows of which some are bad.

    Raises:
        RowError: one is; names the row, from 0, and the column.
    """
    for reason, examples in bad_rows.examples.items():
        example = examples[0]
        msg = f"row {example.line - 1}, column {example.column!r}: {REASONS[reason]}: {shown(example.value)}"
        raise RowError(msg)


def _has_long(cells: Sequence[str | None]) -> bool:
    return max(map(len, filter(None, cells)), default=0) > MAX_CELL_CHARACTERS


def _list(cell: object, column: SparseColumn, row: int) -> list[str | None] | None:
    """A cell of several values, as the values' texts; empty ones are left out later, as in a log."""
    if isinstance(cell, Mapping) and column.weight_separator is not None:
        cell = [f"{value}{column.weight_separator}{_weight(cell[value], column, row)}" for value in cell]
    if isinstance(cell, list | tuple):
        if len(cell) > MAX_CELL_CHARACTERS:
            raise RowError(too_long(row, column, len(cell), "values"))
        return [_text(value, column, row) or "" for value in cell]
    text = _text(cell, column, row)
    return None if text is None or text in (column.null_values or ()) else list(text.split(column.value_separator))


def _weight(weight: object, column: SparseColumn, row: int) -> float:
    if isinstance(weight, int | float) and not isinstance(weight, bool):
        return weight
    msg = f"row {row}, column {column.name!r}: the weight of a value is a number, not {shown(weight)}"
    raise RowError(msg)


def _text(cell: object, column: Column, row: int) -> str | None:
    """A cell as a log would have it."""
    if cell is None or cell == "":
        return None
    if isinstance(cell, str):
        if len(cell) > MAX_CELL_CHARACTERS:
            raise RowError(too_long(row, column, len(cell), "characters"))
        return cell
    if isinstance(cell, bool):
        if isinstance(column, LabelColumn):
            return str(cell).lower()
    elif isinstance(cell, int | float):
        try:
            text = (column.value_kind if isinstance(column, Feature) else FLOAT).text_of_number(cell)
        except ValueError as error:
            msg = f"row {row}, column {column.name!r}: {error}"
            raise RowError(msg) from error
        if text is not None:
            return text
    msg = f"row {row}, column {column.name!r}: {_expected(column)}, not {shown(cell)}"
    raise RowError(msg)


def too_long(row: object, column: Column, count: object, what: str) -> str:
    """Says that a cell is beyond `MAX_CELL_CHARACTERS`."""
    return (
        f"row {row}, column {column.name!r}: the cell has {count:,} {what}; at most {MAX_CELL_CHARACTERS:,} are taken"
    )


def _expected(column: Column) -> str:
    assert isinstance(column, LabelColumn | Feature), "only features and labels are read"
    if isinstance(column, LabelColumn):
        return "a label is 0 or 1"
    expected = f"expected {column.value_kind.expected}"
    if isinstance(column, SparseColumn) and column.weight_separator is not None:
        return f"{expected}, a list of such, or an object of their weights"
    return f"{expected}, or a list of such" if column.is_multi_valued else expected


def rows_as_logged(frame: pl.DataFrame, schema: FeatureSchema) -> list[dict[str, object]]:
    """The features of typed rows by column name, as a log has them, missing ones too."""
    return pl.DataFrame([written_cells(frame[column.name], column) for column in schema.features]).to_dicts()


def as_json_rows(frame: pl.DataFrame, schema: FeatureSchema) -> list[dict[str, object]]:
    """The same without the missing ones; what `RowReader` reads as the same rows."""
    return [{name: cell for name, cell in row.items() if cell is not None} for row in rows_as_logged(frame, schema)]
