"""Task: exact sums of the dense columns that are standardised, over the training rows of a chunk."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import polars as pl

from torchdlrm.data.splits import RowSplit
from torchdlrm.features.transforms import Moments
from torchdlrm.preprocessing.read import TIME, ChunkFile
from torchdlrm.preprocessing.sections import Sections
from torchdlrm.preprocessing.work_folder import Result


def sum_moments(chunk: ChunkFile, split: RowSplit, names: Sequence[str]) -> Result:
    """Task: the moments of columns `names`."""
    found = {name: Moments() for name in names}
    if chunk.rows_of_split[0]:
        with Sections(chunk.path) as sections:
            rows = sections.table("rows")
            times = rows[TIME].to_numpy() if TIME in rows.column_names else None
            is_train = pl.Series(split.split_of_rows(chunk.first_row, chunk.num_rows, times) == 0)
            frame = pl.DataFrame(rows.select(list(names))).filter(is_train)
            for name in names:
                found[name].add(frame[name])
    return {name: [moments.count, str(moments.total), str(moments.total_of_squares)] for name, moments in found.items()}


def add_moments(total: dict[str, Moments], result: dict[str, Any]) -> None:
    """Add what a task found."""
    for name, (count, values, squares) in result.items():
        total[name].count += count
        total[name].total += Fraction(values)
        total[name].total_of_squares += Fraction(squares)
