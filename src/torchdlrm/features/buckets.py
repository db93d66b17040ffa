"""Makes categories of numbers: which bucket a number falls in.

| buckets | category of x |
| --- | --- |
| "log_square" | floor(ln(x)^2) where x > 2, else x without its fraction |
| boundaries | how many boundaries are no larger than x: bucket i holds boundary i - 1 <= x < boundary i |
| quantiles | likewise, with boundaries between that many parts of the training rows, as equal as ties allow |

All of them are searches in sorted numbers: 64-bit integers for integers, float64 for floats, both exact.  So a category
does not depend on how a machine rounds a logarithm, and columns and single numbers are compared with the same numbers.
"""

import math
import sys
from collections.abc import Sequence
from decimal import ROUND_CEILING, Decimal, localcontext
from functools import cache
from itertools import pairwise
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import model_serializer, model_validator

from torchdlrm.records import Record
from torchdlrm.toml import did_you_mean

Numbers = npt.NDArray[np.int64] | npt.NDArray[np.float64]

LOG_SQUARE = "log_square"
_INT64_MIN, _INT64_END = -(2**63), 2**63
_MAX_BUCKETS = 65_536
_DIGITS = 50
_NUM_SHOWN = 10
# The square of a float64 logarithm of up to 710 is wrong by 1e-12 times 710, and so nowhere by as much as this.
_NEAR = 1e-6
_FITTED_KEYS = {"quantiles", "boundaries"}
_SETTINGS = '"log_square", boundaries that ascend ([1.0, 10.0]), or { quantiles = 100 }'


class Buckets(Record):
    """How a schema makes categories of a column's numbers.

    Attributes:
        log_square: whether by floor(ln(x)^2).
        boundaries: those between buckets; None for quantiles that are not fitted.
        quantiles: into how many parts boundaries cut the training rows.
    """

    log_square: bool = False
    boundaries: tuple[int | float, ...] | None = None
    quantiles: int | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_setting(cls, given: Any) -> Any:
        """From what a schema says: a text, a list, a number of quantiles or a table of them."""
        if isinstance(given, Buckets):
            return given
        if given == LOG_SQUARE:
            return {"log_square": True}
        if isinstance(given, list | tuple):
            return {"boundaries": _checked(given)}
        about = given if isinstance(given, dict) else {"quantiles": given}
        quantiles, boundaries = about.get("quantiles"), about.get("boundaries")
        if type(quantiles) is not int or quantiles not in range(2, _MAX_BUCKETS + 1) or about.keys() - _FITTED_KEYS:
            wrong = [*(about.keys() - _FITTED_KEYS), *([given] if isinstance(given, str) else [])]
            hint = did_you_mean(str(wrong[0]), [*sorted(_FITTED_KEYS), LOG_SQUARE]) if wrong else ""
            raise ValueError(f"{given!r} is none of {_SETTINGS}, of 2 to {_MAX_BUCKETS:,}{hint}")
        return {"quantiles": quantiles, "boundaries": _checked(boundaries) if boundaries else boundaries}

    @model_serializer
    def _as_setting(self) -> Any:
        if self.log_square:
            return LOG_SQUARE
        if self.boundaries is None:
            return self.quantiles
        boundaries = list(self.boundaries)
        return boundaries if self.quantiles is None else {"quantiles": self.quantiles, "boundaries": boundaries}

    @property
    def asked(self) -> Self:
        """Quantiles without their boundaries; others as they are."""
        return self if self.quantiles is None else self.model_copy(update={"boundaries": None})

    def __str__(self) -> str:
        """What was asked for, in a few words."""
        if self.log_square:
            return LOG_SQUARE
        if self.quantiles is not None:
            return f"{self.quantiles} quantiles"
        boundaries = list(self.boundaries or ())
        return f"{boundaries[:_NUM_SHOWN]}{' and more' if len(boundaries) > _NUM_SHOWN else ''}"

    @property
    def needs_fit(self) -> bool:
        """Whether the training rows say where the boundaries are."""
        return self.quantiles is not None

    @property
    def is_fitted(self) -> bool:
        """Whether numbers can be put into the buckets."""
        return self.log_square or self.boundaries is not None

    def fitted(self, boundaries: Sequence[float]) -> Self:
        """These quantiles with their boundaries."""
        return self.model_copy(update={"boundaries": tuple(boundaries)})

    @property
    def bucketing(self) -> "Bucketing":
        """What puts numbers into these buckets."""
        if self.log_square:
            return _log_square()
        assert self.boundaries is not None, "quantiles are fitted first"
        return _between(self.boundaries)


