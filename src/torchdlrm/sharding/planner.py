"""Searches which rank holds which part of which table, by TorchRec's planner, bounded to what runs here.

`dlrm plan` and training search by the same `find_layout`, so the plan that is shown is the plan that is used.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError, ShardEstimator, ShardingOption
from torchrec.modules.embedding_configs import DataType, EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.config import TableOptimizer
from torchdlrm.errors import DoesNotFitError
from torchdlrm.sharding.constraints import KINDS, table_constraints
from torchdlrm.sharding.layout import Found, layout_of
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.search import (
    MemoryEstimator,
    OrderedEnumerator,
    PlacingPartitioner,
    ProposalCount,
    ReservedFraction,
    TimeEstimator,
    proposers,
)
from torchdlrm.units import show_bytes

# Up to this many tables times devices both orders of placing tables are tried for every proposal.
_THOROUGH_UP_TO = 4_000


class TableSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's sharder, with every kind of sharding on every device.

    TorchRec keeps those that cut a table by rows from CPUs; gloo has had the reduce-scatter that they need since.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002 - TorchRec's interface
        """Kinds that a table may have."""
        return list(KINDS)


def meta_tables(problem: Problem) -> nn.Module:
    """Make a module with the tables of a problem and no memory, to plan for a model that need not be there."""
    data_type = {"float32": DataType.FP32, "float16": DataType.FP16}[problem.precision]
    tables = [
        EmbeddingBagConfig(
            name=table.name,
            embedding_dim=table.dim,
            num_embeddings=table.rows,
            feature_names=[table.name],
            data_type=data_type,
        )
        for table in problem.tables
    ]
    collection = EmbeddingBagCollection(tables, is_weighted=problem.shape.is_weighted, device=torch.device("meta"))
    return nn.ModuleDict({"embedding_bag_collection": collection})


def find_layout(problem: Problem) -> Found:
    """Search among all kinds; on CPU cut tables by rows only where they do not fit otherwise.

    Each rank sends its part of every embedding of such a table: more bytes over gloo than of a whole one, to balance
    look-ups that take little of a step on CPU. First none is cut so, then those alone that are too large for any rank.

    Raises:
        PlanError: the tables do not fit the machine, or a constraint is wrong.
    """
    if problem.machine.kind == "cpu" and problem.machine.num_devices > 1:
        sizes = problem.table_sizes
        for whole in (set(sizes), {name for name, size in sizes.items() if size <= problem.usable_bytes}):
            with suppress(DoesNotFitError):
                return _search_kinds(problem, whole)
    return _search_kinds(problem, whole=set())


def _search_kinds(problem: Problem, whole: Collection[str]) -> Found:
    started_s = time.perf_counter()
    constraints = table_constraints(problem, whole)
    topology, num_tables, num_devices = problem.machine.topology(), len(problem.tables), problem.machine.num_devices
    enumerator = OrderedEnumerator(
        topology=topology,
        batch_size=problem.batch_size_per_rank,
        constraints=constraints,
        estimator=estimators(topology, constraints, problem.optimizer),
    )
    count = ProposalCount()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=problem.batch_size_per_rank,
        enumerator=enumerator,
        storage_reservation=ReservedFraction(percentage=problem.reserved_fraction),
        proposer=proposers(num_tables, num_devices),
        partitioner=PlacingPartitioner(
            {name: constraint.ranks for name, constraint in constraints.items() if constraint.ranks},
            thorough=num_tables * num_devices <= _THOROUGH_UP_TO,
        ),
        stats=count,
        constraints=constraints,
        debug=False,
    )
    try:
        plan = planner.plan(meta_tables(problem), [TableSharder()])
    except PlannerError as error:
        raise DoesNotFitError(_does_not_fit(problem)) from error
    assert enumerator.last_stored_search_space is not None
    return Found(
        layout_of(plan),
        lower_bound_ms=lower_bound_ms(enumerator.last_stored_search_space, num_devices),
        num_proposals=count.num_proposals,
        search_s=time.perf_counter() - started_s,
    )


def lower_bound_ms(search_space: Sequence[ShardingOption], num_devices: int) -> float:
    """Find what no plan can beat in TorchRec's estimate: all work spread evenly, and no shard divided."""
    by_table: dict[str, list[ShardingOption]] = {}
    for option in search_space:
        by_table.setdefault(option.fqn, []).append(option)
    spread = sum(min(option.total_perf for option in options) for options in by_table.values()) / num_devices
    undivided = max(
        min(max(shard.perf.total for shard in option.shards) for option in options) for options in by_table.values()
    )
    return max(spread, undivided)


def estimators(
    topology: Topology, constraints: Mapping[str, ParameterConstraints], optimizer: TableOptimizer
) -> list[ShardEstimator]:
    """What tells the milliseconds and the bytes of a shard."""
    return [TimeEstimator(topology, constraints), MemoryEstimator(topology, constraints, optimizer)]


def _does_not_fit(problem: Problem) -> str:
    sizes = problem.table_sizes
    largest = max(sizes, key=lambda name: sizes[name])
    return (
        f"the tables do not fit on {problem.machine.num_devices} rank(s) with {show_bytes(problem.usable_bytes)} each "
        f"for tables: weights and state of {problem.optimizer.name} are {show_bytes(sum(sizes.values()))}, the "
        f"largest, {largest}, {show_bytes(sizes[largest])}\n"
        "dlrm plan shows what is missing and what would make it fit: more ranks, fewer rows (`min_count` "
        "and `max_embeddings` of dlrm preprocess), a smaller model.embedding_dim, another table_optimizer.name; "
        "sharding.host_memory_bytes and sharding.hbm_bytes say what each rank may use "
        "(docs/faq.md#tables-do-not-fit)"
    )
