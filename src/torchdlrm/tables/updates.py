"""Steps of the tables' optimizers: one pass over the rows that a batch touches.

For each row the gradients of its ids are summed in the order of the batch, whatever the number of threads, the
optimizer steps once, and the row is written. All arithmetic is float32.

With g the sum of a row's gradients, w its weights, D their number, r the learning rate and t the step, counted from 1:

    sgd                   u = r g
    adagrad               s += g^2                               u = r g / (sqrt(s) + eps)
    rowwise_adagrad       s += mean(g^2), one s a row            u = r g / (sqrt(s) + eps)
    adam                  m = b1 m + (1 - b1) g                  u = r m' / (sqrt(v') + eps)
                          v = b2 v + (1 - b2) g^2                with m' = m / (1 - b1^t), v' = v / (1 - b2^t)
    partial_rowwise_adam  the same with v = b2 v + (1 - b2) mean(g^2), one v a row
    lamb                  a = m' / (sqrt(v') + eps) + decay w    u = r |w| / |a| a
    partial_rowwise_lamb  the same with one v a row

A step is w = c w - u. Without weight decay c = 1; decoupled, c = 1 - r decay; lazy, c = (1 - r decay)^n, where n is the
number of steps since the last one that looked the row up, this one counted, and 1 for the first one. LAMB has its
decay in a, and c = 1. With l2, g += decay w comes before all else.

T tables, N ids.
"""

from typing import NamedTuple

import numpy as np

from torchdlrm.kernels.compile import compiled_loop, inlined_loop, prefetch, widened
from torchdlrm.tables.kernels import AHEAD, FLOATS_PER_LINE, Array

SGD, ADAGRAD, ROWWISE_ADAGRAD, ADAM, PARTIAL_ROWWISE_ADAM, LAMB, PARTIAL_ROWWISE_LAMB = range(7)
# By the names that `torchdlrm.config.optimizers` has for them.
KINDS = {
    "sgd": SGD,
    "adagrad": ADAGRAD,
    "rowwise_adagrad": ROWWISE_ADAGRAD,
    "adam": ADAM,
    "partial_rowwise_adam": PARTIAL_ROWWISE_ADAM,
    "lamb": LAMB,
    "partial_rowwise_lamb": PARTIAL_ROWWISE_LAMB,
}


class Rule(NamedTuple):
    """What a step depends on besides the row and its gradient.

    Attributes:
        kind: of the optimizer: one of the constants above.
        rate: learning rate of this step.
        eps: added to the root.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        rest1: 1 - beta1.
        rest2: 1 - beta2.
        unbias1: 1 / (1 - beta1^t).
        unbias2: 1 / (1 - beta2^t).
        l2: weight decay that is added to the gradient.
        in_ratio: weight decay inside of LAMB's trust ratio.
        keeps: what a step leaves of a row: 1 - rate * decay, float64, of which lazy decay takes powers.
        step: t, for rows that catch up; 0 where none does.
    """

    kind: int
    rate: np.float32
    eps: np.float32
    beta1: np.float32
    beta2: np.float32
    rest1: np.float32
    rest2: np.float32
    unbias1: np.float32
    unbias2: np.float32
    l2: np.float32
    in_ratio: np.float32
    keeps: float
    step: int


class State(NamedTuple):
    """One of the values that an optimizer keeps.

    Attributes:
        values: of all tables, float32; last steps are int32.
        begins: where in them each table begins, int64 [T].
        widths: how many there are for a row of each table: D, 1 or 0; int64 [T].
    """

    values: Array
    begins: Array
    widths: Array