class Bucketing:
    """Puts numbers into buckets.

    Args:
        integers: the smallest integer of each bucket but the first, ascending, int64.
        floats: likewise of floats.
        is_log_square: whether these are the buckets of floor(ln(x)^2), and numbers up to 2 are their own category.
    """

    def __init__(
        self, integers: npt.NDArray[np.int64], floats: npt.NDArray[np.float64], *, is_log_square: bool
    ) -> None:
        self._integers, self._floats, self._is_log_square = integers, floats, is_log_square

    def of_numbers(self, numbers: Numbers) -> npt.NDArray[np.int64]:
        """The category of each number: int64 [B]; numbers are int64, or float64 and finite, [B]."""
        is_float = numbers.dtype.kind == "f"
        categories = np.searchsorted(self._floats if is_float else self._integers, numbers, side="right")
        if self._is_log_square:
            itself = np.clip(numbers, _INT64_MIN, 2).astype(np.int64) if is_float else numbers
            categories = np.where(numbers > 2, categories, itself)
            if is_float and numbers.max(initial=0) >= _INT64_END:
                huge = np.flatnonzero(numbers >= _INT64_END)
                categories[huge] = _log_squares(numbers[huge])
        return categories

    def of_column(self, values: pl.Series) -> pl.Series:
        """The category of each value of a column (Int64 or Float64): Int64, null where there is no value."""
        categories = pl.Series(values.name, self.of_numbers(values.fill_null(0).to_numpy()))
        if not values.null_count():
            return categories
        return pl.select(pl.when(values.is_not_null()).then(categories).alias(values.name)).to_series()

    def numbers_of(self, categories: npt.NDArray[np.int64], *, is_float: bool) -> npt.NDArray[Any]:
        """A number of each category, where there is one: int64 or float64, [B]."""
        edges: npt.NDArray[Any] = self._floats if is_float else self._integers
        if self._is_log_square and is_float:
            middle = np.exp(np.sqrt(np.maximum(categories, 0) + 0.5))
            return np.where(categories > 2, middle, categories.astype(np.float64))
        if not len(edges):
            return np.zeros(len(categories), edges.dtype)
        found = edges[np.clip(categories - 1, 0, len(edges) - 1)]
        if self._is_log_square:
            return np.where(categories > 2, found, categories)
        below = np.nextafter(edges[0], -np.inf) if is_float else max(int(edges[0]) - 1, _INT64_MIN)
        return np.where(categories > 0, found, edges.dtype.type(below))


@cache
def _log_square() -> Bucketing:
    """The buckets of floor(ln(x)^2), whose edges are e^sqrt(k): irrational, so that no number is one."""
    integers, floats = [], []
    with localcontext() as context:
        context.prec = _DIGITS
        for k in range(1, int(math.log(_INT64_END) ** 2) + 1):
            edge = Decimal(k).sqrt().exp()
            integers.append(int(edge.to_integral_value(ROUND_CEILING)))
            floats.append(_float_above(edge))
    return Bucketing(np.array(integers, np.int64), np.array(floats, np.float64), is_log_square=True)


@cache
def _between(boundaries: tuple[int | float, ...]) -> Bucketing:
    whole = [math.ceil(boundary) for boundary in boundaries]
    integers = [max(edge, _INT64_MIN) for edge in whole if edge < _INT64_END]
    floats = [_float_above(boundary) for boundary in boundaries]
    return Bucketing(np.array(integers, np.int64), np.array(floats, np.float64), is_log_square=False)


def _float_above(x: float | Decimal) -> float:
    """The smallest float64 that is no less than x."""
    nearest = float(x)
    return nearest if nearest >= x else math.nextafter(nearest, math.inf)


def _log_squares(numbers: Numbers) -> npt.NDArray[np.int64]:
    """floor(ln(x)^2) of few numbers; exactly also where the logarithm's last bits would decide."""
    squares = np.log(numbers) ** 2
    found = np.floor(squares).astype(np.int64)
    with localcontext() as context:
        context.prec = _DIGITS
        for i in np.flatnonzero(np.abs(squares - np.rint(squares)) < _NEAR):
            found[i] = int(Decimal(float(numbers[i])).ln() ** 2)
    return found


def _checked(boundaries: object) -> tuple[int | float, ...]:
    numbers: Any = boundaries if isinstance(boundaries, list | tuple) else [None]
    if any(type(x) not in (int, float) or not abs(x) <= sys.float_info.max for x in numbers) or not numbers:
        raise ValueError(f"{boundaries!r} are no boundaries, which are finite numbers of 64 bits, one at least")
    if len(numbers) >= _MAX_BUCKETS:
        raise ValueError(f"{len(numbers):,} boundaries are too many; there are at most {_MAX_BUCKETS:,} buckets")
    if any(not before < after for before, after in pairwise(numbers)):
        raise ValueError(f"boundaries ascend, and {list(numbers)} do not")
    return tuple(numbers)
