"""Tensors of few rows -> rows by column name, as JSON gives them: those are encoded in a fraction of the time.

In: tensors with their columns.  Out: cells that mean what the tensors mean in `columns.py`, or nothing where a value is
not plainly one of its column: then that is the way, and it tells what is wrong.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

from torchdlrm.features.schema import DenseColumn, SparseColumn
from torchdlrm.serving.open_inference.tensors import BYTES, Tensor

Feature = DenseColumn | SparseColumn


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
    is_text = tensor.datatype == BYTES
    if isinstance(column, SparseColumn):
        if column.is_multi_valued or not (is_text or tensor.values.dtype.is_integer()):
            return None
        return _SPARSE_CELLS.get((column.kind, is_text))
    if is_text:
        return None
    if tensor.values.dtype.is_integer():
        return int
    return _whole_or_missing if column.kind == "int" else _number_or_missing


def _as_digits(value: int) -> str:
    if not 0 <= value < 2**32:
        raise ValueError
    return f"{value:08x}"


def _number_or_missing(value: float) -> float | None:
    return None if math.isnan(value) else value


def _whole_or_missing(value: float) -> int | None:
    if math.isnan(value):
        return None
    if not value.is_integer():
        raise ValueError
    return int(value)


_SPARSE_CELLS: dict[tuple[str, bool], Callable[[Any], object]] = {
    ("hex", True): str,
    ("string", True): str,
    ("hex", False): _as_digits,
    ("int", False): int,
}
