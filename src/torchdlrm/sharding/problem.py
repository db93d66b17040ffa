"""Defines a problem for the planner (tables and machine) and its solution (where everything goes, what it costs)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from torchdlrm.config import ModelConfig
from torchdlrm.errors import DoesNotFitError
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.model.architecture import Architecture, ModelShape
from torchdlrm.sharding.estimate import Cost, DensePart, dense_part, shard_costs
from torchdlrm.sharding.layout import PlacedTable, layout_of
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.planner import Found, PlanOptions, meta_tables, plan_sharding, planner_constraints
from torchdlrm.sharding.tables import Precision, Table, features_of

# Where the dense parts need all memory, so little is left for tables that none fit.
_MAX_RESERVED_FRACTION = 0.9999


@dataclass(frozen=True)
class Problem:
    """What is to be planned.

    Attributes:
        tables: of the model.
        machine: the ranks.
        options: optimizer, batch, reserve, constraints.
        precision: of the tables' weights.
        model: sizes of the dense parts.
        num_dense: number of dense features.
        architecture: of the model; None: as `model` says.
        multi_valued: names of tables in which a row may look several ids up.
        measured: what the dense parts take where that was measured; by their arithmetic when None.
        num_embeddings: ids of each sparse feature by name; empty: as the tables say.
    """

    tables: tuple[Table, ...]
    machine: Machine
    options: PlanOptions
    precision: Precision = "float32"
    model: ModelConfig = field(default_factory=ModelConfig)
    num_dense: int = NUM_CRITEO_DENSE
    architecture: Architecture | None = None
    multi_valued: frozenset[str] = frozenset()
    measured: DensePart | None = None
    num_embeddings: tuple[tuple[str, int], ...] = ()

    @property
    def shape(self) -> ModelShape:
        """Of the model with one sparse feature a table, but for those that have two."""
        features = self.num_embeddings or tuple(features_of(self.tables, self.model).items())
        return ModelShape(self.model, self.num_dense, len(features), self.architecture, num_embeddings=features)

    @property
    def dense(self) -> DensePart:
        """What every rank does and holds besides its tables."""
        options, measured = self.options, self.measured
        found = dense_part(
            self.shape,
            self.machine,
            options.batch_size_global,
            options.dense_state_per_weight,
            precision=options.precision,
            tf32=options.tf32,
        )
        if measured is None:
            return found
        return replace(found, compute_ms=measured.compute_ms, all_reduce_ms=measured.all_reduce_ms)

    @property
    def searched_options(self) -> PlanOptions:
        """The options, with as much memory reserved as the dense parts need, where that is more than was asked for."""
        needed = min(_MAX_RESERVED_FRACTION, self.dense.total_bytes / self.machine.memory_bytes)
        return replace(self.options, reserved_fraction=max(needed, self.options.reserved_fraction))

    @property
    def usable_bytes(self) -> int:
        """Memory of each rank for tables, where they live by default."""
        return max(1, int(self.machine.memory_bytes * (1 - self.searched_options.reserved_fraction)))

    @property
    def table_bytes(self) -> int:
        """Weights and optimizer state of all tables."""
        return sum(table.size_bytes(self.precision, self.options.optimizer) for table in self.tables)

    def with_options(self, **changes: Any) -> "Problem":
        """Return the same problem with some options changed."""
        return replace(self, options=replace(self.options, **changes))


@dataclass(frozen=True)
class Solution:
    """A plan and what it costs.

    Attributes:
        problem: what was asked.
        layout: where everything goes.
        costs: of every shard, by table, in the layout's order.
        dense: what every rank does besides its tables.
        lower_bound_ms: no plan has a slowest rank whose tables take less; None for a plan that was given.
        num_proposals: plans that were tried.
        search_s: wall time of the search.
    """

    problem: Problem
    layout: Mapping[str, PlacedTable]
    costs: Mapping[str, list[Cost]]
    dense: DensePart
    lower_bound_ms: float | None
    num_proposals: int
    search_s: float

    @cached_property
    def ranks(self) -> list[Cost]:
        """The cost of each rank's shards together."""
        ranks = [Cost()] * self.problem.machine.num_devices
        for name, placed in self.layout.items():
            for shard, cost in zip(placed.shards, self.costs[name], strict=True):
                ranks[shard.rank] += cost
        return ranks

    @property
    def bottleneck_rank(self) -> int:
        """The rank whose tables take longest."""
        times = [rank.total_ms for rank in self.ranks]
        return times.index(max(times))

    @property
    def fullest_rank(self) -> int:
        """The rank with the least memory left."""
        used = [rank.device_bytes for rank in self.ranks]
        return used.index(max(used))

    @property
    def total(self) -> Cost:
        """Everything on all ranks; its milliseconds are device time, not wall time."""
        return sum(self.ranks, Cost())

    @property
    def step_ms(self) -> float:
        """Wall time of a step: the slowest rank's tables, then the dense parts."""
        return self.ranks[self.bottleneck_rank].total_ms + self.dense.total_ms

    @property
    def rows_per_s(self) -> float:
        """Training rows a second over all ranks."""
        return 1000 * self.problem.options.batch_size_global / self.step_ms

    @property
    def above_lower_bound(self) -> float | None:
        """By what fraction the slowest rank's tables take longer than the lower bound."""
        if not self.lower_bound_ms:
            return None
        return self.ranks[self.bottleneck_rank].total_ms / self.lower_bound_ms - 1

    @property
    def copy_fits(self) -> bool:
        """Whether every rank's host memory holds weights and state once more, as an asynchronous checkpoint needs."""
        problem, machine = self.problem, self.problem.machine
        # On CPU the dense parts live there, too.
        options = problem.searched_options if machine.kind == "cpu" else problem.options
        usable_bytes = machine.host_memory_bytes * (1 - options.reserved_fraction)
        on_host = [rank.total_bytes if machine.kind == "cpu" else rank.host_bytes for rank in self.ranks]
        copies = [rank.weight_bytes + rank.state_bytes for rank in self.ranks]
        return all(held + copy <= usable_bytes for held, copy in zip(on_host, copies, strict=True))

    def memory_fraction(self, rank: int) -> float:
        """Fraction of a rank's memory that its tables take."""
        return self.ranks[rank].device_bytes / self.problem.machine.memory_bytes


