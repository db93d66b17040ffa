"""Makes rows of a synthetic log: random bits -> codes -> labels and text.

In: which rows.  Out: their bytes in the log, labels and true logits.  Row i depends on the seed, the preset and i
alone (a counter-based generator is asked for the bits of its block), so that any number of workers may produce any
part of the log, and a shorter log is the beginning of a longer one. Each of several days has blocks of its own.

Cost: some 2 us a row on one core, 8 with companions. Text is put together in a matrix of fixed width, a record a row,
where short fields are padded with NUL; the padding is dropped from the whole at once.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchdlrm.synthetic.drift import Drift, Life
from torchdlrm.synthetic.model import (
    NUM_HEAD_RANKS,
    Codes,
    ModelMaker,
    click_thresholds,
    draw_effects,
    missing_code,
)
from torchdlrm.synthetic.multi_hot import VALUE_SEPARATOR, Companions, draw_companions, scatter
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, PRESETS, DenseShape

# Rows whose random bits are drawn together: changing it changes every log. The text of a block, 1.4 MB before the
# padding is dropped, stays in the cache.
BLOCK_ROWS = 4096

# 32 random bits a sparse column, 16 a dense column and a missing rate, 32 the label: in 64-bit words, column by column.
_WORDS_PER_ROW = 20
_FIRST_DENSE_16 = 26 * 2
_LABEL_32 = 2 * _WORDS_PER_ROW - 1

_CALIBRATION_FIRST_BLOCK = 1 << 100  # no log is as long
_NUM_CALIBRATION_BLOCKS = 64
_BLOCKS_PER_DAY = 1 << 64
_NO_DRIFT = Drift(0, 0, 0)


@dataclass(frozen=True)
class Rows:
    """B consecutive rows.

    Attributes:
        text: their lines; where the click is late as if there were none.
        labels: bool [B].
        logits: true ones, int32 [B] on the grid of the hidden model.
        late_text: the lines of the rows whose click is late, with it.
        late_clicks: how many.
    """

    text: bytes
    labels: NDArray[np.bool_]
    logits: NDArray[np.int32]
    late_text: bytes
    late_clicks: int


@dataclass(frozen=True)
class _Sample:
    """What was drawn for the rows of a block: codes of all columns, and of the sparse ones ranks and missing rows."""

    codes: list[Codes]
    ranks: list[NDArray[np.uint64]]
    sparse_missing: list[NDArray[np.bool_] | None]


class RowGenerator:
    """Makes any part of the log that a preset and a seed define, with companions of the values or without.

    It is the log of day 0. `next_day` gives those of the days after it, which have no companions.
    """

    def __init__(self, preset: str, seed: int, companions: Companions | None = None, drift: Drift = _NO_DRIFT) -> None:
        self.shape, self._companions = PRESETS[preset], companions
        entropy = [seed, list(PRESETS).index(preset)]
        seeds = np.random.SeedSequence(entropy).spawn(4)
        key_low, key_high = seeds[0].generate_state(2, np.uint64)
        self._key = int(key_low) | int(key_high) << 64
        # Ranks of all columns get numbers of their own, so that no two columns share a value.
        self._first_value = np.cumsum([1, *(column.cardinality for column in self.shape.sparse)])
        assert self._first_value[-1] < 2**32
        self._sizes = MULTI_HOT_SIZES if companions else (1,) * len(self.shape.sparse)
        keys = np.array(seeds[2].generate_state(sum(self._sizes)), np.uint32)
        self._companion_keys = np.split(keys, np.cumsum(self._sizes)[:-1])
        self._empty_line = _empty_line(len(self.shape.dense), self._sizes)
        self._dense_fields = [_dense_fields(column) for column in self.shape.dense]
        self._hex_digits = _hex_digits()
        self._thresholds = click_thresholds()
        draws = draw_effects(self.shape, np.random.default_rng(seeds[1]))
        keys = np.array(seeds[3].generate_state(2 * len(self.shape.sparse)), np.uint32)
        self._life = Life(self.shape, draws, drift, entropy, keys)
        blocks = range(_CALIBRATION_FIRST_BLOCK, _CALIBRATION_FIRST_BLOCK + _NUM_CALIBRATION_BLOCKS)
        samples = [self._sample(self._bits(block)).codes for block in blocks]
        codes = [np.concatenate(column) for column in zip(*samples, strict=True)]
        self._maker = ModelMaker(self.shape, draws, codes)
        self.model = self._maker.model(draws)

    @property
    def has_companions(self) -> bool:
        """Whether cells have several values."""
        return self._companions is not None

    def next_day(self) -> "RowGenerator":
        """A generator for the log of the day after this one's."""
        later = copy.copy(self)
        later._life = self._life.next_day()
        later.model = self._maker.model(later._life.draws)
        return later

    def block(
        self, index: int, num_rows: int = BLOCK_ROWS, *, label_delay: float = 0.0, with_text: bool = True
    ) -> Rows:
        """The first `num_rows` of the BLOCK_ROWS rows from row `index * BLOCK_ROWS` on.

        Args:
            index: of the block.
            num_rows: 1 to BLOCK_ROWS.
            label_delay: fraction of the clicks that the text does not show yet.
            with_text: otherwise all text is empty, in half of the time.
        """
        bits = self._bits(index)
        sample = self._sample(bits)
        logits = self.model.logits(sample.codes)
        label_bits = bits.view(np.uint32).reshape(-1, BLOCK_ROWS)[_LABEL_32]
        labels = label_bits < self._thresholds.take(logits)
        late = labels & (scatter(label_bits.copy()) < label_delay * 2.0**32)
        text, late_text = self._text(labels, late, sample, num_rows) if with_text else (b"", b"")
        return Rows(text, labels[:num_rows], logits[:num_rows], late_text, int(late[:num_rows].sum()))

    def _bits(self, block: int) -> NDArray[np.uint64]:
        block += self._life.day * _BLOCKS_PER_DAY
        num_words = BLOCK_ROWS * _WORDS_PER_ROW
        # A step of Philox's counter gives four words.
        generator = np.random.Generator(np.random.Philox(key=self._key, counter=block * num_words // 4))
        return generator.integers(2**64, size=num_words, dtype=np.uint64)

    def _sample(self, bits: NDArray[np.uint64]) -> _Sample:
        by_16 = bits.view(np.uint16).reshape(-1, BLOCK_ROWS)[_FIRST_DENSE_16:]
        by_32 = bits.view(np.uint32).reshape(-1, BLOCK_ROWS)
        num_dense = len(self.shape.dense)
        is_missing = {
            rate: bits_of_rate < round(rate * 2**16)
            for rate, bits_of_rate in zip(self.shape.missing_rates, by_16[num_dense:], strict=False)
        }
        codes: list[Codes] = [bits_of_column.astype(np.int64) for bits_of_column in by_16[:num_dense]]
        ranks: list[NDArray[np.uint64]] = []
        for bits_of_column, sparse in zip(by_32, self.shape.sparse, strict=False):
            cell = sparse.cells.take((bits_of_column >> 16).astype(np.int64))
            rank = (bits_of_column & 0xFFFF) * (cell & 0xFFFFFFFF)
            rank >>= 16
            rank += cell >> 32
            if self._life.day:
                rank = self._life.lines(len(ranks), rank)
            ranks.append(rank)
            codes.append(np.minimum(rank, NUM_HEAD_RANKS).view(np.int64))
        missing = [is_missing.get(column.missing_rate) for column in self.shape.columns]
        for column, code, rows in zip(self.shape.columns, codes, missing, strict=True):
            if rows is not None:
                code[rows] = missing_code(column)
        return _Sample(codes, ranks, missing[num_dense:])

    def _text(
        self, labels: NDArray[np.bool_], late: NDArray[np.bool_], sample: _Sample, num_rows: int
    ) -> tuple[bytes, bytes]:
        lines = np.empty(BLOCK_ROWS, self._empty_line.dtype)
        lines[:] = self._empty_line
        label_fields = np.frombuffer(b"0\t1\t", "u2")
        lines["label"] = label_fields.take(labels & ~late)
        for i, fields in enumerate(self._dense_fields):
            lines[f"int_{i}"] = fields.take(sample.codes[i])
        low_digits, high_digits = self._hex_digits
        for i, rank in enumerate(sample.ranks):
            value = scatter(self._numbers(i, rank, sample.sparse_missing[i])).astype(np.int64)
            digits = high_digits.take(value >> 16)
            digits |= low_digits.take(value & 0xFFFF)
            rows = sample.sparse_missing[i]
            if rows is not None and not self._companions:
                digits[:, rows] = 0
            lines[f"cat_{i}"]["digits"] = digits.T
        text = lines[:num_rows].tobytes().translate(None, b"\0")
        late_lines = lines[:num_rows][late[:num_rows]]
        late_lines["label"] = label_fields[1]
        return text, late_lines.tobytes().translate(None, b"\0")

    def _numbers(self, column: int, ranks: NDArray[np.uint64], missing: NDArray[np.bool_] | None) -> NDArray[np.uint32]:
        """The number of each value of a column's cells, [values in a cell, BLOCK_ROWS]."""
        numbers = np.empty((self._sizes[column], BLOCK_ROWS), np.uint32)
        if self._life.day:
            numbers[0] = self._life.numbers(column, ranks)
            return numbers
        numbers[0] = ranks
        if self._companions:
            cardinality, keys = self.shape.sparse[column].cardinality, self._companion_keys[column][1:]
            if missing is not None:
                numbers[0, missing] = cardinality
            numbers[1:] = draw_companions(numbers[0], keys, cardinality, self._companions)
        numbers += np.uint32(self._first_value[column])
        if self._companions and missing is not None:
            # A value like others, with companions, and a number that no column has.
            numbers[0, missing] = self._first_value[-1] + column
        return numbers


def _empty_line(num_dense: int, sizes: Sequence[int]) -> NDArray[np.void]:
    """A record with the separators that stand at fixed places; the others are part of the fields."""
    record: list[tuple[object, ...]] = [("label", "u2"), *((f"int_{i}", "u8") for i in range(num_dense))]
    record += [(f"cat_{i}", [("digits", "u8"), ("end", "u1")], (size,)) for i, size in enumerate(sizes)]
    line = np.zeros(1, np.dtype(record))
    for i in range(len(sizes)):
        ends = line[f"cat_{i}"]["end"]
        ends[:] = ord(VALUE_SEPARATOR)
        ends[:, -1] = ord("\n" if i == len(sizes) - 1 else "\t")
    return line


def _dense_fields(column: DenseShape) -> NDArray[np.uint64]:
    """The field of each code, with the tab that ends it, padded to 8 bytes [codes]."""
    assert column.values.max() < 10**7
    values, positions = np.unique(column.values, return_inverse=True)
    fields = np.array([*(b"%d\t" % value for value in values.tolist()), b"\t"], "S8").view(np.uint64)
    return fields[np.append(positions, len(values))]


def _hex_digits() -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The text of each 16-bit number as the low and as the high half of 8 hexadecimal digits [2^16]."""
    digits = np.frombuffer(b"".join(b"%04x" % number for number in range(1 << 16)), np.uint32).astype(np.uint64)
    # The high digits are the first bytes in memory, hence the low half of a little-endian word.
    return digits << np.uint64(32), digits
