"""Restricts the kinds of sharding and the ranks of a table, by what the machine allows and what the user asks for.

A rule is written `TABLE=KIND,KIND@RANK,RANK`: `cat_3=row_wise`, `cat_*=table_wise,row_wise`, `cat_0@2` (wholly on rank
2), `cat_0@0,1` (its columns halved over ranks 0 and 1). TABLE is a feature, a table or a pattern with `*`.
"""

import fnmatch
from collections.abc import Collection
from dataclasses import dataclass

from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints
from torchrec.distributed.types import CacheParams

from torchdlrm.errors import PlanError
from torchdlrm.features.tables import table_name
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import Table

TABLE_WISE, COLUMN_WISE, ROW_WISE = "table_wise", "column_wise", "row_wise"
TABLE_ROW_WISE, GRID_SHARD = "table_row_wise", "grid_shard"
# A data-parallel table would be trained by the dense optimizer and not by the tables': it would make the weights depend
# on the plan: docs/decisions/no-table-is-data-parallel.md.
KINDS = (TABLE_WISE, COLUMN_WISE, ROW_WISE, TABLE_ROW_WISE, GRID_SHARD)
_CUT_BY_ROWS = {ROW_WISE, TABLE_ROW_WISE, GRID_SHARD}
# TorchRec never cuts a column shard below this by itself: narrower rows waste a GPU's memory transactions.
_MIN_SHARD_COLUMNS = 128


@dataclass(frozen=True)
class Rule:
    """What the user asks of some tables.

    Attributes:
        pattern: names of features or tables; `*` stands for anything.
        kinds: allowed kinds; empty means all.
        ranks: where the shards have to be; empty means anywhere.
        text: as it was written.
    """

    pattern: str
    kinds: tuple[str, ...]
    ranks: tuple[int, ...]
    text: str

    def matches(self, table: str) -> bool:
        """Return whether the rule is about this table."""
        return fnmatch.fnmatchcase(table, self.pattern) or fnmatch.fnmatchcase(table, table_name(self.pattern))


@dataclass(eq=False)
class TableConstraint(ParameterConstraints):  # type: ignore[misc]  # TorchRec is untyped
    """What the planner may do with one table, in TorchRec's words.

    Attributes:
        ranks: where its shards have to be; empty means anywhere.
    """

    ranks: tuple[int, ...] = ()


def parse_rule(text: str) -> Rule:
    """Read one rule.

    Raises:
        PlanError: it is not written as rules are.
    """
    head, at, ranks_text = text.partition("@")
    pattern, _, kinds_text = head.partition("=")
    kinds = tuple(kind.strip() for kind in kinds_text.split(",") if kind.strip())
    wrong = [kind for kind in kinds if kind not in KINDS]
    if wrong:
        msg = f"sharding.constraints: {text!r}: {wrong[0]!r} is not a kind of sharding; kinds: {', '.join(KINDS)}"
        raise PlanError(msg)
    try:
        ranks = tuple(int(rank) for rank in ranks_text.split(",")) if at else ()
    except ValueError:
        ranks = (-1,)
    if not pattern.strip() or not (kinds or ranks) or any(rank < 0 for rank in ranks):
        msg = f"sharding.constraints: {text!r}: expected TABLE=KIND,KIND@RANK,RANK, such as cat_3=row_wise or cat_0@2"
        raise PlanError(msg)
    return Rule(pattern.strip(), kinds, ranks, text)


