"""Writes rows of tables in the precision in which they are served, and reads them, by the kernels of FBGEMM.

The layout (`torchdlrm.bundle.precision`) is what FBGEMM's `IntNBitTableBatchedEmbeddingBagsCodegen` reads, the module
under TorchRec's quantised EmbeddingBagCollection, and rows are quantised by the same kernels.
"""

import fbgemm_gpu  # noqa: F401 - registers the kernel
import torch
from torch import Tensor

from torchdlrm.bundle.precision import SCALE_BIAS_BYTES, TABLE_PRECISIONS, TablePrecision

_FLOATS = {32: torch.float32, 16: torch.float16}


def quantize_rows(rows: Tensor, precision: TablePrecision) -> Tensor:
    """Rows of a table, float32 [R, D], as they are served: uint8 [R, row_bytes]; for float32 a view."""
    assert rows.dtype == torch.float32, rows.dtype
    record = TABLE_PRECISIONS[precision]
    if not record.is_quantized:
        return rows.contiguous().to(_FLOATS[record.bits]).view(torch.uint8)
    # Scale and bias are rounded to float16 before the numbers are, so that their rounding is made up for: as TorchRec
    # does it, and nearer than FBGEMM's kernel for 8 bits alone. The two are written behind, and wanted in front.
    fused = torch.ops.fbgemm.FloatToFusedNBitRowwiseQuantizedSBHalf(rows, record.bits)
    return torch.cat([fused[:, -SCALE_BIAS_BYTES:], fused[:, :-SCALE_BIAS_BYTES]], dim=1)


def dequantize_rows(quantized: Tensor, precision: TablePrecision, dim: int) -> Tensor:
    """What the lookup makes of rows, uint8 [R, row_bytes], contiguous: float32 [R, D]."""
    record = TABLE_PRECISIONS[precision]
    if not record.is_quantized:
        return quantized.view(_FLOATS[record.bits]).float()
    scale, bias = quantized[:, :SCALE_BIAS_BYTES].contiguous().view(torch.float16).float().split(1, dim=1)
    numbers = quantized[:, SCALE_BIAS_BYTES:]
    if record.bits < 8:
        shifts = range(0, 8, record.bits)
        parts = [numbers >> shift & (1 << record.bits) - 1 for shift in shifts]
        numbers = torch.stack(parts, dim=2).view(len(quantized), dim)
    return scale * numbers.float() + bias


def as_looked_up(rows: Tensor, precision: TablePrecision) -> Tensor:
    """What a lookup at that precision gives of rows of a table: float32 [R, D]."""
    return dequantize_rows(quantize_rows(rows, precision), precision, rows.shape[1])
