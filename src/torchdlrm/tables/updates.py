"""Steps of the tables' optimizers: one pass over the rows that a batch touches.

For each row the gradients of its ids are summed in the order of the batch, whatever the number of threads, the
optimizer steps once, and the row is written. All arithmetic is float32.

D numbers in an embedding, T tables, N ids.
"""

import numpy as np

from torchdlrm.kernels.compile import compiled, prefetch
from torchdlrm.tables.kernels import AHEAD, FLOATS_PER_LINE, Array, sum_of_equal

SGD, ADAGRAD, ROWWISE_ADAGRAD = range(3)


@compiled
def update(
    optimizer: int,
    begin: int,
    end: int,
    end_T: Array,
    rows_N: Array,
    places_N: Array,
    grad: Array,
    weights: Array,
    first_weight_T: Array,
    dim_T: Array,
    momentum1: Array,
    first_momentum1_T: Array,
    learning_rate: float,
    eps: float,
) -> None:
    """Step on the rows whose first id is one of begin to end - 1 of the sorted ids.

    Args:
        optimizer: one of those above.
        begin: first id; where the row before goes on there, that row is left to whoever has its first id.
        end: one past the last.
        end_T: where the sorted ids of each table end.
        rows_N: sorted ids of each table.
        places_N: where in the gradient that of each id begins.
        grad: of the pooled embeddings, float32 or the bits of bfloat16, flat.
        weights: of all tables, float32.
        first_weight_T: where in it each table begins.
        dim_T: D of each table.
        momentum1: sums of squares: of rows, or of weights; empty for SGD.
        first_momentum1_T: where in them each table begins.
        learning_rate: of this step.
        eps: added to the root.
    """
    table_begin = 0
    for table in range(len(end_T)):
        table_end = end_T[table]
        if table_end <= begin or table_begin >= end:
            table_begin = table_end
            continue
        dim, first_weight, first_momentum1 = dim_T[table], first_weight_T[table], first_momentum1_T[table]
        total = np.empty(dim, np.float32)
        i = max(begin, table_begin)
        if i > table_begin:
            while i < table_end and rows_N[i] == rows_N[i - 1]:
                i += 1
        stop = min(end, table_end)
        asked = i
        while i < stop:
            for j in range(max(asked, i), min(i + AHEAD, table_end)):
                ahead = first_weight + np.int64(rows_N[j]) * dim
                for k in range(0, dim, FLOATS_PER_LINE):
                    prefetch(weights, ahead + k)
                for k in range(0, dim, 64 // grad.itemsize):
                    prefetch(grad, places_N[j] + k)
                if optimizer == ADAGRAD:
                    for k in range(0, dim, FLOATS_PER_LINE):
                        prefetch(momentum1, first_momentum1 + np.int64(rows_N[j]) * dim + k)
                elif optimizer == ROWWISE_ADAGRAD:
                    prefetch(momentum1, first_momentum1 + rows_N[j])
            asked = i + AHEAD
            row = np.int64(rows_N[i])
            i = sum_of_equal(i, table_end, rows_N, places_N, grad, total)
            weight = weights[first_weight + row * dim : first_weight + (row + 1) * dim]
            _step(
                optimizer,
                weight,
                total,
                momentum1[first_momentum1:],
                row,
                np.float32(learning_rate),
                np.float32(eps),
            )
        table_begin = table_end


@compiled
def _step(
    optimizer: int, weight: Array, grad: Array, momentum1: Array, row: int, learning_rate: np.float32, eps: np.float32
) -> None:
    """Step on one row.

    Args:
        optimizer: one of those above.
        weight: of the row, float32 [D].
        grad: its gradients' sum, float32 [D].
        momentum1: of the table.
        row: its number in the table.
        learning_rate: of this step.
        eps: added to the root.
    """
    dim = len(grad)
    if optimizer == SGD:
        for k in range(dim):
            weight[k] -= learning_rate * grad[k]
    elif optimizer == ADAGRAD:
        sums = momentum1[row * dim : (row + 1) * dim]
        for k in range(dim):
            sums[k] += grad[k] * grad[k]
            weight[k] -= learning_rate * grad[k] / (np.sqrt(sums[k]) + eps)
    else:
        squares = np.float32(0)
        for k in range(dim):
            squares += grad[k] * grad[k]
        momentum1[row] += squares / np.float32(dim)
        rate = learning_rate / (np.sqrt(momentum1[row]) + eps)
        for k in range(dim):
            weight[k] -= rate * grad[k]
