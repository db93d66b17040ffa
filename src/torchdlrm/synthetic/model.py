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

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchdlrm.synthetic.shapes import NUM_CELLS, DenseShape, LogShape, SparseShape

Codes = NDArray[np.int64]  # numpy would convert any other type at each look-up
_Tables = tuple[list[NDArray[np.float64]], dict[int, NDArray[np.float64]]]  # of main effects, of latents

# Ranks from here on share one code without effect; a missing value has the code after it.
NUM_HEAD_RANKS = 4096

LOGIT_UNITS = 1024
NUM_LOGITS = 1 << 15  # logits from -16 to 16

_INTERACTION_SHARE = 0.11  # of the variance of the logits
_HALF_LEARNABLE_SHARE = 1e-2  # a value on this share of the rows has half of the effect that a frequent one has
_NUM_COLUMNS_IN_PAIRS = 4

# Fractional bits of the tables; the product of two latents has twice as many as a latent.
_MAIN_BITS = 16
_LATENT_BITS = 8


def missing_code(column: DenseShape | SparseShape) -> int:
    """The code of a missing value: the last one. The other codes are the cell of an integer, or the rank of a value."""
    return NUM_CELLS if isinstance(column, DenseShape) else NUM_HEAD_RANKS + 1


@dataclass(frozen=True)
class HiddenModel:
    """Effects as tables of integers; see the module's formula.

    Attributes:
        intercept: log-odds of a row without effects, with `_MAIN_BITS` fractional bits.
        main: for each column int32 [codes].
        latents: for the columns that stand in a pair int32 [2, codes].
        pairs: indices of two sparse columns each; no column stands in two pairs.
    """

    intercept: int
    main: tuple[NDArray[np.int32], ...]
    latents: dict[int, NDArray[np.int32]]
    pairs: tuple[tuple[int, int], ...]

    def logits(self, codes: list[Codes]) -> NDArray[np.int32]:
        """True log-odds of B rows in units of 1 / LOGIT_UNITS, from 0 for -16: an index into `click_thresholds`.

        Args:
            codes: for each column the codes of the rows [B].
        """
        total = self.main_effects(codes)
        total += self.interactions(codes)
        total += self.intercept
        total >>= _MAIN_BITS - (LOGIT_UNITS.bit_length() - 1)
        total += NUM_LOGITS // 2
        return np.clip(total, 0, NUM_LOGITS - 1, out=total)

    def main_effects(self, codes: list[Codes]) -> NDArray[np.int32]:
        """The part of the logits that is a sum over columns [B]."""
        total = np.zeros(len(codes[0]), np.int32)
        for table, code in zip(self.main, codes, strict=True):
            total += table.take(code)
        return total

    def interactions(self, codes: list[Codes]) -> NDArray[np.int32]:
        """The part of the logits that is a sum over pairs of columns [B]."""
        total = np.zeros(len(codes[0]), np.int32)
        for axis in range(2):
            latents = {column: table[axis].take(codes[column]) for column, table in self.latents.items()}
            for left, right in self.pairs:
                total += latents[left] * latents[right]
        return total


