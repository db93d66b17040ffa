"""Defines the hidden model that decides who clicks in a synthetic log, in integers.

In: the codes of B rows, one per column.  Out: their true log-odds in units of 1 / `LOGIT_UNITS`.

    logit = intercept
          + sum over columns of      main_effect[column][code]              what a logistic regression can learn
          + sum over column pairs of latent[left][code] . latent[right][code]   what takes a model of interactions

Integer columns act through a curve that is not monotone in log(x + 3). Categorical values act the more, the more rows
they have: what sits on values too rare to be learnt would only lower what any model can reach. For the same reason
there are few pairs, of the columns that vary most among frequent values: 500,000 rows are enough for a small DLRM to
find them. Both parts are centred and scaled to a given standard deviation, so that about the same AUC is attainable
with every seed.

All arithmetic on rows is on integers: no rounding, hence the same labels on every machine.
"""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchdlrm.synthetic.shapes import NUM_HEAD_RANKS, DenseShape, LogShape, SparseShape

Codes = NDArray[np.int64]  # numpy would convert any other type at each look-up
_Floats = NDArray[np.float64]
_Tables = tuple[list[_Floats], dict[int, _Floats]]  # of main effects [codes], of latents [2, codes]

LOGIT_UNITS = 1024
NUM_LOGITS = 1 << 15  # logits from -16 to 16

_INTERACTION_FRACTION = 0.11  # of the variance of the logits
_HALF_LEARNABLE_FRACTION = 1e-2  # a value on this fraction of the rows has half of the effect that a frequent one has
_NUM_COLUMNS_IN_PAIRS = 4

# Fractional bits of the tables; the product of two latents has twice as many as a latent.
_MAIN_BITS = 16
_LATENT_BITS = 8


class HiddenModel:
    """The effects of a day, see the module's formula; `next_day` gives those of the next.

    Effects are random: a normal number for each code of a sparse column, slope and phase of the curve of a dense one,
    and for the columns of a pair the direction of each code's latent. Centres, scales and intercept are those of the
    first day, so that an effect that does not drift stays as it is. The few integer columns say most; drift changes
    the shape of their curves, and not how much each says.

    Args:
        shape: of the log.
        rng: draws the effects.
        calibration_codes: of rows like those of the log, for each column.
    """

    def __init__(self, shape: LogShape, rng: np.random.Generator, calibration_codes: list[Codes]) -> None:
        self._columns, num_dense = shape.columns, len(shape.dense)
        self._effects = [_draw_effect(column, rng) for column in self._columns]
        chosen = _choose_pairs([column.code_fractions for column in shape.sparse], rng)
        self._pairs = [(num_dense + left, num_dense + right) for left, right in chosen]
        self._angles = {i: _draw_angles(NUM_HEAD_RANKS + 2, rng) for pair in self._pairs for i in pair}

        main, latents = self._drawn()
        self._means = [_mean(table, column.code_fractions) for table, column in zip(main, self._columns, strict=True)]
        self._dense_stds = [_std(main[i], column.code_fractions) for i, column in enumerate(shape.dense)]
        self._latent_means = {i: _mean(table, self._columns[i].code_fractions) for i, table in latents.items()}
        main, latents = self._centred(main, latents)
        main_std = np.std(sum(table[code] for table, code in zip(main, calibration_codes, strict=True)))
        vectors = {i: table[:, calibration_codes[i]] for i, table in latents.items()}
        products = sum((vectors[left] * vectors[right]).sum(axis=0) for left, right in self._pairs)
        self._main_scale = 2.0**_MAIN_BITS * shape.logit_std * math.sqrt(1.0 - _INTERACTION_FRACTION) / main_std
        latent_std = math.sqrt(shape.logit_std * math.sqrt(_INTERACTION_FRACTION) / np.std(products))
        self._latent_scale = 2.0**_LATENT_BITS * latent_std
        self._make_tables(main, latents)
        effects = self.main_effects(calibration_codes) + self.interactions(calibration_codes)
        self._intercept = intercept(effects, 1 << _MAIN_BITS, shape.click_rate)

    def logits(self, codes: list[Codes]) -> NDArray[np.int32]:
        """True log-odds of B rows in units of 1 / LOGIT_UNITS, from 0 for -16: an index into `click_thresholds`.

        Args:
            codes: for each column the codes of the rows [B].
        """
        total = self.main_effects(codes)
        total += self.interactions(codes)
        total += self._intercept
        total >>= _MAIN_BITS - (LOGIT_UNITS.bit_length() - 1)
        total += NUM_LOGITS // 2
        return np.clip(total, 0, NUM_LOGITS - 1, out=total)

    def main_effects(self, codes: list[Codes]) -> NDArray[np.int32]:
        """The part of the logits that is a sum over columns [B]."""
        total = np.zeros(len(codes[0]), np.int32)
        for table, code in zip(self._main, codes, strict=True):
            total += table.take(code)
        return total

    def interactions(self, codes: list[Codes]) -> NDArray[np.int32]:
        """The part of the logits that is a sum over pairs of columns [B]."""
        total = np.zeros(len(codes[0]), np.int32)
        for axis in range(2):
            latents = {column: table[axis].take(codes[column]) for column, table in self._latents.items()}
            for left, right in self._pairs:
                total += latents[left] * latents[right]
        return total

    def next_day(self, drift: float, rng: np.random.Generator, born: Sequence[NDArray[np.bool_]]) -> "HiddenModel":
        """The model of the day after this one's.

        With a rate r, a normal number z becomes sqrt(1 - r^2) z + r * normal; phases and angles take steps of r
        radians. After k days the correlation with what they were is about exp(-k r^2 / 2).

        Args:
            drift: the rate, 0 to 1.
            rng: draws the steps.
            born: of each sparse column the codes whose value is new on that day, with effects of its own [codes].
        """
        later, kept = copy.copy(self), math.sqrt(1.0 - drift**2)
        num_dense = len(self._columns) - len(born)
        later._angles = {i: angles + drift * rng.normal(size=len(angles)) for i, angles in self._angles.items()}
        later._effects = []
        for i, effect in enumerate(self._effects):
            step = drift * rng.normal(size=len(effect))
            if i < num_dense:  # slope and phase
                later._effects.append(np.array([kept, 1.0]) * effect + step)
                continue
            is_born, new = born[i - num_dense], rng.normal(size=len(effect))
            later._effects.append(np.where(is_born, new, kept * effect + step))
            if i in later._angles:
                new_angles = rng.uniform(0, 2 * math.pi, len(effect))
                later._angles[i] = np.where(is_born, new_angles, later._angles[i])
        later._make_tables(*later._centred(*later._drawn()))
        return later

    def _drawn(self) -> _Tables:
        """The tables of the effects as they are drawn, less where they cannot be learnt."""
        main = [_main_effect(column, effect) for column, effect in zip(self._columns, self._effects, strict=True)]
        latents = {
            i: np.stack([np.cos(angles), np.sin(angles)]) * learnable(self._columns[i].code_fractions)
            for i, angles in self._angles.items()
        }
        return main, latents

    def _centred(self, main: list[_Floats], latents: dict[int, _Floats]) -> _Tables:
        """With mean 0 over the rows; for latents: so that their product has no main effect."""
        centred = [table - mean for table, mean in zip(main, self._means, strict=True)]
        for i, std in enumerate(self._dense_stds):
            fractions = self._columns[i].code_fractions
            centred[i] = (main[i] - _mean(main[i], fractions)) * (std / _std(main[i], fractions))
        return centred, {i: table - self._latent_means[i] for i, table in latents.items()}

    def _make_tables(self, main: list[_Floats], latents: dict[int, _Floats]) -> None:
        self._main = [np.rint(table * self._main_scale).astype(np.int32) for table in main]
        self._latents = {i: np.rint(table * self._latent_scale).astype(np.int32) for i, table in latents.items()}


