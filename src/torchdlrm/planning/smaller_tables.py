"""Makes the tables of a problem smaller: by smaller dimensions, or two tables of quotients and remainders for one.

Dimensions are those of arXiv:1909.11810: d = lambda * rows^-alpha, with the largest lambda whose tables take no more
than a number of bytes, rounded to the nearest of 4, 8, 16, ..., D (in ratio, as upstream's powers of two). Rows of
frequent values keep many columns, while the many rows that are hardly ever seen, and could not learn them, share few.
"""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise

from torchdlrm.config import FeatureConfig
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import Table, feature_of, with_features

ALPHA = 0.3
# Smaller tables stay at D, as upstream's do: they weigh nothing.
_SMALL_ROWS = 200


def with_smaller_dims(problem: Problem, max_bytes: float, alpha: float = ALPHA) -> Problem | None:
    """The problem with as large dimensions as `max_bytes` allow; None where not even tables of dimension 4 fit.

    Args:
        problem: whose tables of dimension D and more than 200 rows may become smaller.
        max_bytes: of weights and optimizer state of all tables, and of what projects the smaller ones to D.
        alpha: how fast dimensions fall with rows; 0 makes all alike.
    """
    dim = problem.shape.config.embedding_dim
    levels = [4]
    while levels[-1] * 2 < dim:
        levels.append(levels[-1] * 2)
    levels = [level for level in levels if level < dim] + [dim]
    free = [table for table in _whole_tables(problem) if table.rows > _SMALL_ROWS]
    smallest = {table.name: replace(table, dim=levels[0]) for table in free}
    used = sum(_size_bytes(problem, smallest.get(table.name, table)) for table in problem.tables)
    if used > max_bytes:
        return None
    # At which lambda each table is rounded up; of tables with equal rows the first come first.
    steps = sorted(
        ((low * high) ** 0.5 * table.rows**alpha, place, low, high)
        for place, table in enumerate(free)
        for low, high in pairwise(levels)
    )
    dims = dict.fromkeys(smallest, levels[0])
    for _, place, low, high in steps:
        table = free[place]
        used += _size_bytes(problem, replace(table, dim=high)) - _size_bytes(problem, replace(table, dim=low))
        if used > max_bytes:
            break
        dims[table.name] = high
    features = {
        feature_of(table): FeatureConfig(embedding_dim=dims[table.name]) for table in free if dims[table.name] < dim
    }
    return _with_features(problem, features)


def with_quotients(problem: Problem, max_bytes: float, num_collisions: int) -> Problem | None:
    """The problem with two tables for each of the largest ones, for as few as bring all tables to `max_bytes`.

    None where that is not enough. Rows are multiplied where a row of the batch looks one id up, else added.
    """
    missing, features = problem.table_bytes - max_bytes, {}
    single_rows = {key.name for key in problem.shape.tables if key.position is not None}
    for table in sorted(_whole_tables(problem), key=lambda table: -table.rows):
        if missing <= 0:
            break
        if table.name in single_rows:  # which two tables do not give
            continue
        is_single = table.pooling_factor <= 1 and table.name not in problem.multi_valued
        feature = FeatureConfig(quotient_remainder="mult" if is_single else "add", num_collisions=num_collisions)
        whole = replace(problem, tables=(table,))
        parts = _with_features(whole, {feature_of(table): feature})
        if parts.table_bytes >= whole.table_bytes:
            break
        missing += parts.table_bytes - whole.table_bytes
        features[feature_of(table)] = feature
    return None if missing > 0 else _with_features(problem, features)


def changed_features(before: Problem, after: Problem) -> Mapping[str, FeatureConfig]:
    """The features whose tables have become smaller."""
    known = before.shape.config.features
    return {name: feature for name, feature in after.shape.config.features.items() if known.get(name) != feature}


def _whole_tables(problem: Problem) -> list[Table]:
    """Those of dimension D that are the only ones of their features."""
    model = problem.shape.config
    pairs = {name for name, feature in model.features.items() if feature.quotient_remainder is not None}
    parts = {f"{name}_{part}" for name in pairs for part in "qr"} | {
        feature_of(t) for t in problem.tables if "@" in t.name
    }
    return [table for table in problem.tables if table.dim == model.embedding_dim and feature_of(table) not in parts]


def _size_bytes(problem: Problem, table: Table) -> int:
    dim = problem.shape.config.embedding_dim
    projection_bytes = 4 * table.dim * dim if table.dim < dim else 0
    return table.size_bytes(problem.precision, problem.optimizer) + projection_bytes


def _with_features(problem: Problem, features: dict[str, FeatureConfig]) -> Problem:
    old = problem.shape.config
    only = old.with_features(features)
    merged = {
        name: old.features.get(name, FeatureConfig()).model_copy(update=feature.model_dump(exclude_unset=True))
        for name, feature in features.items()  # what becomes of its values stays
    }
    shape = replace(problem.shape, config=old.with_features({**old.features, **merged}))
    return replace(problem, shape=shape, tables=tuple(with_features(problem.tables, only)))
