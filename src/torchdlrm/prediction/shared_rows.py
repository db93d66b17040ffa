"""Holds rows that share some of their cells: those of one user with many candidates.

In: the cells in common once, and what each row has of its own.  Out: the cells of a column.  The rows are never
written out: of the cells in common there would be as many copies as there are rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any, overload

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
