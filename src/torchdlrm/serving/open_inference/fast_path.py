"""Tensors of few rows -> rows by column name, as JSON gives them: those are encoded in a fraction of the time.

In: tensors with their columns.  Out: cells that mean what the tensors mean in `columns.py`, or nothing where a value is
not plainly one of its column: then that is the way, and it tells what is wrong.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torchdlrm.features.schema import Feature, SparseColumn
from torchdlrm.serving.open_inference.tensors import BYTES, Tensor


def few_rows(placed: Sequence[tuple[Tensor, Sequence[Feature]]]) -> list[dict[str, object]] | None:
    """The rows by column name, or None where a value is not plainly one of its column.

    Args:
        placed: tensors of N rows, each with the columns that it holds.
    """
    rows: list[dict[str, object]] = [{} for _ in range(placed[0][0].shape[0])]
    for tensor, columns in placed:
        values = tensor.values.to_list()
        for i, column in enumerate(columns):
            as_cell = _as_cell(tensor, column)
            if as_cell is None:
                return None
            try:
                for row, value in zip(rows, values[i :: len(columns)], strict=True):
                    row[column.name] = None if value is None else as_cell(value)
            except (ValueError, OverflowError):
                return None
    return rows


def _as_cell(tensor: Tensor, column: Feature) -> Callable[[Any], object] | None:
    """What makes a value of the tensor a cell as JSON has it, or raises ValueError; None: nothing does."""
    given = "text" if tensor.datatype == BYTES else "integer" if tensor.values.dtype.is_integer() else "float"
    if column.is_multi_valued or (given == "float" and isinstance(column, SparseColumn)):
        return None
    return column.value_kind.cell_of.get(given)
