"""Collects facts about the cells of a column: which are missing, which are numbers, how many differ.

In: a String column of a sample.  Out: `Facts`, by which the role of a column is chosen.
"""

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self

import polars as pl

# Texts that stand for a missing value wherever they stand, and texts that do so in a column of numbers; in one of
# texts they may be values: NA is Namibia.
_NULLS = ("NULL", "null", "Null", "(null)", "\\N", "N/A", "n/a", "#N/A", "<NA>", "NaN", "nan", "NAN", "None")
_NULLS_OF_NUMBERS = ("NA", "na", "none", "NONE", "nil", "-", "--", "?", ".")
USUAL_NULLS = frozenset([*_NULLS, *_NULLS_OF_NUMBERS])
# Other texts stand for missing values where this fraction of the cells are numbers, and few texts are left.
_NUMBERS_FRACTION = 0.9
_MAX_ODD_TEXTS = 3
# Dates as people write them, which no schema orders: 31/12/2024 23:55, 12-31-24, 2024/12/31.
_OTHER_DATE = (
    r"^(\d{1,2}([/-])\d{1,2}[/-](\d{4}|\d{2})|\d{1,2}\.\d{1,2}\.\d{4}|\d{4}[/.]\d{1,2}[/.]\d{1,2})"
    r"([ T]+\d{1,2}:\d{2}(:\d{2}(\.\d+)?)?( ?[AaPp][Mm])?)?$"
)
# Numbers and lists as people write them, which no kind of value reads, and what to write in their place: 7.216,77 €,
# $1,023.50, 18%, ["SQL", "R"]. 1.2.3 is a version.
_UNIT = r"\s*([%€$£¥₹]|EUR|USD|GBP|CHF|JPY|INR)?\s*"
_AS_PEOPLE_WRITE = {
    rf"^{_UNIT}[+-]?{_UNIT}(\d+|\d{{1,3}}([.,'\s]\d{{3}})+)([.,]\d+)?{_UNIT}$": (
        "numbers",
        "write it as 1234.5 alone, so that it can be dense",
    ),
    r"^\s*\[.*\]\s*$": ("lists", "write 1|2 and give it a value_separator, or lists into JSON Lines or Parquet"),
}
_DATETIME = r"^\d{4}-\d{2}-\d{2}([ T]\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:\d{2})?)?$"

_MANY_CELLS = 50


def words_of(text: str) -> frozenset[str]:
    """Words as `Facts.words` has them."""
    return frozenset(map(_singular, text.split()))


def _singular(word: str) -> str:
    return word.lower().removesuffix("s") if len(word) > 3 else word.lower()


@dataclass
class Facts:
    """What the cells of a column are like.

    Attributes:
        name: of the column, in the log.
        cells: String, or lists of it (the column holds lists then), without missing ones.
        num_rows: with missing ones.
        nulls: how often each text stands that seems to mean a missing value; `cells` does not have them.
        is_floating: whether the log says that they are floats, as Parquet does; later ones may not be whole.
    """

    name: str
    cells: pl.Series
    num_rows: int
    nulls: dict[str, int] = field(default_factory=dict)
    is_floating: bool = False

    @classmethod
    def of(cls, name: str, column: pl.Series, *, is_floating: bool) -> Self:
        """The facts of a column of the sample."""
        cells = column.drop_nulls()
        if cells.dtype != pl.String:
            return cls(name, cells, len(column))
        is_number = cells.cast(pl.Float64, strict=False).is_finite().fill_null(value=False)
        texts = cells.filter(~is_number)
        odd = texts.filter(~texts.is_in(list(USUAL_NULLS)))
        nulls = set(_NULLS)
        if is_number.any() and odd.n_unique() <= _MAX_ODD_TEXTS and len(odd) <= len(cells) * (1 - _NUMBERS_FRACTION):
            nulls |= set(texts.unique())
        found = cells.filter(cells.is_in(list(nulls)))
        counts = dict(found.value_counts(sort=True).rows())
        return cls(name, cells.filter(~cells.is_in(list(nulls))), len(column), counts, is_floating)

    @property
    def is_list(self) -> bool:
        """Whether a cell holds several values."""
        return self.cells.dtype != pl.String

    @property
    def num_missing(self) -> int:
        """Cells that are empty or stand for a missing value."""
        return self.num_rows - len(self.cells)

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The words of the name in lower case, each in the singular: `numItems` is num, item; C14 is c."""
        least = 1 if re.fullmatch(r"[A-Za-z]_?\d*", self.name) else 2
        found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", self.name)
        return tuple(_singular(word) for word in found if len(word) >= least)

    @cached_property
    def num_distinct(self) -> int:
        """The number of distinct values."""
        return self.cells.n_unique()

    @property
    def has_many(self) -> bool:
        """Whether there are enough cells to tell by how many of them differ."""
        return len(self.cells) >= _MANY_CELLS

    @property
    def is_unique(self) -> bool:
        """Whether there are many cells and no two are equal."""
        return self.has_many and self.num_distinct == len(self.cells)

    @cached_property
    def integers(self) -> pl.Series | None:
        """The cells as Int64, where all are such numbers."""
        numbers = None if self.is_list else self.cells.cast(pl.Int64, strict=False)
        return None if numbers is None or numbers.has_nulls() or not len(numbers) else numbers

    @cached_property
    def numbers(self) -> pl.Series | None:
        """The cells as Float64, where all are finite numbers."""
        numbers = None if self.is_list else self.cells.cast(pl.Float64, strict=False)
        return (
            None
            if numbers is None or not len(numbers) or not numbers.is_finite().fill_null(value=False).all()
            else numbers
        )

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """The least and the largest number; whole ones exactly."""
        numbers = self.integers if self.integers is not None else self.numbers
        assert numbers is not None, "the cells are numbers"
        lowest, highest = numbers.min(), numbers.max()
        assert isinstance(lowest, int | float)
        assert isinstance(highest, int | float)
        return lowest, highest

    def any_match(self, pattern: str) -> bool:
        """Whether any cell matches the pattern."""
        return not self.is_list and bool(self.cells.str.contains(pattern).any())

    def all_match(self, pattern: str) -> bool:
        """Whether there are cells and all of them match the pattern."""
        return bool(len(self.cells)) and not self.is_list and bool(self.cells.str.contains(pattern).all())

    @cached_property
    def is_datetime(self) -> bool:
        """Whether the cells are dates or times as ISO 8601 writes them."""
        return self.all_match(_DATETIME)

    @cached_property
    def as_people_write(self) -> tuple[str, str] | None:
        """What the cells are, where they are numbers or lists that no kind of value reads; and what to do about it."""
        if self.numbers is not None:
            return None
        return next((what for pattern, what in _AS_PEOPLE_WRITE.items() if self.all_match(pattern)), None)

    @cached_property
    def is_other_date(self) -> bool:
        """Whether the cells are dates or times that are not written as ISO 8601 has them."""
        return self.all_match(_OTHER_DATE)