def click_thresholds() -> NDArray[np.uint32]:
    """For each logit of the grid 2^32 times its probability: a row is clicked if its 32 random bits lie below."""
    logits = (np.arange(NUM_LOGITS) - NUM_LOGITS // 2) / LOGIT_UNITS
    return np.rint(2.0**32 / (1.0 + np.exp(-logits))).astype(np.uint32)


def learnable(fractions: _Floats) -> _Floats:
    """From 0 for values that no model sees often enough, to 1, given the fraction of rows of each code [codes]."""
    weights = fractions / (fractions + _HALF_LEARNABLE_FRACTION)
    weights[NUM_HEAD_RANKS] = 0.0
    return weights


def _mean(table: _Floats, fractions: _Floats) -> _Floats:
    """Over the rows [..., 1], of a table [..., codes]."""
    return (table * fractions).sum(axis=-1, keepdims=True)


def _std(table: _Floats, fractions: _Floats) -> float:
    """Over the rows, of a table [codes]."""
    return math.sqrt(((table - _mean(table, fractions)) ** 2 * fractions).sum())


def _draw_effect(column: DenseShape | SparseShape, rng: np.random.Generator) -> _Floats:
    if isinstance(column, SparseShape):
        return rng.normal(size=NUM_HEAD_RANKS + 2)
    return np.array([rng.normal(), rng.uniform(0, 2 * math.pi)])


def _draw_angles(num_codes: int, rng: np.random.Generator) -> _Floats:
    # The golden angle keeps the most frequent values apart.
    return rng.uniform(0, 2 * math.pi) + math.pi * (3 - math.sqrt(5)) * np.arange(num_codes, dtype=np.float64)


def _main_effect(column: DenseShape | SparseShape, effect: _Floats) -> _Floats:
    if isinstance(column, SparseShape):
        return effect * learnable(column.code_fractions)
    logs = np.log(np.append(column.values, 0) + 3.0)  # a missing integer acts as 0: encoded, the two look the same
    x = (logs - logs[:-1].mean()) / logs[:-1].std()
    slope, phase = effect
    return slope * x + np.sin(1.2 * x + phase)


def _choose_pairs(fractions: list[_Floats], rng: np.random.Generator) -> list[tuple[int, int]]:
    """Pairs of the sparse columns that vary most among frequent values, from the fractions of their codes."""

    def variety(fractions_of_codes: _Floats) -> float:
        ranks = fractions_of_codes[:NUM_HEAD_RANKS]
        frequent = ranks[ranks > _HALF_LEARNABLE_FRACTION]
        return float((frequent * (1.0 - frequent)).sum())

    varied = sorted(range(len(fractions)), key=lambda i: variety(fractions[i]))[-_NUM_COLUMNS_IN_PAIRS:]
    columns = [int(i) for i in rng.permutation(varied)]
    return list(zip(columns[::2], columns[1::2], strict=True))


def intercept(effects: NDArray[Any], units: int, rate: float, weights: _Floats | float = 1.0) -> int:
    """That with which the mean of weight times probability is the rate, by bisection; all in 1 / `units`."""
    logits = effects / units
    low, high = -20.0, 20.0
    while high - low > 2.0**-_MAIN_BITS:
        middle = (low + high) / 2
        if (weights / (1.0 + np.exp(-(logits + middle)))).mean() < rate:
            low = middle
        else:
            high = middle
    return round(low * units)
