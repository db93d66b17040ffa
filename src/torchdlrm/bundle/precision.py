"""Describes the precisions in which a bundle predicts, a record each. No torch: the command line reads them before it.

A new precision of tables is a name and a record here. How rows are written and read (`torchdlrm.bundle.write`),
looked up, checked, chosen by `--precision auto` and measured follows from the record.
"""

from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Literal

TablePrecision = Literal["float32", "float16", "int8", "int4"]
DensePrecision = Literal["float32", "bfloat16"]  # of the matrix products
SCALE_BIAS_BYTES = 4


@dataclass(frozen=True)
class Tolerance:
    """What a precision explains.

    Attributes:
        difference: between two probabilities of a row.
        relative_difference: of a row's probability, in parts of it; of one below 1e-6, in parts of 1e-6.
        logloss_increase: over many rows, in nats.
    """

    difference: float
    relative_difference: float
    logloss_increase: float

    def plus(self, other: "Tolerance") -> "Tolerance":
        """What both explain together."""
        return Tolerance(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class StoredPrecision:
    """A precision of tables: the layout of a row of D numbers, which is that of FBGEMM's quantised tables.

    Attributes:
        name: in `--precision`.
        bits: of a number, in which the first numbers of a byte are the low ones.
        is_quantized: whether a row is a float16 scale, a float16 bias, and then integers: a number is
            `scale * integer + bias`. Otherwise its numbers are floats.
        tolerance: what it explains; several times what trained models have shown.
    """

    name: TablePrecision
    bits: int
    is_quantized: bool
    tolerance: Tolerance

    @property
    def fbgemm_name(self) -> str:
        """Of FBGEMM's `SparseType`."""
        return f"{'INT' if self.is_quantized else 'FP'}{self.bits}"

    def row_bytes(self, dim: int) -> int:
        """The bytes of a row of `dim` numbers; `dim` is a multiple of 4."""
        return SCALE_BIAS_BYTES * self.is_quantized + dim * self.bits // 8

    def stored_rows(self, dim: int) -> tuple[str, int]:
        """How a weights file holds a table: safetensors' name of the type, and how many numbers of it a row is."""
        return ("U8", self.row_bytes(dim)) if self.is_quantized else (f"F{self.bits}", dim)


# From the most exact to the smallest.
TABLE_PRECISIONS: Mapping[TablePrecision, StoredPrecision] = {
    record.name: record
    for record in (
        # float32 differs by the order of additions alone.
        StoredPrecision("float32", 32, is_quantized=False, tolerance=Tolerance(1e-5, 1e-3, 1e-6)),
        StoredPrecision("float16", 16, is_quantized=False, tolerance=Tolerance(5e-3, 0.01, 2e-5)),
        StoredPrecision("int8", 8, is_quantized=True, tolerance=Tolerance(0.05, 0.2, 2e-4)),
        StoredPrecision("int4", 4, is_quantized=True, tolerance=Tolerance(0.4, 2.0, 5e-3)),
    )
}

DENSE_PRECISIONS: Mapping[DensePrecision, Tolerance] = {
    "float32": Tolerance(0.0, 0.0, 0.0),
    "bfloat16": Tolerance(0.05, 0.2, 2e-4),
}
