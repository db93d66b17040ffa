"""Compiles what the interaction needs on CPU: dot products of all pairs, and the square of their gradients.

torch computes the whole square, picks its upper triangle in a second pass, and has slow products of such small float32
matrices.

B rows of the batch, N vectors that interact, D their dimension, P = N(N-1)/2 pairs.
"""

from typing import Any

import numpy as np

from torchdlrm.kernels.compile import as_in, compiled_loop, widened


@compiled_loop
def write_pairs(first: int, end: int, vectors_BND: Any, out: Any, vectors: Any) -> None:
    """Write, for some rows, the first vector and the dot products of all pairs (i < j).

    Args:
        first: row of the batch.
        end: one past the last.
        vectors_BND: float32 or the bits of bfloat16.
        out: of the same type, [B, D + P].
        vectors: room for those of a row, float32 [N, D].
    """
    num_vectors, dim = vectors_BND.shape[1:]
    for b in range(first, end):
        written = out[b]
        for i in range(num_vectors):
            given, vector = vectors_BND[b, i], vectors[i]
            for k in range(dim):
                vector[k] = widened(given[k])
        for k in range(dim):
            written[k] = vectors_BND[b, 0, k]
        place = dim
        for i in range(num_vectors - 1):
            one, j = vectors[i], i + 1
            while j + 4 <= num_vectors:  # four at a time: each number of the one is loaded once for them
                a, b_, c, d = vectors[j], vectors[j + 1], vectors[j + 2], vectors[j + 3]
                dot_a, dot_b, dot_c, dot_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for k in range(dim):
                    dot_a += one[k] * a[k]
                    dot_b += one[k] * b_[k]
                    dot_c += one[k] * c[k]
                    dot_d += one[k] * d[k]
                written[place], written[place + 1] = as_in(out, dot_a), as_in(out, dot_b)
                written[place + 2], written[place + 3] = as_in(out, dot_c), as_in(out, dot_d)
                place, j = place + 4, j + 4
            while j < num_vectors:
                other, dot = vectors[j], np.float32(0)
                for k in range(dim):
                    dot += one[k] * other[k]
                written[place] = as_in(out, dot)
                place, j = place + 1, j + 1


@compiled_loop
def write_square(first: int, end: int, grad_pairs_BP: Any, square_BNN: Any) -> None:
    """Write, for some rows, the pairs' gradients above and below a diagonal of zeros.

    Args:
        first: row of the batch.
        end: one past the last.
        grad_pairs_BP: float32 or the bits of bfloat16.
        square_BNN: of the same type.
    """
    num_vectors = square_BNN.shape[1]
    for b in range(first, end):
        pairs, square = grad_pairs_BP[b], square_BNN[b]
        place = 0
        for i in range(num_vectors):
            square[i, i] = 0
            for j in range(i + 1, num_vectors):
                square[i, j] = pairs[place]
                place += 1
            for j in range(i):
                square[i, j] = square[j, i]
