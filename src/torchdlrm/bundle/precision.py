"""Defines the precisions of served tables: the layout of their rows, and the FBGEMM kernels that quantise them.

| precision | a row of D numbers | bytes |
| --- | --- | ---: |
| float32 | as trained | 4 D |
| float16 | rounded | 2 D |
| int8 | float16 scale, float16 bias, then D bytes | 4 + D |
| int4 | float16 scale, float16 bias, then two numbers a byte, the first in the low half | 4 + D / 2 |

A number is `scale * integer + bias`; scale and bias are of the row.  These are the rows that FBGEMM's
`IntNBitTableBatchedEmbeddingBagsCodegen` reads, the module under TorchRec's quantised EmbeddingBagCollection, and they
are quantised by the same kernels.
"""

import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from torch import Tensor

from torchdlrm.bundle import TablePrecision

SPARSE_TYPES: dict[TablePrecision, SparseType] = {  # what FBGEMM calls them
    "float32": SparseType.FP32,
    "float16": SparseType.FP16,
    "int8": SparseType.INT8,
    "int4": SparseType.INT4,
}
TABLE_PRECISIONS = tuple(SPARSE_TYPES)
_SCALE_BIAS_BYTES = 4


def row_bytes(precision: TablePrecision, dim: int) -> int:
    """The bytes of a row of `dim` numbers; `dim` is a multiple of 4."""
    return {
        "float32": 4 * dim,
        "float16": 2 * dim,
        "int8": _SCALE_BIAS_BYTES + dim,
        "int4": _SCALE_BIAS_BYTES + dim // 2,
    }[precision]


def stored_rows(precision: TablePrecision, dim: int) -> tuple[str, int]:
    """How a weights file holds a table: safetensors' name of the type, and how many numbers of it a row is."""
    stored = {"float32": ("F32", dim), "float16": ("F16", dim)}
    return stored.get(precision, ("U8", row_bytes(precision, dim)))


def quantize_rows(rows: Tensor, precision: TablePrecision) -> Tensor:
    """Rows of a table, float32 [R, D], as they are served: uint8 [R, row_bytes]; for float32 a view."""
    assert rows.dtype == torch.float32, rows.dtype
    if precision == "float32":
        return rows.contiguous().view(torch.uint8)
    if precision == "float16":
        return rows.half().view(torch.uint8)
    # Scale and bias are rounded to float16 before the numbers are, so that their rounding is made up for: as TorchRec
    # does it, and nearer than FBGEMM's kernel for 8 bits alone. The two are written behind, and wanted in front.
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, 8 if precision == "int8" else 4)
    return torch.cat([fused[:, -_SCALE_BIAS_BYTES:], fused[:, :-_SCALE_BIAS_BYTES]], dim=1)


def dequantize_rows(quantized: Tensor, precision: TablePrecision, dim: int) -> Tensor:
    """What the lookup makes of rows, uint8 [R, row_bytes], contiguous: float32 [R, D]."""
    if precision == "float32":
        return quantized.view(torch.float32)
    if precision == "float16":
        return quantized.view(torch.float16).float()
    scale, bias = quantized[:, :_SCALE_BIAS_BYTES].contiguous().view(torch.float16).float().split(1, dim=1)
    numbers = quantized[:, _SCALE_BIAS_BYTES:]
    if precision == "int4":
        numbers = torch.stack([numbers & 15, numbers >> 4], dim=2).view(len(quantized), dim)
    return scale * numbers.float() + bias


def as_looked_up(rows: Tensor, precision: TablePrecision) -> Tensor:
    """What a lookup at that precision gives of rows of a table: float32 [R, D]."""
    return dequantize_rows(quantize_rows(rows, precision), precision, rows.shape[1])
