"""Lets a synthetic log live: from day to day values die and are born, get more or less frequent, and act otherwise.

In: the draws of the hidden model, rates.  Out: for each day the same draws changed, which value has which rank, and
which values are new.

Each rank of day 0 founds a line of values, one after the other. Of a day's values only the last of their lines live.

- **Ranks.** Lines are ranked by the logarithm of their popularity: that of day 0, plus a random walk with a pull to 0,
  which has a standard deviation of 0.5 in the long run. Lines behind the head keep their ranks.
- **Values.** A line replaces its value each time a life has passed. Its lives are equally long, those of other lines
  shorter or longer, and of frequent values longer.
- **Effects.** With a rate r, z becomes sqrt(1 - r^2) z + r * normal; phases and angles take steps of r radians. After
  k days the correlation is about exp(-k r^2 / 2). New values have effects of their own.

Which value a line has on day d is computed from d alone, for millions of lines without a table. The rest is stepped
from day 0 on, in 10 ms a day. Nothing moves on day 0.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import ConfigError
from torchdlrm.synthetic.model import NUM_HEAD_RANKS, Draws, code_shares, learnable
from torchdlrm.synthetic.multi_hot import scatter
from torchdlrm.synthetic.shapes import LogShape

_MAX_VALUES = 0.5
_POPULARITY_STD = 0.5  # of log(popularity), in the long run
_FULL_MORTALITY = 1 << 16


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

    def check(self, days: int, shape: LogShape) -> None:
        """Raise ConfigError if a rate is out of its range, or so many values are born that their numbers end."""
        for name, largest in (("values", _MAX_VALUES), ("popularity", _POPULARITY_STD), ("effects", 1.0)):
            rate = getattr(self, name)
            if not 0.0 <= rate <= largest:
                msg = f"drift.{name}: {rate} is not a rate; give 0 to {largest:g}"
                raise ConfigError(msg)
        num_lines = sum(column.cardinality for column in shape.sparse) + 1
        if num_lines * (2 + 2 * self.values * (days - 1)) > 2**32:
            msg = f"drift.values: {self.values} makes more than 2^32 values in {days} days; lower one of them"
            raise ConfigError(msg)


class Life:
    """The state of a day; see the module's table."""

    def __init__(
        self, shape: LogShape, draws: Draws, drift: Drift, seed: Sequence[int], keys: NDArray[np.uint32]
    ) -> None:
        """Of day 0.

        Args:
            shape: of the log.
            draws: of the hidden model on day 0.
            drift: of the days that follow.
            seed: of the days that follow.
            keys: random numbers, two for each sparse column.
        """
        self.day = 0
        self.draws = draws
        self._drift = drift
        self._seed = seed
        self._keys = keys.reshape(-1, 2)
        self._num_dense = len(shape.dense)
        self._first_line = np.cumsum([1, *(column.cardinality for column in shape.sparse)]).astype(np.uint32)
        shares = [code_shares(column) for column in shape.sparse]
        heads = [
            share[: min(column.cardinality, NUM_HEAD_RANKS)] for column, share in zip(shape.sparse, shares, strict=True)
        ]
        self._log_shares = [np.log(head) for head in heads]
        self._moves = [np.zeros(len(head)) for head in heads]
        self._lines = [np.arange(len(head), dtype=np.uint64) for head in heads]
        self._mortality = [
            np.rint(_FULL_MORTALITY * (1.0 - learnable(share)[: NUM_HEAD_RANKS + 1])).astype(np.uint64)
            for share in shares
        ]

    def next_day(self) -> "Life":
        """The state after another day."""
        later, drift = copy.copy(self), self._drift
        later.day += 1
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(3, later.day)))
        kept = math.sqrt(1.0 - drift.effects**2)
        effects = []
        angles = {i: angle + drift.effects * rng.normal(size=len(angle)) for i, angle in self.draws.angles.items()}
        for i, effect in enumerate(self.draws.effects):
            step = drift.effects * rng.normal(size=len(effect))
            if i < self._num_dense:  # slope and phase
                effects.append(np.array([kept, 1.0]) * effect + step)
                continue
            born, new = later._born_in_head(i - self._num_dense), rng.normal(size=len(effect))
            effects.append(np.where(born, new, kept * effect + step))
            if i in angles:
                angles[i] = np.where(born, rng.uniform(0, 2 * math.pi, len(effect)), angles[i])
        later.draws = Draws(tuple(effects), angles, self.draws.pairs)
        if drift.popularity:
            kept = math.sqrt(1.0 - (drift.popularity / _POPULARITY_STD) ** 2)
            later._moves = [kept * move + drift.popularity * rng.normal(size=len(move)) for move in self._moves]
            popularity = zip(self._log_shares, later._moves, strict=True)
            later._lines = [np.argsort(-share - move, kind="stable").astype(np.uint64) for share, move in popularity]
        return later

    def lines(self, column: int, ranks: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """The line that has each of these ranks of a sparse column on this day [B]."""
        lines = self._lines[column]
        in_head = np.minimum(ranks, np.uint64(len(lines) - 1)).view(np.int64)
        return np.where(ranks < len(lines), lines.take(in_head), ranks)

    def numbers(self, column: int, lines: NDArray[np.uint64]) -> NDArray[np.uint32]:
        """A number of the value that each of these lines of a sparse column has on this day, of no other value [B]."""
        generations = self.generations(column, lines) * np.uint64(self._first_line[-1])
        return (lines + generations).astype(np.uint32) + self._first_line[column]

    def generations(self, column: int, lines: NDArray[np.uint64]) -> NDArray[np.uint64]:
        """How many values of these lines of a sparse column have died until this day [B]."""
        numbers = lines.astype(np.uint32) + self._first_line[column]
        pace, age = (scatter(numbers ^ key).astype(np.uint64) for key in self._keys[column])
        # Lives are not equally long: the pace is uniform between 0 and twice the rate.
        pace *= np.uint64(round(2 * self._drift.values * 2**32))
        pace >>= np.uint64(32)
        pace *= self._mortality[column].take(np.minimum(lines, np.uint64(NUM_HEAD_RANKS)).view(np.int64))
        pace >>= np.uint64(_FULL_MORTALITY.bit_length() - 1)
        return (pace * np.uint64(self.day) + age) >> np.uint64(32)

    def _born_in_head(self, column: int) -> NDArray[np.bool_]:
        """For each code whether its value is new today; a missing value never is [codes]."""
        lines = np.arange(len(self._lines[column]), dtype=np.uint64)
        yesterday = copy.copy(self)
        yesterday.day -= 1
        born = np.zeros(NUM_HEAD_RANKS + 2, np.bool_)
        born[: len(lines)] = self.generations(column, lines) != yesterday.generations(column, lines)
        return born