def solve(problem: Problem) -> Solution:
    """Plan, with the same function that training plans with.

    Raises:
        PlanError: the tables do not fit, or a constraint is wrong.
    """
    found = plan_sharding(
        meta_tables(problem.tables, problem.precision),
        machine=problem.machine,
        options=problem.searched_options,
        process_group=None,
        tables=problem.tables,
    )
    return solution_of(problem, layout_of(found.plan), found)


def solution_of(problem: Problem, layout: Mapping[str, PlacedTable], found: Found | None) -> Solution:
    """Find what a layout costs, wherever it comes from.

    Args:
        problem: that it answers.
        layout: of all tables.
        found: how the planner found it; None for a plan that was given.
    """
    return Solution(
        problem,
        layout,
        shard_costs(layout, problem.tables, problem.machine, problem.options, problem.precision),
        problem.dense,
        found.lower_bound_ms if found else None,
        found.num_proposals if found else 0,
        found.search_s if found else 0.0,
    )


def try_solve(problem: Problem) -> Solution | None:
    """Return the solution, or None where the tables do not fit.

    Raises:
        PlanError: a constraint is wrong.
    """
    planner_constraints(problem.tables, problem.machine, problem.options)  # a wrong one is an error, not a no
    on_devices = problem.options.cache_fraction is None
    if on_devices and problem.table_bytes > problem.usable_bytes * problem.machine.num_devices:
        return None  # no need to search: of 1,000 tables on 64 devices that takes 20 s
    try:
        return solve(problem)
    except DoesNotFitError:
        return None
