"""Describes the column distributions of Criteo's two public logs, and draws from them with integers alone.

In: `shapes.toml`, measured on samples of the real logs.  Out: for each column a table of 65,536 equally likely
cells; a cell is a level of an integer column, or a range of ranks of a categorical column.  A draw is a table look-up
of a random integer, so that a log has the same bytes on every machine.

Columns with the same missing rate go missing together, as they do in the real logs.

What a row has in a column is its code: the cell of an integer; the rank of a value, where ranks from `NUM_HEAD_RANKS`
on share one code; the last code is that of a missing value.
"""

import tomllib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

NUM_CELLS = 1 << 16
NUM_HEAD_RANKS = 4096

# Values in a cell of each categorical column in MLPerf's DLRM-DCNv2 benchmark.
MULTI_HOT_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)

# The fractions of present values that lie at or below the entries of `DenseShape.quantiles`.
_QUANTILE_FRACTIONS = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class DenseShape:
    """An integer column.

    Attributes:
        missing_rate: fraction of rows where the column is empty.
        quantiles: at `_QUANTILE_FRACTIONS`; between them log(x + 3) is linear, which keeps the tails as heavy as they
            are.
    """

    missing_rate: float
    quantiles: tuple[int, ...]

    @cached_property
    def values(self) -> NDArray[np.int64]:
        """The integer of each cell, rising [NUM_CELLS]."""
        fractions = (np.arange(NUM_CELLS) + 0.5) / NUM_CELLS
        logs = np.interp(fractions, _QUANTILE_FRACTIONS, np.log(np.array(self.quantiles) + 3.0))
        return np.rint(np.exp(logs)).astype(np.int64) - 3

    @cached_property
    def code_fractions(self) -> NDArray[np.float64]:
        """The fraction of rows that have each code [codes]; sums to 1."""
        return np.append(np.full(NUM_CELLS, (1.0 - self.missing_rate) / NUM_CELLS), self.missing_rate)


@dataclass(frozen=True)
class SparseShape:
    """A categorical column: rank r (from 0) is on a fraction of the rows that is proportional to (r + shift)^-exponent.

    Exponent and shift were fitted to the head and to the number of distinct values of a sample of the real log, with
    the cardinality of the whole log given. So a log of any length holds about as many distinct values as that many
    rows of the real one, and all of them when it is as long.

    Attributes:
        cardinality: distinct values in the whole real log.
        missing_rate: fraction of rows where the column is empty.
        exponent: of the power law.
        shift: flattens the head (Zipf-Mandelbrot).
    """

    cardinality: int
    missing_rate: float
    exponent: float
    shift: float

    @cached_property
    def cells(self) -> NDArray[np.uint64]:
        """Each cell's first rank (high 32 bits) and number of ranks (low 32 bits), all equally likely [NUM_CELLS]."""
        low, high = self._integral(np.array([0.0, self.cardinality]))
        edges = self._integral_inverse(np.linspace(low, high, NUM_CELLS + 1))
        edges = np.clip(np.floor(edges), 0, self.cardinality).astype(np.uint64)
        edges[-1] = self.cardinality
        first = np.minimum(edges[:-1], np.uint64(self.cardinality - 1))
        num = np.maximum(edges[1:], first + np.uint64(1)) - first
        return first << np.uint64(32) | num

    @cached_property
    def code_fractions(self) -> NDArray[np.float64]:
        """The fraction of rows that have each code [codes]; sums to 1."""
        ranks = np.append(np.minimum(np.arange(NUM_HEAD_RANKS + 1.0), self.cardinality), self.cardinality)
        integrals = self._integral(ranks)
        present = np.diff(integrals) / (integrals[-1] - integrals[0])
        return np.append(present * (1.0 - self.missing_rate), self.missing_rate)

    def _integral(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        power = 1.0 - self.exponent
        return np.log(x + self.shift) if power == 0 else (x + self.shift) ** power / power

    def _integral_inverse(self, y: NDArray[np.float64]) -> NDArray[np.float64]:
        power = 1.0 - self.exponent
        return (np.exp(y) if power == 0 else (y * power) ** (1.0 / power)) - self.shift


@dataclass(frozen=True)
class LogShape:
    """A whole log.

    Attributes:
        click_rate: fraction of rows that are clicked.
        logit_std: standard deviation of the true log-odds; set so that an AUC of about 0.80 is attainable.
        dense: integer columns.
        sparse: categorical columns.
    """

    click_rate: float
    logit_std: float
    dense: tuple[DenseShape, ...]
    sparse: tuple[SparseShape, ...]

    @property
    def columns(self) -> tuple[DenseShape | SparseShape, ...]:
        """Dense columns, then sparse columns: the order of the file after the label."""
        return (*self.dense, *self.sparse)

    @property
    def missing_rates(self) -> tuple[float, ...]:
        """The distinct missing rates above 0: one draw each, for all columns that share it."""
        return tuple(sorted({column.missing_rate for column in self.columns} - {0.0}))

    @property
    def first_numbers(self) -> NDArray[np.uint32]:
        """Of each sparse column the number of its first value, which no other column has, and the end [columns + 1]."""
        return np.cumsum([1, *(column.cardinality for column in self.sparse)]).astype(np.uint32)


def _read_presets() -> dict[str, LogShape]:
    presets = tomllib.loads(Path(__file__).with_name("shapes.toml").read_text(encoding="utf-8"))
    return {
        name: LogShape(
            **{
                **shape,
                "dense": tuple(DenseShape(**column) for column in shape["dense"]),
                "sparse": tuple(SparseShape(**column) for column in shape["sparse"]),
            }
        )
        for name, shape in presets.items()
    }


PRESETS = _read_presets()
