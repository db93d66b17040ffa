"""Reads vectors of a fixed size, as of a text or a picture: cells -> lists of Float32 -> what the model reads.

Numbers are taken as float32.  With the transform `unit` they are divided by their root mean square, in float64; then
they are rounded to the type that the dataset stores, wherever a model reads them.  A row of zeros is a missing vector,
in the dataset and in a batch: the model has a learnt one for it.

B rows, S numbers of a vector.
"""

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeGuard

import numpy as np
import orjson
import polars as pl
from numpy.typing import NDArray

from torchdlrm.errors import shown
from torchdlrm.features.columns import Column, DenseColumn

_BLOCK_ROWS = 1_024
_NO_LIST = [math.nan]


def is_vector(column: Column) -> TypeGuard[DenseColumn]:
    """Whether a column holds vectors."""
    return isinstance(column, DenseColumn) and column.is_multi_valued


def encode_vectors(vectors: pl.Series, column: DenseColumn) -> pl.Series:
    """A typed column as the dataset has it: lists of `stored`, of zeros where one is missing."""
    return pl.Series(column.name, encoded_rows(rows_of(vectors, column), column)).arr.to_list()


def encoded_rows(rows: NDArray[np.float32], column: DenseColumn) -> NDArray[Any]:
    """What the model reads of vectors [B, S], zeros where one is missing: [B, S] of the type `stored`."""
    encoded = np.zeros(rows.shape, column.stored)
    most = np.finfo(encoded.dtype).max
    for start in range(0, len(rows), _BLOCK_ROWS):
        x = rows[start : start + _BLOCK_ROWS].astype(np.float64)
        if column.transform == "unit":
            x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True)).clip(np.finfo(np.float64).tiny)
        encoded[start : start + _BLOCK_ROWS] = x.clip(-most, most)
    return encoded


def rows_of(lists: pl.Series, column: DenseColumn) -> NDArray[np.float32]:
    """The numbers of a column: [B, S], zeros where a list is null."""
    rows = np.zeros((len(lists), column.size or 0), np.float32)
    rows[lists.is_not_null().to_numpy()] = lists.drop_nulls().explode().to_numpy().reshape(-1, rows.shape[1])
    return rows


def typed_vectors(cells: pl.Series, column: DenseColumn) -> tuple[pl.Series, NDArray[np.bool_]]:
    """Cells as lists of S finite numbers, Float32, null where one is missing, zero or bad; and which are bad, [B].

    Args:
        cells: texts, each a list of JSON or numbers between commas; or lists, Arrow's of a fixed size too.
        column: of kind vector.
    """
    if isinstance(cells.dtype, pl.Array):
        cells = cells.arr.to_list()
    elif not isinstance(cells.dtype, pl.List):
        texts = cells.cast(pl.String).str.strip_chars("[ ]").replace("", None)
        cells = texts.str.split(",").list.eval(pl.element().str.strip_chars())
    lengths = cells.list.len().fill_null(0).to_numpy()
    is_good = lengths == column.size
    # By way of float64, so that a number is rounded alike wherever it comes from.
    numbers = cells.filter(pl.Series(is_good)).explode().cast(pl.Float64, strict=False).cast(pl.Float32)
    rows = np.zeros((len(cells), column.size or 0), np.float32)
    rows[is_good] = numbers.to_numpy().reshape(-1, rows.shape[1])
    is_good &= np.isfinite(rows).all(axis=1)
    lists = pl.Series(column.name, rows).arr.to_list()
    typed = pl.select(pl.when(pl.Series(is_good & rows.any(axis=1))).then(lists)).to_series()
    return typed, ~is_good & (lengths > 0)


def cells_of_json(cells: Sequence[Any], column: DenseColumn) -> tuple[pl.Series, dict[int, str]]:
    """Cells of JSON, arrays of NumPy and texts as lists of Float64; and, by its place, which is no list, in words."""
    nulls = ("", *(column.null_values or ()))
    is_null = [cell is None or (isinstance(cell, str) and cell in nulls) for cell in cells]
    lists = [None if null else _numbers_of(cell) for cell, null in zip(cells, is_null, strict=True)]
    faults = {i: f"no list of {column.size} numbers: {shown(cells[i])}" for i, of in enumerate(lists) if of is _NO_LIST}
    return pl.Series(column.name, lists, pl.List(pl.Float64)), faults


def plain_rows(cells: Sequence[Any], column: DenseColumn) -> NDArray[np.float32]:
    """Plain cells of JSON as `rows_of` has them, in microseconds: [B, S]; raises ValueError where one is not plain."""
    rows = np.array([[0.0] * (column.size or 0) if cell is None else _numbers_of(cell) for cell in cells])
    if rows.shape[1:] != (column.size,) or not (np.abs(rows) <= np.finfo(np.float32).max).all():
        raise ValueError("a cell is not plain")
    return rows.astype(np.float32)


def _numbers_of(cell: Any) -> list[float]:
    with suppress(TypeError, ValueError, OverflowError):
        values = (
            orjson.loads(f"[{cell.strip('[ ]')}]") if isinstance(cell, str) else getattr(cell, "tolist", lambda: cell)()
        )
        if isinstance(values, list | tuple) and {float, int}.issuperset(map(type, values)):
            return [*map(float, values)]
    return _NO_LIST
