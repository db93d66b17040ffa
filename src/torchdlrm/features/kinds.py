"""Defines the kinds of values that features have: one object each, which all code that reads or writes values asks.

| kind | type of a column | from text | from numbers (Parquet, frames, tensors) | from JSON |
| --- | --- | --- | --- | --- |
| int | Int64 | a decimal number of 64 bits | whole ones; floats up to 2^53 | a whole number, or such a text |
| float | Float64 | a finite decimal number | finite ones | a finite number, or such a text |
| hex | UInt32 | 1 to 8 hexadecimal digits, upper or lower case | whole ones of 32 bits | such a text |
| id | Int64 | as int; in a log that is preprocessed a row of the column's table | as int | as int |
| string | String | anything | their text | a text; of a number its text |

Dense columns are of kind int or float, sparse ones of kind int, id, hex or string, or float where buckets make
categories of it; a column with several values a row has lists of these.  How a value is hashed follows from its type,
see `torchdlrm.features.value_hash`.

To add a kind, write a class and enter it, and its name, at the end of this module.  All methods take whole columns,
but for those named after one cell or one number.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

_UINT32_END = 2**32
_EXACT_BELOW = 2**53  # every whole number below it is a float64
# Whole numbers up to these are written with all their digits.
_EXACT_UP_TO: dict[pl.DataType, int] = {pl.Float32(): 2**24, pl.Float16(): 2**11}
_NO_DIGITS = "00000000"


class ValueKind:
    """What is true of every value of a kind; the methods here are right for numbers unless a kind overrides them.

    Attributes:
        name: as a schema gives it.
        dtype: the type of a typed column.
        fault: what is wrong with a cell that is no value of the kind.
        expected: what a cell should be, in words.
        is_text: whether values are texts, and no numbers.
        file_type: the type of values in a vocabulary's file.
        key_type: of the keys of a `ValueIndex`: the values, or the hashes of texts.
        openapi: a cell of JSON, as JSON Schema describes it.
        datatype: the Open Inference datatype that can say everything that a value may be, missing too where possible.
        json_types: the types of plain cells in JSON.
        stand_in: what `numbers_of_cells` takes where a cell is missing.
        cell_of: make an element of a tensor of `text`, of `integer`s or of `float`s a plain cell of JSON, or raise
            ValueError; what is not there is never plain.
    """

    name: ClassVar[str]
    dtype: ClassVar[type[pl.DataType]]
    fault: ClassVar[str] = ""
    expected: ClassVar[str]
    is_text: ClassVar[bool] = False
    file_type: ClassVar[pa.DataType] = pa.string()
    key_type: ClassVar[type[np.generic]] = np.int64
    openapi: ClassVar[dict[str, Any]]
    datatype: ClassVar[str] = "BYTES"
    json_types: ClassVar[frozenset[type]] = frozenset({type(None), str})
    stand_in: ClassVar[object] = None
    cell_of: ClassVar[Mapping[str, Callable[[Any], object]]] = {}

    # -- text

    def from_text(self, cell: pl.Expr) -> pl.Expr:
        """Cells of a log (String) as values; null where one is missing or no value."""
        return cell.cast(self.dtype, strict=False)

    def bad(self, text: pl.Series, typed: pl.Series) -> pl.Series | None:
        """Which cells are neither missing nor values of the kind; None where all are good, found at almost no cost."""
        odd = self._odd(text, typed)
        if typed.null_count() == text.null_count() and (odd is None or not odd.any()):
            return None
        bad = typed.is_null() & text.is_not_null()
        return bad if odd is None else bad | odd.fill_null(value=False)

    def _odd(self, text: pl.Series, typed: pl.Series) -> pl.Series | None:  # noqa: ARG002
        """Cells that `from_text` takes and the kind does not; None where it takes no such."""
        return None

    def to_text(self, values: pl.Series) -> pl.Series:
        """Values as a vocabulary's file and a log that is written have them; null stays null."""
        return values

    def from_file(self, values: pl.Series) -> pl.Series:
        """Values of a vocabulary's file as a typed column has them."""
        return values

    # -- numbers

    def from_numbers(self, numbers: pl.Series) -> tuple[pl.Series, pl.Series | None]:
        """Integers or floats, NaN for a missing one, as values; and which of them are none, None where all are.

        They are the values that `from_text` makes of `text_of_numbers`, without the text.
        """
        return self.text_of_numbers(numbers), None

    def text_of_numbers(self, numbers: pl.Series) -> pl.Series:
        """Numbers of any type as cells of text; NaN is missing."""
        return (numbers.fill_nan(None) if numbers.dtype.is_float() else numbers).cast(pl.String)

    def from_floats(self, x: npt.NDArray[np.float64]) -> pl.Series:
        """The nearest values: for numbers that a transform was inverted for."""
        return pl.Series(x).cast(self.dtype)

    # -- JSON

    def text_of_number(self, number: float) -> str | None:
        """A JSON number as the text that means the same; None where the kind takes no numbers.

        Raises:
            ValueError: it may not be the number that was sent.
        """
        return str(number)

    def numbers_of_cells(self, cells: Sequence[Any]) -> npt.NDArray[Any]:
        """Plain cells of JSON as numbers; not for texts.

        Raises:
            ValueError: a cell is not plain.
            OverflowError: likewise.
        """
        return np.array(cells, np.int64)


