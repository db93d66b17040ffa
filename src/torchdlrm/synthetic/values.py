"""Says which values a synthetic log has: which number stands for a rank on a day, and for its companions in a cell.

Each rank of day 0 founds a line of values, one after the other. Of a day's values only the last of their lines live.

- **Ranks.** Lines are ranked by the logarithm of their popularity: that of day 0, plus a random walk with a pull to 0,
  which has a standard deviation of 0.5 in the long run. Lines behind the head keep their ranks.
- **Numbers.** A line replaces its value each time a life has passed. Its lives are equally long, those of other lines
  shorter or longer, and of frequent values longer.
- **Companions** are the other values of a cell, as many as in MLPerf's DLRM-DCNv2 benchmark. As there
  (mlcommons/training, `multi_hot.py` of torchrec_dlrm), they are a function of the value, fixed for the whole log: they
  add nothing to what a row says. There they are drawn once, into tables of 22 GiB; here they are hashed, which takes no
  memory. They are `uniform` over the values of their column, the harder case for caches, or follow a power law
  (`pareto`, a = 0.25), of which the remainder by the number of values is taken.

Which value a line has on day d is computed from d alone, for millions of lines without a table. Nothing moves on day 0.
All arithmetic is on integers, or rounded as IEEE 754 has it: the same values on every machine.

B rows, K values in a cell.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from torchdlrm.synthetic.model import learnable
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, NUM_HEAD_RANKS, LogShape

Companions = Literal["uniform", "pareto"]
COMPANIONS: tuple[Companions, ...] = get_args(Companions)

_MAX_VALUES = 0.5
_POPULARITY_STD = 0.5  # of log(popularity), in the long run
_FULL_MORTALITY = 1 << 16
_LARGEST = 2.0**53  # of a draw of the power law: one in ten thousand is larger, and has this as its rank


@dataclass(frozen=True)
class Drift:
    """How much a log changes from one day to the next.

    Attributes:
        values: Fraction of a column's rare values that die in a day, each followed by a new one, 0 to 0.5. Frequent
            values live longer: one on 1 % of the rows twice as long.
        popularity: Standard deviation of what a day adds to the logarithm of a value's popularity, 0 to 0.5.
        effects: What a day adds to an effect on the click, in standard deviations of such effects, 0 to 1.
    """

    values: float = 0.02
    popularity: float = 0.1
    effects: float = 0.15

    def problems(self, days: int, shape: LogShape) -> Iterator[str]:
        """Rates that are out of their range, or with which more values are born than there are numbers."""
        for name, largest in (("values", _MAX_VALUES), ("popularity", _POPULARITY_STD), ("effects", 1.0)):
            rate = getattr(self, name)
            if not 0.0 <= rate <= largest:
                yield f"drift.{name}: {rate} is not a rate; give 0 to {largest:g}"
        if int(shape.first_numbers[-1]) * (2 + 2 * self.values * (days - 1)) > 2**32:
            yield f"drift.values: {self.values} makes more than 2^32 values in {days} days; lower one of them"


class Values:
    """The values of the sparse columns on a day, and from one day to the next.

    Args:
        shape: of the log.
        drift: of values and popularity.
        keys: random numbers, two for each sparse column.
        companions: how the companions of values are distributed; None: cells have one value.
        companion_keys: random numbers, one for each value of a cell, over all columns.
    """

    def __init__(
        self,
        shape: LogShape,
        drift: Drift,
        keys: NDArray[np.uint32],
        companions: Companions | None,
        companion_keys: NDArray[np.uint32],
    ) -> None:
        self.day, self.companions = 0, companions
        self.sizes = MULTI_HOT_SIZES if companions else (1,) * len(shape.sparse)
        self._drift, self._keys = drift, keys.reshape(-1, 2)
        self._companion_keys = np.split(companion_keys, np.cumsum(self.sizes)[:-1])
        self._first_number = shape.first_numbers
        self._cardinalities = [column.cardinality for column in shape.sparse]
        heads = [column.code_fractions[: min(column.cardinality, NUM_HEAD_RANKS)] for column in shape.sparse]
        self._log_fractions = [np.log(head) for head in heads]
        self._moves = [np.zeros(len(head)) for head in heads]
        self._lines = [np.arange(len(head), dtype=np.uint64) for head in heads]
        self._mortality = [
            np.rint(_FULL_MORTALITY * (1.0 - learnable(column.code_fractions)[:-1])).astype(np.uint64)
            for column in shape.sparse
        ]

    def next_day(self, rng: np.random.Generator) -> "Values":
        """The values of the day after this one's; `rng` draws the steps of their popularity."""
        later, rate = copy.copy(self), self._drift.popularity
        later.day += 1
        if rate:
            kept = math.sqrt(1.0 - (rate / _POPULARITY_STD) ** 2)
            later._moves = [kept * move + rate * rng.normal(size=len(move)) for move in self._moves]
            popularity = zip(self._log_fractions, later._moves, strict=True)
            later._lines = [np.argsort(-first - move, kind="stable").astype(np.uint64) for first, move in popularity]
        return later

    def born_tomorrow(self, column: int) -> NDArray[np.bool_]:
        """For each code whether its value is new on the day after this one's; a missing value never is [codes]."""
        lines = np.arange(len(self._lines[column]), dtype=np.uint64)
        born = np.zeros(NUM_HEAD_RANKS + 2, np.bool_)
        born[: len(lines)] = self.generations(column, lines) != self.generations(column, lines, self.day + 1)
        return born

    def lines(self, column: int, ranks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The line that has each of these ranks of a column on this day [B]."""
        if not self.day:
            return ranks
        lines = self._lines[column]
        in_head = np.minimum(ranks, np.uint64(len(lines) - 1)).view(np.int64)
        return np.where(ranks < len(lines), lines.take(in_head), ranks)

    def generations(self, column: int, lines: NDArray[np.uint64], day: int | None = None) -> NDArray[np.uint64]:
        """How many values of these lines of a column have died until a day, by default this one [B]."""
        numbers = lines.astype(np.uint32) + self._first_number[column]
        pace, age = (scatter(numbers ^ key).astype(np.uint64) for key in self._keys[column])
        # Lives are not equally long: the pace is uniform between 0 and twice the rate.
        pace *= np.uint64(round(2 * self._drift.values * 2**32))
        pace >>= np.uint64(32)
        pace *= self._mortality[column].take(np.minimum(lines, np.uint64(NUM_HEAD_RANKS)).view(np.int64))
        pace >>= np.uint64(_FULL_MORTALITY.bit_length() - 1)
        return (pace * np.uint64(self.day if day is None else day) + age) >> np.uint64(32)

    def numbers(
        self, column: int, lines: NDArray[np.uint64], missing: NDArray[np.bool_] | None = None
    ) -> NDArray[np.uint32]:
        """The numbers of the values in a column's cells, each of no other value, [K, B].

        Args:
            column: of the sparse ones.
            lines: of the first values [B].
            missing: rows where the column is empty [B]; with companions such a row has a value of its own instead.
        """
        numbers = np.empty((self.sizes[column], len(lines)), np.uint32)
        numbers[0] = lines
        if self.companions:
            cardinality = self._cardinalities[column]
            if missing is not None:
                numbers[0, missing] = cardinality
            numbers[1:] = draw_companions(numbers[0], self._companion_keys[column][1:], cardinality, self.companions)
        numbers += self._first_number[column]
        if self.day:
            numbers += self.generations(column, lines).astype(np.uint32) * self._first_number[-1]
        if self.companions and missing is not None:
            numbers[0, missing] = self._first_number[-1] + np.uint32(column)  # which no column has
        return numbers


def draw_companions(
    ranks_B: NDArray[np.uint32], keys: NDArray[np.uint32], cardinality: int, companions: Companions
) -> NDArray[np.uint64]:
    """The ranks of the companions of some values: uint64 [K - 1, B].

    Args:
        ranks_B: of the values.
        keys: random numbers, one for each companion, [K - 1].
        cardinality: values of the column.
        companions: how they are distributed.
    """
    drawn = scatter(ranks_B ^ keys[:, None])
    if companions == "uniform":
        found = drawn.astype(np.uint64)
        found *= np.uint64(cardinality)
        found >>= np.uint64(32)
        return found
    u = (drawn + 1.0) / 2.0**32
    u *= u
    x = np.floor(1.0 / (u * u)) - 1.0  # 1 / u^4 - 1, the inverse of the distribution
    return np.minimum(x, _LARGEST).astype(np.uint64) % np.uint64(cardinality)


def scatter(numbers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """A bijection of 32-bit numbers that leaves no order to see (the finaliser of MurmurHash3); overwrites them."""
    numbers ^= numbers >> 16
    numbers *= np.uint32(0x85EBCA6B)
    numbers ^= numbers >> 13
    numbers *= np.uint32(0xC2B2AE35)
    numbers ^= numbers >> 16
    return numbers
