"""Describes the column distributions of Criteo's two public logs, and draws from them with integers alone.

In: the numbers below, measured on samples of the real logs.  Out: for each column a table of 65,536 equally likely
cells; a cell is a level of an integer column, or a range of ranks of a categorical column.  A draw is a table look-up
of a random integer, so that a log has the same bytes on every machine.

Columns with the same missing rate go missing together, as they do in the real logs.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

NUM_CELLS = 1 << 16

# The shares of present values that lie at or below the entries of `DenseShape.quantiles`.
_QUANTILE_SHARES = (0.0, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)


@dataclass(frozen=True)
class DenseShape:
    """An integer column.

    Attributes:
        missing_rate: share of rows where the column is empty.
        quantiles: at `_QUANTILE_SHARES`; between them log(x + 3) is linear, which keeps the tails as heavy as they are.
    """

    missing_rate: float
    quantiles: tuple[int, ...]

    @cached_property
    def values(self) -> NDArray[np.int64]:
        """The integer of each cell, rising [NUM_CELLS]."""
        shares = (np.arange(NUM_CELLS) + 0.5) / NUM_CELLS
        logs = np.interp(shares, _QUANTILE_SHARES, np.log(np.array(self.quantiles) + 3.0))
        return np.rint(np.exp(logs)).astype(np.int64) - 3


@dataclass(frozen=True)
class SparseShape:
    """A categorical column: rank r (from 0) has a share of the rows that is proportional to (r + shift)^-exponent.

    Exponent and shift were fitted to the head and to the number of distinct values of a sample of the real log, with
    the cardinality of the whole log given. So a log of any length holds about as many distinct values as that many
    rows of the real one, and all of them when it is as long.

    Attributes:
        cardinality: distinct values in the whole real log.
        missing_rate: share of rows where the column is empty.
        exponent: of the power law.
        shift: flattens the head (Zipf-Mandelbrot).
    """

    cardinality: int
    missing_rate: float
    exponent: float
    shift: float

    def share_below(self, ranks: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share of present values whose rank lies below each of these ranks (0 to cardinality)."""
        low, high = self._integral(np.array([0.0, self.cardinality]))
        return (self._integral(ranks) - low) / (high - low)

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
        click_rate: share of rows that are clicked.
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


# Display Advertising Challenge, 45.8 million rows; shapes from 19,576 of them.
_CRITEO_KAGGLE = LogShape(
    click_rate=0.256,
    logit_std=1.38,
    dense=(
        DenseShape(0.447, (0, 0, 0, 0, 1, 3, 9, 44, 107, 214)),
        DenseShape(0.0, (-2, -1, -1, 0, 3, 36, 181, 2_227, 3_573, 18_522)),
        DenseShape(0.211, (0, 1, 1, 2, 6, 18, 48, 288, 2_815, 65_535)),
        DenseShape(0.218, (0, 0, 1, 2, 4, 10, 19, 43, 79, 280)),
        DenseShape(0.039, (0, 2, 12, 357, 2_701, 10_255, 32_538, 321_114, 808_266, 1_669_366)),
        DenseShape(0.241, (0, 0, 2, 8, 36, 116, 310, 1_499, 3_607, 12_167)),
        DenseShape(0.046, (0, 0, 0, 1, 3, 11, 32, 204, 707, 1_658)),
        DenseShape(0.001, (0, 0, 0, 2, 7, 20, 35, 48, 52, 756)),
        DenseShape(0.046, (0, 1, 2, 10, 41, 118, 290, 1_127, 3_037, 7_463)),
        DenseShape(0.447, (0, 0, 0, 0, 1, 1, 1, 3, 4, 7)),
        DenseShape(0.046, (0, 0, 0, 0, 1, 3, 6, 24, 52, 84)),
        DenseShape(0.77, (0, 0, 0, 0, 0, 1, 2, 17, 42, 98)),
        DenseShape(0.218, (0, 0, 1, 2, 5, 12, 24, 67, 218, 773)),
    ),
    sparse=(
        SparseShape(1_460, 0.0, 1.9, 0.7),
        SparseShape(583, 0.0, 2.0, 10.0),
        SparseShape(10_131_227, 0.035, 1.0, 1.0),
        SparseShape(2_202_608, 0.035, 1.1, 2.0),
        SparseShape(305, 0.0, 2.6, 1.0),
        SparseShape(24, 0.133, 3.65, 3.0),
        SparseShape(12_517, 0.0, 1.2, 30.0),
        SparseShape(633, 0.0, 2.3, 1.0),
        SparseShape(3, 0.0, 3.4, 0.7),
        SparseShape(93_145, 0.0, 1.1, 0.3),
        SparseShape(5_683, 0.0, 1.4, 30.0),
        SparseShape(8_351_593, 0.035, 1.05, 2.0),
        SparseShape(3_194, 0.0, 1.3, 20.0),
        SparseShape(27, 0.0, 4.0, 5.0),
        SparseShape(14_992, 0.0, 1.6, 50.0),
        SparseShape(5_461_306, 0.035, 1.05, 2.0),
        SparseShape(10, 0.0, 1.05, 0.3),
        SparseShape(5_652, 0.0, 1.7, 20.0),
        SparseShape(2_173, 0.446, 1.2, 0.02),
        SparseShape(4, 0.446, 3.3, 7.0),
        SparseShape(7_046_547, 0.035, 1.05, 2.0),
        SparseShape(18, 0.79, 3.6, 2.0),
        SparseShape(15, 0.0, 4.0, 5.0),
        SparseShape(286_181, 0.035, 1.25, 3.0),
        SparseShape(105, 0.446, 3.5, 7.0),
        SparseShape(142_572, 0.446, 1.15, 2.0),
    ),
)