def _whole_or_missing(number: float) -> int | None:
    if math.isnan(number):
        return None
    if not number.is_integer() or abs(number) > _EXACT_BELOW:
        raise ValueError(number)
    return int(number)


def _number_or_missing(number: float) -> float | None:
    return None if math.isnan(number) else number


def _digits_of_integer(number: int) -> str:
    if not 0 <= number < _UINT32_END:
        raise ValueError(number)
    return f"{number:08x}"


class _Int(ValueKind):
    name, dtype, datatype = "int", pl.Int64, "INT64"
    fault, expected = "the cell is not an integer of 64 bits", "an integer"
    file_type = pa.int64()
    openapi: ClassVar = {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}
    json_types, stand_in = frozenset({type(None), int}), 0
    cell_of: ClassVar = {"integer": int, "float": _whole_or_missing}

    def text_of_numbers(self, numbers: pl.Series) -> pl.Series:
        if not numbers.dtype.is_float():
            return numbers.cast(pl.String)
        typed, bad = self.from_numbers(numbers)
        text = typed.cast(pl.String)
        return text if bad is None else text.zip_with(~bad, super().text_of_numbers(numbers))

    def text_of_number(self, number: float) -> str | None:
        # JavaScript writes 3 for 3.0, others 3.0 for 3: as numbers they are the same.
        if isinstance(number, int) or not number.is_integer():
            return str(number)
        if abs(number) <= _EXACT_BELOW:
            return str(int(number))
        # Parsers of JSON make a float of an integer of more than 64 bits.
        raise ValueError(f"the float {number!r} may have been rounded; send an integer of 64 bits")

    def from_numbers(self, numbers: pl.Series) -> tuple[pl.Series, pl.Series | None]:
        if numbers.dtype.is_float():
            numbers = numbers.cast(pl.Float64).fill_nan(None)  # Polars has no floor of Float16
            return _cast_good(numbers, (numbers != numbers.floor()) | (numbers.abs() > _EXACT_BELOW), pl.Int64)
        typed = numbers.cast(pl.Int64, strict=False)
        return typed, typed.is_null() & numbers.is_not_null() if typed.null_count() > numbers.null_count() else None

    def from_floats(self, x: npt.NDArray[np.float64]) -> pl.Series:
        return pl.Series(np.clip(np.rint(x), -(2.0**62), 2.0**62).astype(np.int64))


class _Id(_Int):
    """An integer that is an id already: a feature of this kind has no vocabulary."""

    name: ClassVar[str] = "id"
    fault: ClassVar[str] = "the cell is not an id, a whole number from 0 that is a row of the column's table"


class _Float(ValueKind):
    name, dtype, datatype = "float", pl.Float64, "FP64"
    fault, expected = "the cell is not a finite number", "a number"
    openapi: ClassVar = {"type": "number"}
    json_types, stand_in = frozenset({type(None), int, float}), 0
    cell_of: ClassVar = {"integer": int, "float": _number_or_missing}

    def _odd(self, text: pl.Series, typed: pl.Series) -> pl.Series | None:  # noqa: ARG002
        return ~typed.is_finite()

    def numbers_of_cells(self, cells: Sequence[Any]) -> npt.NDArray[Any]:
        numbers = np.array(cells, np.float64)
        if not np.isfinite(numbers).all():
            raise ValueError("a number is not finite")
        return numbers

    def from_numbers(self, numbers: pl.Series) -> tuple[pl.Series, pl.Series | None]:
        typed = numbers.cast(pl.Float64)
        if not numbers.dtype.is_float():
            return typed, None
        typed = typed.fill_nan(None)
        if (exact_up_to := _EXACT_UP_TO.get(numbers.dtype)) is not None:
            # Of fewer bits, the number that is written 0.1 is 0.1, not 0.10000000149 as it would be when cast.
            rows = ((typed != typed.floor()) | (typed.abs() > exact_up_to)).arg_true()
            typed = typed.scatter(rows, numbers.gather(rows).cast(pl.String).cast(pl.Float64))
        return _cast_good(typed, ~typed.is_finite(), pl.Float64)


