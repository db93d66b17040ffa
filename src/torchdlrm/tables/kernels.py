"""Looks up and pools embeddings, and sorts the ids of a batch by row.

A cell holds the ids of one feature in one row of the batch. Cells are numbered feature by feature; features of one
table follow each other, so the ids of a table do too.

B rows of the batch, T tables, F features, F * B cells, N ids.
"""

from typing import Any

import numpy as np

from torchdlrm.kernels.compile import as_in, compiled, compiled_loop, prefetch

# How many ids ahead their rows are asked for: with less the processor waits for memory (8: 10 % slower, 4: 40 %).
AHEAD = 16
FLOATS_PER_LINE = 16  # of a cache line of 64 bytes

Array = np.ndarray[Any, Any]


@compiled_loop
def look_up(
    first_cell: int,
    end_cell: int,
    num_rows: int,
    weights: Array,
    first_weight_F: Array,
    dim_F: Array,
    column_F: Array,
    indices: Array,
    scales: Array,
    offsets: Array,
    out: Array,
    stride: int,
    scratch: Array,
) -> None:
    """Write the sums of the embeddings of some cells, which ids may scale; a cell without ids gets zeros.

    Args:
        first_cell: of those to do.
        end_cell: one past the last.
        num_rows: B.
        weights: of all tables, float32.
        first_weight_F: where in it the table of each feature begins.
        dim_F: numbers in an embedding.
        column_F: of the first number of each feature's embedding in a row of the output.
        indices: the ids, int64 [N].
        scales: by which their embeddings are multiplied, float32 [N]; or none [0].
        offsets: where in them each cell begins, and N: int64 [F * B + 1].
        out: float32 or the bits of bfloat16, flat.
        stride: from one row of the output to the next.
        scratch: room for a row of any table, float32.
    """
    end = offsets[end_cell]
    is_scaled = len(scales) > 0
    for feature in range(first_cell // num_rows, (end_cell - 1) // num_rows + 1):
        first_weight, dim, column = first_weight_F[feature], dim_F[feature], column_F[feature]
        feature_end = min(end, offsets[(feature + 1) * num_rows])
        total = scratch[:dim]
        for cell in range(max(first_cell, feature * num_rows), min(end_cell, (feature + 1) * num_rows)):
            begin, stop = offsets[cell], offsets[cell + 1]
            for i in range(begin + AHEAD, min(stop + AHEAD, feature_end)):
                ahead = first_weight + indices[i] * dim
                for k in range(0, dim, FLOATS_PER_LINE):
                    prefetch(weights, ahead + k)
            place = (cell - feature * num_rows) * stride + column
            pooled = out[place : place + dim]
            if stop == begin + 1 and not is_scaled:
                first = first_weight + indices[begin] * dim
                row = weights[first : first + dim]
                for k in range(dim):
                    pooled[k] = as_in(out, row[k])
                continue
            for k in range(dim):
                total[k] = 0
            for i in range(begin, stop):
                first = first_weight + indices[i] * dim
                _add(weights[first : first + dim], total, scales, i)
            for k in range(dim):
                pooled[k] = as_in(out, total[k])


@compiled_loop
def _add(row: Array, total: Array, scales: Array, i: int) -> None:
    """Add a row, times the scale of id `i` where ids have some."""
    if len(scales):
        for k in range(len(total)):
            total[k] += scales[i] * row[k]
    else:
        for k in range(len(total)):
            total[k] += row[k]


@compiled
def sort_ids(
    first_table: int,
    end_table: int,
    num_rows: int,
    num_embeddings_T: Array,
    first_feature_T: Array,
    column_F: Array,
    stride: int,
    indices: Array,
    scales: Array,
    offsets: Array,
    rows_N: Array,
    places_N: Array,
    scales_N: Array,
) -> None:
    """Sort the ids of some tables, those of each table by row, and equal ones as they stand in the batch.

    Args:
        first_table: of those to do.
        end_table: one past the last.
        num_rows: B.
        num_embeddings_T: rows of each table.
        first_feature_T: of each table, and F: [T + 1].
        column_F: of the first number of each feature's embedding in a row of the gradient.
        stride: from one row of the gradient to the next.
        indices: the ids, int64 [N].
        scales: of their embeddings, float32 [N]; or none [0].
        offsets: where in them each cell begins, and N: int64 [F * B + 1].
        rows_N: receives the sorted ids, int32.
        places_N: receives where in the gradient that of each begins, int64.
        scales_N: receives the scale of each, where there are some.
    """
    is_scaled = len(scales) > 0
    for table in range(first_table, end_table):
        first_cell, end_cell = first_feature_T[table] * num_rows, first_feature_T[table + 1] * num_rows
        begin, end = offsets[first_cell], offsets[end_cell]
        rows, places = rows_N[begin:end], places_N[begin:end]
        for feature in range(first_feature_T[table], first_feature_T[table + 1]):
            place = column_F[feature]
            for cell in range(feature * num_rows, (feature + 1) * num_rows):
                for i in range(offsets[cell], offsets[cell + 1]):
                    rows[i - begin] = indices[i]
                    places[i - begin] = place
                place += stride
        if is_scaled:
            # Sorted by their numbers: these say afterwards where the gradient and the scale of each are.
            numbers, unsorted = np.arange(end - begin), places.copy()
            _sort(rows, numbers, num_embeddings_T[table])
            for i in range(end - begin):
                places[i], scales_N[begin + i] = unsorted[numbers[i]], scales[begin + numbers[i]]
        else:
            _sort(rows, places, num_embeddings_T[table])


@compiled
def _sort(keys: Array, values: Array, num_keys: int) -> None:
    """Sort both by the keys, which lie in [0, num_keys), and keep the order of equal ones: a radix sort."""
    num_items = len(keys)
    bits = 6 if num_items < 256 else 9 if num_items < 16_384 else 11
    mask = (1 << bits) - 1
    begins = np.empty((1 << bits) + 1, np.int32)
    other_keys, other_values = np.empty_like(keys), np.empty_like(values)
    from_keys, from_values, to_keys, to_values = keys, values, other_keys, other_values
    shift = 0
    while (num_keys - 1) >> shift:
        begins[:] = 0
        for i in range(num_items):
            begins[((from_keys[i] >> shift) & mask) + 1] += 1
        for digit in range(mask):
            begins[digit + 1] += begins[digit]
        for i in range(num_items):
            digit = (from_keys[i] >> shift) & mask
            to_keys[begins[digit]], to_values[begins[digit]] = from_keys[i], from_values[i]
            begins[digit] += 1
        from_keys, from_values, to_keys, to_values = to_keys, to_values, from_keys, from_values
        shift += bits
    if (shift // bits) % 2:
        keys[:], values[:] = from_keys, from_values