def click_thresholds() -> NDArray[np.uint32]:
    """For each logit of the grid 2^32 times its probability: a row is clicked if its 32 random bits lie below."""
    logits = (np.arange(NUM_LOGITS) - NUM_LOGITS // 2) / LOGIT_UNITS
    return np.rint(2.0**32 / (1.0 + np.exp(-logits))).astype(np.uint32)


@dataclass(frozen=True)
class Draws:
    """What of a hidden model is random.

    Attributes:
        effects: for each sparse column a normal number for each code [codes], for each dense one slope and phase [2].
        angles: for each column that stands in a pair the direction of the latent of each code [codes].
        pairs: as of the model.
    """

    effects: tuple[NDArray[np.float64], ...]
    angles: dict[int, NDArray[np.float64]]
    pairs: tuple[tuple[int, int], ...]


def draw_effects(shape: LogShape, rng: np.random.Generator) -> Draws:
    """Draw a model for logs of that shape."""
    shares = [code_shares(column) for column in shape.columns]
    effects = tuple(_draw_effect(column, rng) for column in shape.columns)
    num_dense = len(shape.dense)
    pairs = tuple((num_dense + i, num_dense + j) for i, j in _choose_pairs(shares[num_dense:], rng))
    return Draws(effects, {i: _draw_angles(len(shares[i]), rng) for pair in pairs for i in pair}, pairs)


class ModelMaker:
    """Makes models of draws: centred, scaled and with the click rate of the preset for the draws that it is made with.

    Other draws keep centres, scales and intercept, so that an effect that was drawn as before is as before. The few
    integer columns say most; other draws change the shape of their curves, and not how much each says.
    """

    def __init__(self, shape: LogShape, draws: Draws, calibration_codes: list[Codes]) -> None:
        """Calibrate.

        Args:
            shape: of the log.
            draws: to calibrate for.
            calibration_codes: codes of rows like those of the log, for each column.
        """
        self._columns = shape.columns
        self._shares = [code_shares(column) for column in shape.columns]
        main, latents = self._tables(draws)
        self._dense_stds = [_std(main[i], self._shares[i]) for i in range(len(shape.dense))]
        self._main_means = [_mean(table, shares) for table, shares in zip(main, self._shares, strict=True)]
        self._latent_means = {i: _mean(table, self._shares[i]) for i, table in latents.items()}
        main, latents = self._centred(main, latents)
        main_std = np.std(sum(table[code] for table, code in zip(main, calibration_codes, strict=True)))
        vectors = {i: table[:, calibration_codes[i]] for i, table in latents.items()}
        interaction_std = np.std(sum((vectors[left] * vectors[right]).sum(axis=0) for left, right in draws.pairs))
        self._main_scale = 2.0**_MAIN_BITS * shape.logit_std * math.sqrt(1.0 - _INTERACTION_SHARE) / main_std
        latent_std = math.sqrt(shape.logit_std * math.sqrt(_INTERACTION_SHARE) / interaction_std)
        self._latent_scale = 2.0**_LATENT_BITS * latent_std
        self._intercept = 0
        model = self.model(draws)
        effects = model.main_effects(calibration_codes) + model.interactions(calibration_codes)
        self._intercept = _intercept(effects, shape.click_rate)

    def model(self, draws: Draws) -> HiddenModel:
        """The model of these draws."""
        main, latents = self._centred(*self._tables(draws))
        return HiddenModel(
            intercept=self._intercept,
            main=tuple(np.rint(table * self._main_scale).astype(np.int32) for table in main),
            latents={i: np.rint(table * self._latent_scale).astype(np.int32) for i, table in latents.items()},
            pairs=draws.pairs,
        )

    def _tables(self, draws: Draws) -> _Tables:
        main = [
            _main_effect(column, shares, effect)
            for column, shares, effect in zip(self._columns, self._shares, draws.effects, strict=True)
        ]
        return main, {i: _latent(self._shares[i], angles) for i, angles in draws.angles.items()}

    def _centred(self, main: list[NDArray[np.float64]], latents: dict[int, NDArray[np.float64]]) -> _Tables:
        """With mean 0 over the rows; for latents: so that their product has no main effect."""
        centred = [table - mean for table, mean in zip(main, self._main_means, strict=True)]
        for i, std in enumerate(self._dense_stds):
            shares = self._shares[i]
            centred[i] = (main[i] - _mean(main[i], shares)) * (std / _std(main[i], shares))
        return centred, {i: table - self._latent_means[i] for i, table in latents.items()}


def code_shares(column: DenseShape | SparseShape) -> NDArray[np.float64]:
    """The share of rows that have each code [codes]; sums to 1."""
    if isinstance(column, DenseShape):
        present = np.full(NUM_CELLS, 1.0 / NUM_CELLS)
    else:
        ranks = np.minimum(np.arange(NUM_HEAD_RANKS + 1.0), column.cardinality)
        below = column.share_below(ranks)
        present = np.append(np.diff(below), 1.0 - below[-1])
    return np.append(present * (1.0 - column.missing_rate), column.missing_rate)


def _mean(table: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the rows [..., 1], of a table [..., codes]."""
    return (table * shares).sum(axis=-1, keepdims=True)


def _std(table: NDArray[np.float64], shares: NDArray[np.float64]) -> float:
    """Over the rows, of a table [codes]."""
    return math.sqrt(((table - _mean(table, shares)) ** 2 * shares).sum())


def learnable(shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0 for values that no model sees often enough, to 1 [codes]."""
    weights = shares / (shares + _HALF_LEARNABLE_SHARE)
    weights[NUM_HEAD_RANKS] = 0.0
    return weights


def _standardised_log(column: DenseShape) -> NDArray[np.float64]:
    """log(x + 3) of each code, standardised [codes]. A missing integer acts as 0: encoded, the two look the same."""
    logs = np.log(np.append(column.values, 0) + 3.0)
    return (logs - logs[:-1].mean()) / logs[:-1].std()


def _draw_effect(column: DenseShape | SparseShape, rng: np.random.Generator) -> NDArray[np.float64]:
    if isinstance(column, SparseShape):
        return rng.normal(size=NUM_HEAD_RANKS + 2)
    return np.array([rng.normal(), rng.uniform(0, 2 * math.pi)])


def _main_effect(
    column: DenseShape | SparseShape, shares: NDArray[np.float64], effect: NDArray[np.float64]
) -> NDArray[np.float64]:
    if isinstance(column, SparseShape):
        return effect * learnable(shares)
    x = _standardised_log(column)
    slope, phase = effect
    return slope * x + np.sin(1.2 * x + phase)


def _draw_angles(num_codes: int, rng: np.random.Generator) -> NDArray[np.float64]:
    # The golden angle keeps the most frequent values apart.
    return rng.uniform(0, 2 * math.pi) + math.pi * (3 - math.sqrt(5)) * np.arange(num_codes, dtype=np.float64)


def _latent(shares: NDArray[np.float64], angles: NDArray[np.float64]) -> NDArray[np.float64]:
    """A point on the unit circle for each code, shrunk where it cannot be learnt [2, codes]."""
    return np.stack([np.cos(angles), np.sin(angles)]) * learnable(shares)


def _choose_pairs(shares: list[NDArray[np.float64]], rng: np.random.Generator) -> tuple[tuple[int, int], ...]:
    """Pairs of the sparse columns that vary most among frequent values, from the shares of their codes."""

    def variety(shares_of_codes: NDArray[np.float64]) -> float:
        ranks = shares_of_codes[:NUM_HEAD_RANKS]
        frequent = ranks[ranks > _HALF_LEARNABLE_SHARE]
        return float((frequent * (1.0 - frequent)).sum())

    varied = sorted(range(len(shares)), key=lambda i: variety(shares[i]))[-_NUM_COLUMNS_IN_PAIRS:]
    columns = [int(i) for i in rng.permutation(varied)]
    return tuple(zip(columns[::2], columns[1::2], strict=True))


def _intercept(effects: NDArray[np.int32], click_rate: float) -> int:
    """That with which the mean probability is the click rate, by bisection."""
    logits = effects / 2.0**_MAIN_BITS
    low, high = -20.0, 20.0
    while high - low > 2.0**-_MAIN_BITS:
        middle = (low + high) / 2
        if (1.0 / (1.0 + np.exp(-(logits + middle)))).mean() < click_rate:
            low = middle
        else:
            high = middle
    return round(low * 2**_MAIN_BITS)
