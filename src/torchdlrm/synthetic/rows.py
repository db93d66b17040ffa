"""Makes rows of a synthetic log: random bits -> codes -> labels and text.

In: which rows.  Out: their bytes in the log, labels and true logits.  Row i depends on the seed, the preset and i
alone (a counter-based generator is asked for the bits of its block), so that any number of workers may produce any
part of the log, and a shorter log is the beginning of a longer one. Each of several days has blocks of its own.

Cost: some 2 us a row on one core, 8 with companions. Text is put together in a matrix of fixed width, a record a row,
where short fields are padded with NUL; the padding is dropped from the whole at once.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from torchdlrm.synthetic.model import Codes, HiddenModel, click_thresholds
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, NUM_HEAD_RANKS, PRESETS, DenseShape
from torchdlrm.synthetic.values import Companions, Drift, Values, scatter

VALUE_SEPARATOR = ","

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
_LABEL_FIELDS = np.frombuffer(b"0\t1\t", "u2")


@dataclass(frozen=True)
class Rows:
    """B consecutive rows.

    Attributes:
        text: their lines; where the click is late as if there were none.
        late_text: the lines of the rows whose click is late, with it.
        outcomes: int32 [B], 2 * logit + label: the true logit on the grid of the hidden model, and whether it clicked.
        others: outcomes of another label, or with the logit without an input, by a name for it.
    """

    text: bytes
    late_text: bytes
    outcomes: NDArray[np.int32]
    others: Mapping[str, NDArray[np.int32]]


@dataclass(frozen=True)
class _Sample:
    """What was drawn for the rows of a block: codes of all columns, and of the sparse ones lines and missing rows."""

    codes: list[Codes]
    lines: list[NDArray[np.uint64]]
    sparse_missing: list[NDArray[np.bool_] | None]


class RowGenerator:
    """Makes any part of the log that a preset and a seed define, with companions of the values or without.

    It is the log of day 0. `next_day` gives those of the days after it, which have no companions.
    """

    def __init__(
        self, preset: str, seed: int, companions: Companions | None = None, drift: Drift | None = None
    ) -> None:
        self.shape, self._drift = PRESETS[preset], drift or Drift()
        self._entropy = [seed, list(PRESETS).index(preset)]
        seeds = np.random.SeedSequence(self._entropy).spawn(4)
        key_low, key_high = seeds[0].generate_state(2, np.uint64)
        self._key = int(key_low) | int(key_high) << 64
        num_values = sum(MULTI_HOT_SIZES) if companions else len(self.shape.sparse)
        companion_keys = np.array(seeds[2].generate_state(num_values), np.uint32)
        keys = np.array(seeds[3].generate_state(2 * len(self.shape.sparse)), np.uint32)
        self.values = Values(self.shape, self._drift, keys, companions, companion_keys)
        self._empty_line = _empty_line(len(self.shape.dense), self.values.sizes)
        self._dense_fields = [_dense_fields(column) for column in self.shape.dense]
        self._hex_digits = _hex_digits()
        self._thresholds = click_thresholds()
        blocks = range(_CALIBRATION_FIRST_BLOCK, _CALIBRATION_FIRST_BLOCK + _NUM_CALIBRATION_BLOCKS)
        samples = [self._sample(self._bits(block)).codes for block in blocks]
        codes = [np.concatenate(column) for column in zip(*samples, strict=True)]
        self.model = HiddenModel(self.shape, np.random.default_rng(seeds[1]), codes)

    def next_day(self) -> "RowGenerator":
        """A generator for the log of the day after this one's."""
        later = copy.copy(self)
        rng = np.random.default_rng(np.random.SeedSequence(self._entropy, spawn_key=(3, self.values.day + 1)))
        born = [self.values.born_tomorrow(column) for column in range(len(self.shape.sparse))]
        later.model = self.model.next_day(self._drift.effects, rng, born)
        later.values = self.values.next_day(rng)
        return later

    def rows(self, start: int, end: int, *, label_delay: float = 0.0, with_text: bool = True) -> Rows:
        """Rows of the log.

        Args:
            start: the first, a multiple of BLOCK_ROWS.
            end: the one behind the last.
            label_delay: fraction of the clicks that the text does not show yet.
            with_text: otherwise all text is empty, in half of the time.
        """
        texts, late_texts, outcomes = [], [], []
        for first_row in range(start, end, BLOCK_ROWS):
            bits, num_rows = self._bits(first_row // BLOCK_ROWS), min(BLOCK_ROWS, end - first_row)
            sample = self._sample(bits)
            logits = self.model.logits(sample.codes)
            label_bits = bits.view(np.uint32).reshape(-1, BLOCK_ROWS)[_LABEL_32]
            labels = label_bits < self._thresholds.take(logits)
            outcomes.append((2 * logits + labels)[:num_rows])
            if with_text:
                late = labels & (scatter(label_bits.copy()) < label_delay * 2.0**32)
                lines = self._lines(labels & ~late, sample)[:num_rows]
                texts.append(_text(lines))
                lines = lines[late[:num_rows]]
                lines["label"] = _LABEL_FIELDS[1]
                late_texts.append(_text(lines))
        return Rows(b"".join(texts), b"".join(late_texts), np.concatenate(outcomes), {})

    def _bits(self, block: int) -> NDArray[np.uint64]:
        block += self.values.day * _BLOCKS_PER_DAY
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
        lines: list[NDArray[np.uint64]] = []
        for bits_of_column, sparse in zip(by_32, self.shape.sparse, strict=False):
            cell = sparse.cells.take((bits_of_column >> 16).astype(np.int64))
            rank = (bits_of_column & 0xFFFF) * (cell & 0xFFFFFFFF)
            rank >>= 16
            rank += cell >> 32
            lines.append(self.values.lines(len(lines), rank))
            codes.append(np.minimum(lines[-1], NUM_HEAD_RANKS).view(np.int64))
        missing = [is_missing.get(column.missing_rate) for column in self.shape.columns]
        for column, code, rows in zip(self.shape.columns, codes, missing, strict=True):
            if rows is not None:
                code[rows] = len(column.code_fractions) - 1
        return _Sample(codes, lines, missing[num_dense:])

    def _lines(self, labels: NDArray[np.bool_], sample: _Sample) -> NDArray[np.void]:
        """Of a block: a record a row, padded with NUL."""
        lines = np.empty(BLOCK_ROWS, self._empty_line.dtype)
        lines[:] = self._empty_line
        lines["label"] = _LABEL_FIELDS.take(labels)
        for i, fields in enumerate(self._dense_fields):
            lines[f"int_{i}"] = fields.take(sample.codes[i])
        low_digits, high_digits = self._hex_digits
        for i, (line, missing) in enumerate(zip(sample.lines, sample.sparse_missing, strict=True)):
            value = scatter(self.values.numbers(i, line, missing)).astype(np.int64)
            digits = high_digits.take(value >> 16)
            digits |= low_digits.take(value & 0xFFFF)
            if missing is not None and not self.values.companions:
                digits[:, missing] = 0
            lines[f"cat_{i}"]["digits"] = digits.T
        return lines


def _text(lines: NDArray[np.void]) -> bytes:
    return lines.tobytes().translate(None, b"\0")


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