# 1TB Click Logs, 4.4 billion rows; cardinalities capped at 40 million (MLPerf); shapes from 10,000 rows of day 0.
_CRITEO_1TB = LogShape(
    click_rate=0.03,
    logit_std=1.22,
    dense=(
        DenseShape(0.238, (1, 1, 1, 2, 6, 20, 51, 258, 1_366, 9_382)),
        DenseShape(0.102, (1, 7, 18, 66, 207, 519, 1_073, 3_590, 7_692, 7_969)),
        DenseShape(0.254, (0, 0, 0, 1, 3, 8, 16, 39, 83, 129)),
        DenseShape(0.493, (0, 1, 2, 10, 36, 117, 323, 1_896, 6_319, 14_285)),
        DenseShape(0.465, (1, 1, 1, 2, 5, 15, 42, 300, 1_013, 2_547)),
        DenseShape(0.092, (0, 0, 0, 0, 0, 0, 2, 20, 72, 222)),
        DenseShape(0.032, (0, 0, 0, 0, 0, 0, 0, 2, 10, 29)),
        DenseShape(0.0, (-1, -1, 0, 1, 5, 54, 221, 2_275, 3_497, 4_851)),
        DenseShape(0.0, (0, 0, 0, 1, 5, 13, 27, 46, 49, 59)),
        DenseShape(0.092, (0, 0, 0, 0, 0, 0, 1, 2, 3, 5)),
        DenseShape(0.465, (1, 1, 1, 1, 2, 4, 9, 36, 80, 108)),
        DenseShape(0.015, (0, 7, 30, 591, 3_602, 13_577, 36_096, 364_328, 887_600, 1_293_837)),
        DenseShape(0.254, (0, 1, 1, 2, 4, 10, 21, 67, 152, 362)),
    ),
    sparse=(
        SparseShape(40_000_000, 0.026, 1.15, 0.1),
        SparseShape(39_060, 0.0, 1.3, 3.0),
        SparseShape(17_295, 0.0, 1.15, 5.0),
        SparseShape(7_424, 0.0, 1.5, 1.0),
        SparseShape(20_265, 0.0, 1.3, 1.0),
        SparseShape(3, 0.0, 3.95, 1.0),
        SparseShape(7_122, 0.0, 1.25, 7.0),
        SparseShape(1_543, 0.0, 1.85, 7.0),
        SparseShape(63, 0.0, 2.3, 1.5),
        SparseShape(40_000_000, 0.026, 1.15, 0.1),
        SparseShape(3_067_956, 0.026, 1.3, 0.5),
        SparseShape(405_282, 0.0, 1.1, 0.2),
        SparseShape(10, 0.0, 1.45, 2.0),
        SparseShape(2_209, 0.467, 1.3, 0.05),
        SparseShape(11_938, 0.0, 1.5, 5.0),
        SparseShape(155, 0.467, 2.25, 0.5),
        SparseShape(4, 0.467, 3.35, 1.5),
        SparseShape(976, 0.0, 2.0, 1.0),
        SparseShape(14, 0.0, 2.95, 2.0),
        SparseShape(40_000_000, 0.026, 1.15, 0.1),
        SparseShape(40_000_000, 0.026, 1.2, 0.2),
        SparseShape(40_000_000, 0.026, 1.15, 0.1),
        SparseShape(590_152, 0.467, 1.15, 0.05),
        SparseShape(12_973, 0.0, 1.3, 10.0),
        SparseShape(108, 0.0, 3.5, 3.0),
        SparseShape(36, 0.0, 3.9, 5.0),
    ),
)

# Values in a cell of each categorical column in MLPerf's DLRM-DCNv2 benchmark.
MULTI_HOT_SIZES = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)

PRESETS = {"criteo-kaggle": _CRITEO_KAGGLE, "criteo-1tb": _CRITEO_1TB}