@compiled_loop
def update(
    begin: int,
    end: int,
    end_T: Array,
    is_frozen_T: Array,
    rows_N: Array,
    places_N: Array,
    scales_N: Array,
    grad: Array,
    weight: State,
    momentum1: State,
    momentum2: State,
    last_step: State,
    rule: Rule,
    scratch: Array,
) -> None:
    """Step on the rows whose first id is one of begin to end - 1 of the sorted ids.

    Args:
        begin: first id; where the row before goes on there, that row belongs to the part that has its first id.
        end: one past the last.
        end_T: where the sorted ids of each table end.
        is_frozen_T: whether a table stays as it is.
        rows_N: sorted ids of each table.
        places_N: where in the gradient that of each id begins.
        scales_N: by which its embedding was multiplied, float32; or none [0].
        grad: of the pooled embeddings, float32 or the bits of bfloat16, flat.
        weight: the embeddings.
        momentum1: sums of squares, or first moments.
        momentum2: second moments.
        last_step: that has looked a row up; 0 for none.
        rule: of the step.
        scratch: room for a row of any table, float32.
    """
    table_begin = 0
    for table in range(len(end_T)):
        table_end = end_T[table]
        if table_end <= begin or table_begin >= end or is_frozen_T[table]:
            table_begin = table_end
            continue
        dim = weight.widths[table]
        total = scratch[:dim]
        i = max(begin, table_begin)
        if i > table_begin:
            while i < table_end and rows_N[i] == rows_N[i - 1]:
                i += 1
        stop = min(end, table_end)
        asked = i
        while i < stop:
            for j in range(max(asked, i), min(i + AHEAD, table_end)):
                row = np.int64(rows_N[j])
                _ask_for(weight, table, row)
                _ask_for(momentum1, table, row)
                _ask_for(momentum2, table, row)
                _ask_for(last_step, table, row)
                for k in range(0, dim, 64 // grad.itemsize):
                    prefetch(grad, places_N[j] + k)
            asked = i + AHEAD
            row = np.int64(rows_N[i])
            i = _sum_of_equal(i, table_end, rows_N, places_N, scales_N, grad, total)
            weights = weight.values[_of_row(weight, table, row)]
            keeps = rule.keeps
            if rule.step:
                last = last_step.values[_of_row(last_step, table, row)]
                if last[0]:
                    keeps = rule.keeps ** (rule.step - last[0])
                last[0] = rule.step
            if rule.l2:
                for k in range(dim):
                    total[k] += rule.l2 * weights[k]
            first = momentum1.values[_of_row(momentum1, table, row)]
            second = momentum2.values[_of_row(momentum2, table, row)]
            _step(rule, np.float32(keeps), weights, total, first, second)
        table_begin = table_end


@compiled_loop
def _scaled_sum_of_equal(
    begin: int, end: int, rows: Array, places: Array, scales: Array, grad: Array, total: Array
) -> int:
    """As `_sum_of_equal` where ids have scales."""
    dim = len(total)
    for k in range(dim):
        total[k] = 0
    i = begin
    while i < end and rows[i] == rows[begin]:
        scale, more = scales[i], grad[places[i] : places[i] + dim]
        for k in range(dim):
            total[k] += scale * widened(more[k])
        i += 1
    return i


@compiled_loop
def _sum_of_equal(begin: int, end: int, rows: Array, places: Array, scales: Array, grad: Array, total: Array) -> int:
    """Sum the gradients of equal ids, times their scales where they have some, in the order of the batch.

    Args:
        begin: the first of them.
        end: of the table's ids.
        rows: sorted ids.
        places: where in the gradient that of each begins.
        scales: of each, float32; or none [0].
        grad: float32 or the bits of bfloat16, flat.
        total: receives the sum, float32 [dim].

    Returns:
        Where the next id begins.
    """
    if len(scales):
        return _scaled_sum_of_equal(begin, end, rows, places, scales, grad, total)
    dim = len(total)
    first = grad[places[begin] : places[begin] + dim]
    for k in range(dim):
        total[k] = widened(first[k])
    i = begin + 1
    while i < end and rows[i] == rows[begin]:
        more = grad[places[i] : places[i] + dim]
        for k in range(dim):
            total[k] += widened(more[k])
        i += 1
    return i


@compiled_loop
def _of_row(state: State, table: int, row: int) -> slice:
    begin = state.begins[table] + row * state.widths[table]
    return slice(begin, begin + state.widths[table])


@compiled_loop
def _ask_for(state: State, table: int, row: int) -> None:
    begin = state.begins[table] + row * state.widths[table]
    for k in range(0, state.widths[table], FLOATS_PER_LINE):
        prefetch(state.values, begin + k)


@inlined_loop
def _step(rule: Rule, keeps: np.float32, weights: Array, grad: Array, first: Array, second: Array) -> None:
    """Step on a row; `first` and `second` are its state, of which sgd has none; `grad` may be overwritten."""
    if rule.kind == ROWWISE_ADAGRAD:
        first[0] += _mean_square(grad)
        _move(weights, keeps, rule.rate / (np.sqrt(first[0]) + rule.eps), grad)
    elif rule.kind == ADAGRAD:
        for k in range(len(grad)):
            first[k] += grad[k] * grad[k]
            weights[k] = keeps * weights[k] - rule.rate * grad[k] / (np.sqrt(first[k]) + rule.eps)
    elif rule.kind == SGD:
        _move(weights, keeps, rule.rate, grad)
    else:
        _move_by_moments(rule, keeps, weights, grad, first, second)


@inlined_loop
def _move_by_moments(rule: Rule, keeps: np.float32, weights: Array, grad: Array, first: Array, second: Array) -> None:
    if rule.kind in (PARTIAL_ROWWISE_ADAM, PARTIAL_ROWWISE_LAMB):
        second[0] = rule.beta2 * second[0] + rule.rest2 * _mean_square(grad)
        scale = rule.unbias1 / (np.sqrt(rule.unbias2 * second[0]) + rule.eps)
        for k in range(len(grad)):
            first[k] = rule.beta1 * first[k] + rule.rest1 * grad[k]
            grad[k] = scale * first[k]
    else:
        for k in range(len(grad)):
            first[k] = rule.beta1 * first[k] + rule.rest1 * grad[k]
            second[k] = rule.beta2 * second[k] + rule.rest2 * grad[k] * grad[k]
            grad[k] = rule.unbias1 * first[k] / (np.sqrt(rule.unbias2 * second[k]) + rule.eps)
    rate = rule.rate
    if rule.kind in (LAMB, PARTIAL_ROWWISE_LAMB):
        for k in range(len(grad)):
            grad[k] += rule.in_ratio * weights[k]
        square = _mean_square(grad)
        # Where nothing moves the row, its length has no ratio to that; FBGEMM divides by zero there.
        rate = rate * np.sqrt(_mean_square(weights) / square) if square > 0 else np.float32(0)
    _move(weights, keeps, rate, grad)


@inlined_loop
def _mean_square(values: Array) -> np.float32:
    total = np.float32(0)
    for k in range(len(values)):
        total += values[k] * values[k]
    return total / np.float32(len(values))


@inlined_loop
def _move(weights: Array, keeps: np.float32, rate: np.float32, direction: Array) -> None:
    for k in range(len(weights)):
        weights[k] = keeps * weights[k] - rate * direction[k]
