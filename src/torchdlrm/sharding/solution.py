"""What a plan costs: bytes and milliseconds of every shard, rank and table, by TorchRec's estimators.

A step is taken to be what the slowest rank does one after the other: look up, exchange, the dense parts, exchange back,
update. Nothing is taken to overlap, though training overlaps the exchange of ids with the step before.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from operator import add

from torch import distributed as dist
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name

from torchdlrm.errors import DoesNotFitError
from torchdlrm.sharding.constraints import table_constraints
from torchdlrm.sharding.layout import Found, Layout, collections_of
from torchdlrm.sharding.planner import TableSharder, estimators, find_layout, meta_tables
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.tables import BYTES_PER_VALUE, state_bytes


@dataclass(frozen=True)
class Cost:
    """Bytes and milliseconds of a shard, or of many together.

    Attributes:
        weight_bytes: embeddings.
        state_bytes: of the optimizer.
        activation_bytes: ids and pooled embeddings of a step, and the cache of tables in host memory.
        host_bytes: how much of all that is host memory while the device has its own.
        forward_ms: looking up and pooling.
        backward_ms: gradients and update.
        communication_ms: exchange of embeddings and of their gradients.
    """

    weight_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    host_bytes: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    communication_ms: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*map(add, vars(self).values(), vars(other).values()))

    @property
    def total_bytes(self) -> int:
        """Memory of all kinds."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    @property
    def device_bytes(self) -> int:
        """Memory of the device itself (on CPU, the host's)."""
        return self.total_bytes - self.host_bytes

    @property
    def total_ms(self) -> float:
        """One after the other."""
        return self.forward_ms + self.backward_ms + self.communication_ms


@dataclass(frozen=True)
class Solution:
    """A plan and what it costs.

    Attributes:
        problem: what was asked.
        found: where everything goes.
        costs: of every shard, by table, in the layout's order.
    """

    problem: Problem
    found: Found
    costs: Mapping[str, list[Cost]]

    @property
    def layout(self) -> Layout:
        """Where everything goes."""
        return self.found.layout

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
        return self.ranks[self.bottleneck_rank].total_ms + self.problem.dense.total_ms

    @property
    def rows_per_s(self) -> float:
        """Training rows a second over all ranks."""
        return 1000 * self.problem.batch_size_global / self.step_ms

    @property
    def above_lower_bound(self) -> float | None:
        """By what fraction the slowest rank's tables take longer than the lower bound."""
        bound_ms = self.found.lower_bound_ms
        return self.ranks[self.bottleneck_rank].total_ms / bound_ms - 1 if bound_ms else None

    @property
    def copy_fits(self) -> bool:
        """Whether every rank's host memory holds weights and state once more, as an asynchronous checkpoint needs."""
        problem, machine = self.problem, self.problem.machine
        # On CPU the dense parts live there, too.
        reserved = problem.reserved_fraction if machine.kind == "cpu" else problem.asked_reserved_fraction
        usable_bytes = machine.host_memory_bytes * (1 - reserved)
        on_host = [rank.total_bytes if machine.kind == "cpu" else rank.host_bytes for rank in self.ranks]
        copies = [rank.weight_bytes + rank.state_bytes for rank in self.ranks]
        return all(held + copy <= usable_bytes for held, copy in zip(on_host, copies, strict=True))

    def memory_fraction(self, rank: int) -> float:
        """Fraction of a rank's memory that its tables take."""
        return self.ranks[rank].device_bytes / self.problem.machine.memory_bytes


def solve(problem: Problem, process_group: dist.ProcessGroup | None = None) -> Solution:
    """Plan, as training does.

    Args:
        problem: tables and machine, which need not be there.
        process_group: rank 0 plans for all of it; None plans in this process.

    Raises:
        PlanError: the tables do not fit, or a constraint is wrong.
    """
    search = partial(find_layout, problem)
    found = search() if process_group is None else invoke_on_rank_and_broadcast_result(process_group, 0, search)
    return Solution(problem, found, shard_costs(problem, found.layout))


def try_solve(problem: Problem) -> Solution | None:
    """Return the solution, or None where the tables do not fit.

    Raises:
        PlanError: a constraint is wrong.
    """
    table_constraints(problem)  # a wrong one is an error, not a no
    if problem.cache_fraction is None and problem.table_bytes > problem.all_usable_bytes:
        return None  # no need to search: of 1,000 tables on 64 devices that takes 20 s
    try:
        return solve(problem)
    except DoesNotFitError:
        return None


def shard_costs(problem: Problem, layout: Layout) -> dict[str, list[Cost]]:
    """Estimate the cost of every shard, by table, in the order of the layout, wherever that comes from."""
    topology, constraints = problem.machine.topology(), table_constraints(problem)
    ((path, collection),) = collections_of(meta_tables(problem))
    sharder = TableSharder()
    parameters = sharder.shardable_parameters(collection)
    sharding_options = [
        ShardingOption(
            name=table.name,
            tensor=parameters[table.name],
            module=(path, collection),
            input_lengths=[table.pooling_factor],
            batch_size=problem.batch_size_per_rank,
            sharding_type=layout[table.name].sharding_type,
            partition_by=get_partition_by_type(layout[table.name].sharding_type),
            compute_kernel=layout[table.name].compute_kernel,
            shards=[Shard(size=list(s.sizes), offset=list(s.offsets), rank=s.rank) for s in layout[table.name].shards],
            cache_params=layout[table.name].cache_params,
            is_pooled=True,
        )
        for table in problem.tables
    ]
    sharders = build_sharder_data_map({sharder_name(sharder.module_type): sharder})
    for estimator in estimators(topology, constraints, problem.optimizer):
        estimator.estimate(sharding_options, sharder_data_map=sharders)
    return {option.name: [_cost(shard, problem) for shard in option.shards] for option in sharding_options}


def _cost(shard: Shard, problem: Problem) -> Cost:
    rows, columns = shard.size
    weight_bytes = rows * columns * BYTES_PER_VALUE[problem.precision]
    state = state_bytes(rows, columns, problem.optimizer)
    storage, perf = shard.storage, shard.perf
    return Cost(
        weight_bytes=weight_bytes,
        state_bytes=state,
        activation_bytes=storage.hbm + storage.ddr - weight_bytes - state,
        host_bytes=storage.ddr if storage.hbm else 0,
        forward_ms=perf.fwd_compute + perf.prefetch_compute,
        backward_ms=perf.bwd_compute,
        communication_ms=perf.fwd_comms + perf.bwd_comms,
    )