class _Hex(ValueKind):
    name, dtype = "hex", pl.UInt32
    fault = "the cell is not 1 to 8 hexadecimal digits"
    expected = "hexadecimal digits as text, such as '68fd1e64'"
    key_type = np.uint32
    openapi: ClassVar = {"type": "string", "pattern": "^[0-9a-fA-F]{0,8}$", "maxLength": 8}
    stand_in = _NO_DIGITS
    cell_of: ClassVar = {"text": str, "integer": _digits_of_integer}

    def from_text(self, cell: pl.Expr) -> pl.Expr:
        return cell.str.to_integer(base=16, dtype=pl.UInt32, strict=False)

    def _odd(self, text: pl.Series, typed: pl.Series) -> pl.Series | None:  # noqa: ARG002
        """Leading zeros past 8 digits, and a sign."""
        cell = pl.col(text.name)
        return text.to_frame().select((cell.str.len_bytes() > 8) | cell.str.starts_with("+")).to_series()

    def to_text(self, values: pl.Series) -> pl.Series:
        return hex_digits(values)

    def from_file(self, values: pl.Series) -> pl.Series:
        return values.str.to_integer(base=16, dtype=pl.UInt32)

    def from_numbers(self, numbers: pl.Series) -> tuple[pl.Series, pl.Series | None]:
        wide = numbers.cast(pl.Float64).fill_nan(None)  # wide enough for all that the kind takes
        return _cast_good(wide, (wide != wide.floor()) | ~wide.is_between(0, _UINT32_END - 1), pl.UInt32)

    def text_of_numbers(self, numbers: pl.Series) -> pl.Series:
        """The digits that the numbers are; of other numbers a text that is no digits."""
        typed, bad = self.from_numbers(numbers)
        digits = hex_digits(typed).alias(numbers.name)
        return digits if bad is None else digits.zip_with(~bad, "the number " + numbers.cast(pl.String))

    def text_of_number(self, number: float) -> str | None:  # noqa: ARG002
        return None

    def numbers_of_cells(self, cells: Sequence[Any]) -> npt.NDArray[Any]:
        digits = bytes.fromhex("".join(cells))
        # Spaces between bytes are left out; so there are enough only where every cell has nothing but digits.
        if set(map(len, cells)) - {len(_NO_DIGITS)} or len(digits) != 4 * len(cells):
            raise ValueError("a text is not 8 hexadecimal digits")
        return np.frombuffer(digits, ">u4").astype(np.uint32)


class _String(ValueKind):
    name, dtype = "string", pl.String
    expected = "text"
    is_text, key_type = True, np.uint64
    openapi: ClassVar = {"type": "string"}
    cell_of: ClassVar = {"text": str}

    def from_text(self, cell: pl.Expr) -> pl.Expr:
        return cell


class _Vector(ValueKind):
    """`torchdlrm.features.vectors` reads them."""

    name, dtype, datatype = "vector", pl.Float32, "FP32"
    fault, expected = "the cell is not a list of `size` finite numbers", "a list of finite numbers"
    openapi: ClassVar = {"type": "array", "items": {"type": "number"}}


def _cast_good(numbers: pl.Series, bad: pl.Series, dtype: type[pl.DataType]) -> tuple[pl.Series, pl.Series | None]:
    return numbers.cast(dtype, strict=False), bad.fill_null(value=False) if bad.any() else None


def map_lists(lists: pl.Series, function: Callable[[pl.Series], pl.Series]) -> pl.Series:
    """Lists of what `function` makes of all their values, which it gets as one column; a null becomes an empty list."""
    lists = lists.fill_null([])
    values = function(lists.explode(empty_as_null=False)).to_arrow(compat_level=pl.CompatLevel.oldest())
    ends = lists.list.len().cum_sum().cast(pl.Int64).to_arrow()
    offsets = pa.concat_arrays([pa.array([0], pa.int64()), ends])
    return pl.Series(lists.name, pa.LargeListArray.from_arrays(offsets, values))


def hex_digits(values: pl.Series) -> pl.Series:
    """UInt32 numbers as 8 lower-case hexadecimal digits; null stays null."""
    pairs = np.frombuffer(b"".join(b"%02x" % byte for byte in range(256)), np.uint16)  # the two digits of each byte
    digits = pairs[values.fill_null(0).to_numpy().astype(">u4").view(np.uint8)]
    offsets = np.arange(0, 8 * len(values) + 1, 8, dtype=np.int64)
    text = pa.LargeStringArray.from_buffers(len(values), pa.py_buffer(offsets), pa.py_buffer(digits))
    return pl.select(pl.when(values.is_not_null()).then(pl.Series(text)).alias(values.name)).to_series()


INT, ID, FLOAT, HEX, STRING = _Int(), _Id(), _Float(), _Hex(), _String()
KINDS: dict[str, ValueKind] = {kind.name: kind for kind in (INT, ID, FLOAT, HEX, STRING, _Vector())}
DenseKindName = Literal["int", "float", "vector"]
SparseKindName = Literal["string", "int", "id", "hex", "float"]
