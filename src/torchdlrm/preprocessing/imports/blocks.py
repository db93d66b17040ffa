"""Defines what every importer yields: encoded rows, a block at a time.

In: the files of one format.  Out: `Blocks`, the rows of the files that belong together, one group (a day, a split)
after the other; each block is a frame of the label (Int8), dense columns (Float32) and sparse ones (Int32, or lists).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.data.splits import SplitName
from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema

BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Blocks:
    """The rows of files that belong together, read when asked for.

    `name` is what messages call them; `split` the split they belong to, None where a rule decides; `files` their paths.
    """

    name: str
    num_rows: int
    files: tuple[Path, ...]
    split: SplitName | None
    read: Callable[[], Iterator[pl.DataFrame]]


def encoded_schema(name: str, dense: Sequence[str], sparse: Sequence[str], lists: Sequence[str] = ()) -> FeatureSchema:
    """A schema of columns that are encoded already: dense as they are, sparse integers."""
    return FeatureSchema(
        name=name,
        columns=(
            LabelColumn(name="label"),
            *(DenseColumn(name=column, kind="float", transform="none") for column in dense),
            *(
                SparseColumn(name=column, kind="int", value_separator="," if column in lists else None)
                for column in sparse
            ),
        ),
    )


def as_labels(values: np.ndarray, where: str, first_row: int) -> pl.Series:
    """0 and 1 of any type, as Int8.

    Raises:
        LogError: another value stands there.
    """
    flat = values.reshape(-1)
    bad = np.flatnonzero((flat != 0) & (flat != 1))
    if len(bad):
        msg = f"{where}, row {first_row + int(bad[0]) + 1:,}: the label is {flat[bad[0]]}, neither 0 nor 1"
        raise LogError(msg)
    return pl.Series("label", flat.astype(np.int8))


def as_dense(values: np.ndarray, name: str, where: str, first_row: int) -> pl.Series:
    """Finite numbers as Float32.

    Raises:
        LogError: one is not finite.
    """
    flat = np.ascontiguousarray(values.reshape(-1), dtype=np.float32)
    bad = np.flatnonzero(~np.isfinite(flat))
    if len(bad):
        msg = f"{where}, row {first_row + int(bad[0]) + 1:,}, column {name}: {flat[bad[0]]} is not a finite number"
        raise LogError(msg)
    return pl.Series(name, flat)


def as_ids(values: np.ndarray, name: str, where: str, first_row: int, limit: int | None) -> np.ndarray:
    """Ids as int32, in the shape they have.

    Args:
        values: integers of any type, the first axis rows.
        name: the feature.
        where: the file, for messages.
        first_row: the row of the first.
        limit: the rows of the feature's table, None where they are not known.

    Raises:
        LogError: an id is negative, not below `limit`, or does not fit int32.
    """
    if not np.issubdtype(values.dtype, np.integer):
        msg = f"{where}, column {name}: ids are integers, and these are {values.dtype}"
        raise LogError(msg)
    highest = 2**31 - 2 if limit is None else limit - 1
    bad = (values < 0) | (values > highest)
    if bad.any():
        at = tuple(index[0] for index in np.nonzero(bad))
        size = f"the table has {limit:,} rows" if limit is not None else "ids fit 31 bits"
        msg = (
            f"{where}, row {first_row + int(at[0]) + 1:,}, column {name}: id {values[at]} is out of range: {size}; "
            "give the table's size with `table_sizes`, or fix the data"
        )
        raise LogError(msg)
    return np.ascontiguousarray(values, dtype=np.int32)
