"""Typed columns -> what the model reads: dense values as float32, categorical values as int32 ids.

In: a frame of the types that `torchdlrm.data.log` gives, missing values null.  Out: the same columns encoded.  Both
the preprocessing job and everything that meets raw rows later run this code, with the same constants: they are stored
with the dataset and with every model trained on it.

| transform | missing becomes | then |
| --- | --- | --- |
| log_plus_3 | 0 | log(max(x, -2) + 3), so that Criteo's negative counts survive |
| log1p | 0 | log(max(x, 0) + 1) |
| standardize | the mean | (x - mean) / deviation, both of the training rows |
| none | 0 | x |

All of it is computed in float64 and rounded once.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import BaseModel, ConfigDict, model_validator

from torchdlrm.features.kinds import map_lists
from torchdlrm.features.schema import DenseColumn, DenseTransform, FeatureSchema, SparseColumn
from torchdlrm.features.value_hash import hashed_ids

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_FEW_ROWS = 4_096
_HUGE_EXPONENT = 510
_HUGE = 2.0**_HUGE_EXPONENT  # squares of larger values do not fit float64


class ValueLookup(Protocol):
    """Gives values their ids: a `Vocabulary` in memory, or a `ValueIndex` on disk."""

    def lookup(self, values: pl.Series) -> pl.Series:
        """The id of each value: Int32, 0 for a value without one; the name of `values`."""


class FittedDense(BaseModel):
    """A dense transform with all its constants: `scale((max(x, minimum) + shift))`, and what stands for a missing x."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    transform: DenseTransform
    missing: float = 0.0
    minimum: float | None = None
    shift: float = 0.0
    log: bool = False
    deviation: float = 1.0

    def expression(self, name: str) -> pl.Expr:
        """Column `name` (Int64 or Float64, nullable) as Float32 without nulls."""
        x = pl.col(name).cast(pl.Float64).fill_null(self.missing)
        if self.minimum is not None:
            x = pl.max_horizontal(x, pl.lit(self.minimum))
        if self.shift:
            x += self.shift
        if self.log:
            x = x.log()
        if self.deviation != 1.0:
            x /= self.deviation
        if not self.log:
            x = x.clip(-_FLOAT32_MAX, _FLOAT32_MAX)  # a float64 may be too large; the model must not meet infinity
        return x.cast(pl.Float32).alias(name)

    def of_numbers(self, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """What `expression` makes of few numbers, to the bit, in microseconds; NaN is a missing one.

        Args:
            numbers: finite or NaN, [B].

        Returns:
            Without NaN, [B].
        """
        x = np.where(np.isnan(numbers), self.missing, numbers)
        if self.minimum is not None:
            x = np.maximum(x, self.minimum)
        with np.errstate(over="ignore"):  # clipped below
            if self.shift:
                x += self.shift
            if self.log:
                # The C library's, as Polars': NumPy's own differs in the last bit of one number in a thousand.
                x = np.fromiter(map(math.log, x.tolist()), np.float64, len(x))
            x /= self.deviation
        if not self.log:
            x = x.clip(-_FLOAT32_MAX, _FLOAT32_MAX)
        return x.astype(np.float32)

    @model_validator(mode="after")
    def _has_a_logarithm(self) -> Self:
        if self.log and (self.minimum is None or self.minimum + self.shift <= 0):
            msg = "a logarithm needs a minimum above -shift"
            raise ValueError(msg)
        return self


@dataclass
class Moments:
    """Exact sums over the present values of a column, so that no order of adding them changes a bit of the result."""

    count: int = 0
    total: Fraction = field(default_factory=Fraction)
    total_of_squares: Fraction = field(default_factory=Fraction)

    def add(self, column: pl.Series) -> None:
        """Take in more values; nulls are left out."""
        values = column.drop_nulls().cast(pl.Float64).to_numpy()
        self.count += len(values)
        self.total += _exact_sum(values)
        # The square of each value as float64 rounds it, also where its exponent is out of float64's range.
        huge = np.abs(values) > _HUGE
        squares = np.square(np.where(huge, 0.0, values))
        self.total_of_squares += _exact_sum(squares)
        if huge.any():
            scaled = np.square(np.ldexp(values[huge], -_HUGE_EXPONENT))
            self.total_of_squares += _exact_sum(scaled) * Fraction(2) ** (2 * _HUGE_EXPONENT)

    def fit(self) -> FittedDense:
        """The standardisation that these values ask for; of a constant column it leaves zeros."""
        if not self.count:
            return FittedDense(transform="standardize")
        mean = float(self.total / self.count)
        variance = self.total_of_squares / self.count - (self.total / self.count) ** 2
        deviation = _square_root(variance)
        return FittedDense(transform="standardize", missing=mean, shift=-mean, deviation=deviation or 1.0)


def fit_dense(column: DenseColumn, moments: Moments | None) -> FittedDense:
    """The constants of a column's transform; `moments` of the training rows where it is `standardize`."""
    if column.transform == "log_plus_3":
        return FittedDense(transform="log_plus_3", minimum=-2.0, shift=3.0, log=True)
    if column.transform == "log1p":
        return FittedDense(transform="log1p", minimum=0.0, shift=1.0, log=True)
    if column.transform == "standardize":
        assert moments is not None, "a standardized column is counted first"
        return moments.fit()
    return FittedDense(transform="none")


def encode(
    frame: pl.DataFrame,
    schema: FeatureSchema,
    dense: Mapping[str, FittedDense],
    vocabularies: Mapping[str, ValueLookup],
) -> pl.DataFrame:
    """Raw rows as the model reads them.

    Args:
        frame: typed columns, B rows; the label may be absent.
        schema: the columns.
        dense: the fitted transform of each dense column.
        vocabularies: the vocabulary of each sparse column that is not hashed.

    Returns:
        Float32 dense columns and Int32 sparse columns (lists of it where a row has several values) in the order of the
        schema, B rows.
    """
    return pl.DataFrame(
        [
            *encode_dense(frame, dense).iter_columns(),
            *(encode_sparse(frame[column.name], column, vocabularies.get(column.name)) for column in schema.sparse),
        ]
    )


def encode_sparse(values: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    """The ids of a sparse column's values: Int32, or lists of it; a missing list of values is an empty one.

    Args:
        values: Int64, UInt32 or String, nullable; or lists of these.
        column: the feature.
        vocabulary: its vocabulary; None where its values are hashed.
    """
    if column.is_multi_valued:
        return map_lists(values, lambda flat: _ids(flat, column, vocabulary))
    return _ids(values, column, vocabulary)


def _ids(values: pl.Series, column: SparseColumn, vocabulary: ValueLookup | None) -> pl.Series:
    if column.hash is not None:
        return pl.Series(values.name, hashed_ids(values, column.hash))
    assert vocabulary is not None, "a column that is not hashed has a vocabulary"
    return vocabulary.lookup(values)


def encode_dense(frame: pl.DataFrame, dense: Mapping[str, FittedDense]) -> pl.DataFrame:
    """The dense columns of `frame` alone, each through its transform."""
    if frame.height > _FEW_ROWS:
        return frame.select(_expressions(dense.items()))
    # Of few rows, the cost is that of the expressions: columns of the same constants are transformed as one.
    alike: dict[FittedDense, list[str]] = {}
    for name, fitted in dense.items():
        alike.setdefault(fitted, []).append(name)
    columns = {}
    for fitted, names in alike.items():
        x = pl.concat([frame[name].cast(pl.Float64) for name in names])
        encoded = x.to_frame("x").select(fitted.expression("x")).to_series()
        for i, name in enumerate(names):
            columns[name] = encoded.slice(i * frame.height, frame.height).alias(name)
    return pl.DataFrame([columns[name] for name in dense])


def _square_root(x: Fraction) -> float:
    """The square root of x, of any size; 0 for one below 0."""
    scale = 0 if x < 2**1000 else 512
    return math.sqrt(max(0.0, float(x / Fraction(4) ** scale))) * 2.0**scale


def _expressions(dense: Iterable[tuple[str, FittedDense]]) -> list[pl.Expr]:
    return [fitted.expression(name) for name, fitted in dense]


def _exact_sum(values: npt.NDArray[np.float64]) -> Fraction:
    """The sum without rounding: mantissas in halves that float64 adds exactly, summed for each exponent."""
    mantissas, exponents = np.frexp(values)
    whole = np.ldexp(mantissas, 53)
    high = np.floor(whole / 2.0**27)
    low = whole - high * 2.0**27
    assert len(values) < 2**26, "sums of 27-bit numbers stay below 2^53"
    lowest = int(exponents.min(initial=0))
    sums_high = np.bincount(exponents - lowest, weights=high)
    sums_low = np.bincount(exponents - lowest, weights=low)
    total = Fraction(0)
    for i in np.flatnonzero((sums_high != 0) | (sums_low != 0)):
        total += (int(sums_high[i]) * 2**27 + int(sums_low[i])) * Fraction(2) ** (lowest + int(i) - 53)
    return total
