"""Defines how dense values are transformed: one class per transform, with constants fitted on the training rows.

| transform | missing becomes | then |
| --- | --- | --- |
| log_plus_3 | 0 | log(max(x, -2) + 3), so that Criteo's negative counts survive |
| log1p | 0 | log(max(x, 0) + 1) |
| standardize | the mean | (x - mean) / deviation, both of the training rows |
| none | 0 | x |

Of a column that is in every training row, what stands for a missing x is what the transform maps to the mean of the
rows' transformed values: a 0 might be far outside of what the model has seen.
Why: docs/decisions/a-number-that-was-never-missing-is-its-mean.md.

All of it is computed in float64 and rounded once.  The constants are stored with the dataset and with every model
trained on it, in one form for all transforms (docs/dataset-format.md).

To add a transform, write a class and enter it, and its name, behind the others.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from torchdlrm.records import Record

_FLOAT32_MAX = float(np.finfo(np.float32).max)
_HUGE_EXPONENT = 510
_HUGE = 2.0**_HUGE_EXPONENT  # squares of larger values do not fit float64


@dataclass
class Moments:
    """Exact sums over the present values of a column, so that no order of adding them changes a bit of the result."""

    count: int = 0
    total: Fraction = field(default_factory=Fraction)
    total_of_squares: Fraction = field(default_factory=Fraction)
    num_missing: int = 0

    def add(self, column: pl.Series, *, has_squares: bool = True) -> None:
        """Add more values; nulls are counted alone."""
        values = column.drop_nulls().cast(pl.Float64).to_numpy()
        self.count += len(values)
        self.num_missing += column.null_count()
        self.total += _exact_sum(values)
        if not has_squares:
            return
        # The square of each value as float64 rounds it, also where its exponent is out of float64's range.
        huge = np.abs(values) > _HUGE
        squares = np.square(np.where(huge, 0.0, values))
        self.total_of_squares += _exact_sum(squares)
        if huge.any():
            scaled = np.square(np.ldexp(values[huge], -_HUGE_EXPONENT))
            self.total_of_squares += _exact_sum(scaled) * Fraction(2) ** (2 * _HUGE_EXPONENT)


class DenseTransform(Record, ABC):
    """A transform with all its constants.

    Attributes:
        transform: its name.
        missing: what stands for a missing x.
        minimum: x is no less than it; None: x may be anything.
        shift: added to x then.
        log: whether a logarithm comes then.
        deviation: what it is divided by then.
        never_missing: whether every training row had it.
        needs_moments: whether `fit` needs the moments of the training rows themselves; the others need the mean of what
            they become, where none is missing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_moments: ClassVar[bool] = False

    transform: str
    missing: float = 0.0
    minimum: float | None = None
    shift: float = 0.0
    log: bool = False
    deviation: float = 1.0
    never_missing: bool = False

    @model_serializer(mode="wrap")
    def _without_what_older_readers_do_not_know(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        return content if self.never_missing else {key: content[key] for key in content if key != "never_missing"}

    @classmethod
    def fit(cls, moments: Moments | None) -> Self:
        """The transform of a column; `moments` of its training rows, see `needs_moments`."""
        fitted = cls()  # type: ignore[call-arg]  # each class has a name
        if moments is None or moments.num_missing or not moments.count:
            return fitted
        missing = float(fitted.inverse(np.array([float(moments.total / moments.count)]))[0])
        return fitted.model_copy(update={"missing": missing, "never_missing": True})

    def continues(self, other: "DenseTransform") -> bool:
        """Whether a model that has learnt from rows of `other` may go on with rows of this one.

        What stands for a missing x may change where it never was.
        """
        any_missing = {"missing": 0.0, "never_missing": False}
        is_alike = self.model_copy(update=any_missing) == other.model_copy(update=any_missing)
        return is_alike and (self.missing == other.missing or other.never_missing)

    def expression(self, name: str) -> pl.Expr:
        """Column `name` (Int64 or Float64, nullable) as Float32 without nulls."""
        x = self._of_column(pl.col(name).cast(pl.Float64).fill_null(self.missing))
        return x.cast(pl.Float32).alias(name)

    def of_numbers(self, numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        """What `expression` makes of few numbers, to the bit, in microseconds; NaN is a missing one.

        Args:
            numbers: finite or NaN, [B].

        Returns:
            Without NaN, [B].
        """
        return self._of_array(np.where(np.isnan(numbers), self.missing, numbers)).astype(np.float32)

    @abstractmethod
    def _of_column(self, x: pl.Expr) -> pl.Expr: ...

    @abstractmethod
    def _of_array(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...

    @abstractmethod
    def inverse(self, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Numbers that become y, as nearly as float64 has them: [B]."""


class _Logarithm(DenseTransform):
    """log(max(x, minimum) + shift)."""

    minimum: float
    log: Literal[True] = True
    deviation: Annotated[float, Field(ge=1, le=1)] = 1.0

    def _of_column(self, x: pl.Expr) -> pl.Expr:
        return (pl.max_horizontal(x, pl.lit(self.minimum)) + self.shift).log()

    def _of_array(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        # The C library's, as Polars': NumPy's own differs in the last bit of one number in a thousand.
        shifted = np.maximum(x, self.minimum) + self.shift
        return np.fromiter(map(math.log, shifted.tolist()), np.float64, len(x))

    def inverse(self, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.exp(y) - self.shift

    def _contradictions(self) -> Iterator[str]:
        if self.minimum + self.shift <= 0:
            yield "a logarithm needs a minimum above -shift"


class LogPlus3(_Logarithm):
    """log(x + 3), for counts from -2 on."""

    transform: Literal["log_plus_3"] = "log_plus_3"
    minimum: float = -2.0
    shift: float = 3.0


class Log1p(_Logarithm):
    """log(x + 1), for counts."""

    transform: Literal["log1p"] = "log1p"
    minimum: float = 0.0
    shift: float = 1.0


class _Linear(DenseTransform):
    """(x + shift) / deviation."""

    minimum: None = None
    log: Literal[False] = False

    def _of_column(self, x: pl.Expr) -> pl.Expr:
        if self.shift:
            x += self.shift
        if self.deviation != 1.0:
            x /= self.deviation
        return x.clip(-_FLOAT32_MAX, _FLOAT32_MAX)  # a float64 may be too large; the model must not meet infinity

    def _of_array(self, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        with np.errstate(over="ignore"):
            if self.shift:
                x = x + self.shift
            return (x / self.deviation).clip(-_FLOAT32_MAX, _FLOAT32_MAX)

    def inverse(self, y: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return y * self.deviation - self.shift


class Standardize(_Linear):
    """Mean 0 and deviation 1 over the training rows; zeros of a constant column."""

    needs_moments: ClassVar[bool] = True
    transform: Literal["standardize"] = "standardize"

    @classmethod
    def fit(cls, moments: Moments | None) -> Self:
        """The standardisation that the training rows ask for."""
        assert moments is not None, "a standardized column is counted first"
        if not moments.count:
            return cls()
        mean = float(moments.total / moments.count)
        variance = moments.total_of_squares / moments.count - (moments.total / moments.count) ** 2
        deviation = _square_root(variance) or 1.0
        return cls(missing=mean, shift=-mean, deviation=deviation, never_missing=not moments.num_missing)


class Unchanged(_Linear):
    """x itself."""

    transform: Literal["none"] = "none"


FittedDense = Annotated[LogPlus3 | Log1p | Standardize | Unchanged, Field(discriminator="transform")]
TransformName = Literal["log_plus_3", "log1p", "standardize", "none", "unit"]
VECTOR_TRANSFORMS = ("unit", "none")  # see `torchdlrm.features.vectors`
TRANSFORMS: dict[str, type[DenseTransform]] = {
    transform.model_fields["transform"].default: transform for transform in (LogPlus3, Log1p, Standardize, Unchanged)
}


def _square_root(x: Fraction) -> float:
    """The square root of x, of any size; 0 for one below 0."""
    scale = 0 if x < 2**1000 else 512
    return math.sqrt(max(0.0, float(x / Fraction(4) ** scale))) * 2.0**scale


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