def table_constraints(problem: Problem, whole: Collection[str] = ()) -> dict[str, TableConstraint]:
    """Find what the planner may do with each table; the last rule that matches a table counts.

    Kinds that come to the same as a simpler one are left out, so that the search is short and its result does not
    hang on how ties are broken: column-wise where a table has too few columns to be cut, table-row-wise and grid on
    one host. Unless asked for, so are column-wise and grid with row-wise Adagrad: it keeps one value of state for
    each row of a shard, so what a table learns would depend on where it was cut.

    Args:
        problem: whose tables and rules are read.
        whole: tables that are cut by rows only where a rule leaves nothing else.

    Raises:
        PlanError: a rule is wrong, matches no table, or names a rank that is not there.
    """
    tables, machine = problem.tables, problem.machine
    rules = [parse_rule(text) for text in problem.constraints]
    for rule in rules:
        if not any(rule.matches(table.name) for table in tables):
            some = ", ".join(table.name for table in tables[:3])
            raise PlanError(f"sharding.constraints: {rule.text!r}: no table is called so; tables are {some}, ...")
        if any(rank >= machine.num_devices for rank in rule.ranks):
            last = machine.num_devices - 1
            raise PlanError(f"sharding.constraints: {rule.text!r}: rank {max(rule.ranks)} is not among 0 to {last}")
    kernels, cache = [EmbeddingComputeKernel.FUSED.value], None
    if machine.kind == "cuda" and problem.cache_fraction is not None:
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
        cache = CacheParams(load_factor=problem.cache_fraction)
    found: dict[str, TableConstraint] = {}
    for table in tables:
        matching = [rule for rule in rules if rule.matches(table.name)]
        rule = matching[-1] if matching else Rule("*", (), (), "")
        kinds, min_columns = (
            _pinned(table, rule) if rule.ranks else _free(table, rule, problem, is_whole=table.name in whole)
        )
        found[table.name] = TableConstraint(
            sharding_types=kinds,
            compute_kernels=kernels,
            min_partition=min_columns,
            pooling_factors=[table.pooling_factor],
            cache_params=cache,
            ranks=rule.ranks,
        )
    return found


def _pinned(table: Table, rule: Rule) -> tuple[list[str], int]:
    """The kind of a table whose shards have a rank each, and the columns of a shard."""
    wanted = TABLE_WISE if len(rule.ranks) == 1 else COLUMN_WISE
    if rule.kinds and wanted not in rule.kinds:
        raise PlanError(
            f"sharding.constraints: {rule.text!r}: on {len(rule.ranks)} given rank(s) a table can only be {wanted}; "
            "leave out the kinds, or the ranks"
        )
    if table.dim % (4 * len(rule.ranks)):
        raise PlanError(
            f"sharding.constraints: {rule.text!r}: the {table.dim} columns of {table.name} cannot be cut into "
            f"{len(rule.ranks)} shards of a multiple of 4"
        )
    return [wanted], table.dim // len(rule.ranks)


def _free(table: Table, rule: Rule, problem: Problem, *, is_whole: bool) -> tuple[list[str], int | None]:
    """The kinds of a table that may be anywhere, and the columns of a shard at least; None leaves them to TorchRec."""
    asked, machine = set(rule.kinds), problem.machine
    kinds = [name for name in KINDS if not asked or name in asked]
    if is_whole:
        kinds = [name for name in kinds if name not in _CUT_BY_ROWS] or kinds
    # Asked for, columns are halved until TorchRec's own floor would be crossed, at least once; otherwise it decides.
    min_columns = (
        max(4, min(_MIN_SHARD_COLUMNS, table.dim // 2 // 4 * 4)) if asked & {COLUMN_WISE, GRID_SHARD} else None
    )
    cut = _is_cut(table.dim, min_columns or _MIN_SHARD_COLUMNS)
    has_state_per_row = problem.optimizer.state_per_row > 0
    pointless = {
        COLUMN_WISE: machine.num_devices == 1 or not cut or (has_state_per_row and not asked),
        GRID_SHARD: machine.num_hosts == 1 or not cut or (has_state_per_row and not asked),
        TABLE_ROW_WISE: machine.num_hosts == 1,
        ROW_WISE: machine.num_devices == 1,
    }
    useful = [name for name in kinds if not pointless.get(name, False)]
    return useful or kinds[:1], min_columns


def _is_cut(dim: int, min_columns: int) -> bool:
    """Whether TorchRec finds a width of at least `min_columns` that divides `dim` and is a multiple of 4."""
    return any(dim % width == 0 for width in range(-(-min_columns // 4) * 4, dim, 4))
