"""Compiles what a layer of the cross net needs on CPU besides its products: one pass over the rows each way.

As operators of torch they are two passes forward and four backward, and a backward of autograd's has more; each reads
and writes [B, I] numbers, which do not fit in the caches.

B rows of the batch, I numbers of all vectors of a row; arrays [B, I] are float32 or the bits of bfloat16.
"""

from typing import Any

import numpy as np

from torchdlrm.kernels.compile import as_in, compiled_loop, widened

# Sums over the batch are taken of so many rows, and then of these sums: in one order, however many threads there are.
ROWS_OF_A_SUM = 32


@compiled_loop
def write_layer(first: int, end: int, x0_BI: Any, x_BI: Any, product_BI: Any, bias_I: Any, out_BI: Any) -> None:
    """Write x0 * (product + bias) + x for some rows.

    Args:
        first: row of the batch.
        end: one past the last.
        x0_BI: what the net was given.
        x_BI: what the layer before gave.
        product_BI: W V x.
        bias_I: float32.
        out_BI: what the layer gives.
    """
    size = len(bias_I)
    for b in range(first, end):
        x0, x, product, out = x0_BI[b], x_BI[b], product_BI[b], out_BI[b]
        for i in range(size):
            out[i] = as_in(out, widened(x0[i]) * (widened(product[i]) + bias_I[i]) + widened(x[i]))


@compiled_loop
def write_gradients(
    first: int,
    end: int,
    grad_BI: Any,
    x0_BI: Any,
    product_BI: Any,
    bias_I: Any,
    num_added: int,
    grad_product_BI: Any,
    grad_x0_BI: Any,
    grad_bias_SI: Any,
) -> None:
    """Write, for some sums of rows, the gradients of a layer's product and bias, and add that of x0.

    Args:
        first: sum of `ROWS_OF_A_SUM` rows.
        end: one past the last.
        grad_BI: of what the layer has given.
        x0_BI: what the net was given.
        product_BI: W V x.
        bias_I: float32; of the net's first layer, whose x is x0 too, it is 1 more.
        num_added: layers whose gradient `grad_x0_BI` holds; with 0 it holds nothing yet.
        grad_product_BI: receives grad * x0.
        grad_x0_BI: grad * (product + bias) is added to it.
        grad_bias_SI: float32, a row for each sum.
    """
    size = len(bias_I)
    for s in range(first, end):
        grad_bias = grad_bias_SI[s]
        for i in range(size):
            grad_bias[i] = np.float32(0)
        for b in range(s * ROWS_OF_A_SUM, min((s + 1) * ROWS_OF_A_SUM, len(grad_BI))):
            grad, x0, product = grad_BI[b], x0_BI[b], product_BI[b]
            grad_product, grad_x0 = grad_product_BI[b], grad_x0_BI[b]
            # Loops that each write little: of more, the compiler does not see that they may take many numbers at once.
            for i in range(size):
                one = widened(grad[i]) * widened(x0[i])
                grad_bias[i] += one
                grad_product[i] = as_in(grad_product, one)
            if num_added == 0:
                for i in range(size):
                    grad_x0[i] = as_in(grad_x0, widened(grad[i]) * (widened(product[i]) + bias_I[i]))
            else:
                for i in range(size):
                    one = widened(grad[i]) * (widened(product[i]) + bias_I[i])
                    grad_x0[i] = as_in(grad_x0, one + widened(grad_x0[i]))
