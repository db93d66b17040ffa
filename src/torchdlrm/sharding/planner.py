"""Plans which rank holds which part of which table, by TorchRec's planner, bounded to what runs here.

`dlrm plan` and training call the same `plan_sharding`, so the plan that is shown is the plan that is used.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

from torch import distributed as dist
from torch import nn
from torchrec.distributed.collective_utils import invoke_on_rank_and_broadcast_result
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.types import PlannerError, ShardEstimator, ShardingOption
from torchrec.distributed.types import CacheParams, ShardingPlan
from torchrec.modules.embedding_configs import DataType
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.config import DENSE_OPTIMIZERS, Config, TableOptimizer
from torchdlrm.errors import DoesNotFitError
from torchdlrm.model.build import meta_collection
from torchdlrm.sharding.constraints import KINDS, TableConstraint, table_constraints
from torchdlrm.sharding.estimators import MemoryEstimator, OrderedEnumerator, ReservedFraction, TimeEstimator
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.search import PlacingPartitioner, ProposalCount, proposers
from torchdlrm.sharding.tables import Precision, Table
from torchdlrm.units import show_bytes

# Up to this many tables times devices both orders of placing tables are tried for every proposal.
_THOROUGH_UP_TO = 4_000


@dataclass(frozen=True)
class PlanOptions:
    """What a plan depends on besides tables and machine.

    Attributes:
        optimizer: of the tables; its state takes memory besides the weights.
        batch_size_global: rows per step over all ranks.
        reserved_fraction: of each rank's memory, for what is not a table.
        constraints: rules as `torchdlrm.sharding.constraints` reads them.
        cache_fraction: GPUs may keep tables in host memory and cache this fraction of their rows; None: they may not.
        dense_state_per_weight: float32 values that the optimizer of the dense parts keeps for each weight.
        precision: of the dense parts' matrix products, as `train.precision` has it.
        tf32: whether GPUs multiply float32 in TF32.
    """

    optimizer: TableOptimizer
    batch_size_global: int
    reserved_fraction: float
    constraints: tuple[str, ...] = ()
    cache_fraction: float | None = None
    dense_state_per_weight: int = 1
    precision: str = "auto"
    tf32: bool = True

    @classmethod
    def of(cls, config: Config) -> "PlanOptions":
        """The options that a config stands for."""
        return cls(
            optimizer=config.table_optimizer.record,
            batch_size_global=config.train.batch_size_global,
            reserved_fraction=config.sharding.reserved_fraction,
            constraints=config.sharding.constraints,
            cache_fraction=config.sharding.cache_fraction,
            dense_state_per_weight=DENSE_OPTIMIZERS[config.dense_optimizer.name].state_per_weight,
            precision=config.train.precision,
            tf32=config.train.tf32,
        )


class TableSharder(EmbeddingBagCollectionSharder):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's sharder, with every kind of sharding on every device.

    TorchRec keeps those that cut a table by rows from CPUs; gloo has had the reduce-scatter that they need since.
    """

    def sharding_types(self, compute_device_type: str) -> list[str]:  # noqa: ARG002 - TorchRec's interface
        """Kinds that a table may have."""
        return list(KINDS)


def meta_tables(tables: Sequence[Table], precision: Precision = "float32") -> nn.Module:
    """Make a module with these tables and no memory, to plan for a model that need not be there."""
    data_type = {"float32": DataType.FP32, "float16": DataType.FP16}[precision]
    collection = meta_collection(((table.name, table.name, table.rows, table.dim) for table in tables), data_type)
    return nn.ModuleDict({"embedding_bag_collection": collection})


def tables_of(model: nn.Module) -> list[Table]:
    """List the tables of a model, in its order; each row of the batch looks one id up in each."""
    return [
        Table(config.name, config.num_embeddings, config.embedding_dim)
        for _, collection in collections_of(model)
        for config in collection.embedding_bag_configs()
    ]


def collections_of(model: nn.Module) -> list[tuple[str, EmbeddingBagCollection]]:
    """List the table collections of a model, each with its path."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, EmbeddingBagCollection)]


@dataclass(frozen=True)
class Found:
    """What a search has found.

    Attributes:
        plan: the best.
        lower_bound_ms: no plan of these kinds has a faster slowest rank: work spread perfectly, memory no object.
        num_proposals: plans that were tried.
        search_s: wall time.
    """

    plan: ShardingPlan
    lower_bound_ms: float
    num_proposals: int
    search_s: float


def plan_sharding(
    model: nn.Module,
    *,
    machine: Machine,
    options: PlanOptions,
    process_group: dist.ProcessGroup | None,
    tables: Sequence[Table] | None = None,
) -> Found:
    """The plan that all ranks follow.

    Args:
        model: holds the tables, on the meta device.
        machine: the ranks.
        options: what else the plan depends on.
        process_group: rank 0 plans for all; None plans in this process, for a machine that need not be there.
        tables: of the model, where a row of the batch looks more than one id up in some; found in it when not given.

    Raises:
        PlanError: the tables do not fit the machine, or a constraint is wrong.
    """
    search = partial(_search, model, tables_of(model) if tables is None else tables, machine, options)
    return search() if process_group is None else invoke_on_rank_and_broadcast_result(process_group, 0, search)


def _search(model: nn.Module, tables: Sequence[Table], machine: Machine, options: PlanOptions) -> Found:
    """Search among all kinds; on CPU cut tables by rows only where they do not fit otherwise.

    Each rank sends its part of every embedding of such a table: more bytes over gloo than of a whole one, to balance
    look-ups that take little of a step on CPU. First none is cut so, then those alone that are too large for any rank.
    """
    names = {table.name for table in tables}
    if machine.kind == "cpu" and machine.num_devices > 1:
        usable_bytes = machine.memory_bytes * (1 - options.reserved_fraction)
        large = {table.name for table in tables if table.size_bytes("float32", options.optimizer) > usable_bytes}
        for whole in (names, names - large):
            with suppress(DoesNotFitError):
                return _search_kinds(model, tables, machine, options, whole)
    return _search_kinds(model, tables, machine, options, whole=set())


def _search_kinds(
    model: nn.Module, tables: Sequence[Table], machine: Machine, options: PlanOptions, whole: Collection[str]
) -> Found:
    started_s = time.perf_counter()
    allowed, constraints = planner_constraints(tables, machine, options, whole)
    topology = machine.topology()
    batch_size_per_rank = -(-options.batch_size_global // machine.num_devices)
    enumerator = OrderedEnumerator(
        topology=topology,
        batch_size=batch_size_per_rank,
        constraints=constraints,
        estimator=estimators(topology, constraints, options.optimizer),
    )
    count = ProposalCount()
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size_per_rank,
        enumerator=enumerator,
        storage_reservation=ReservedFraction(percentage=options.reserved_fraction),
        proposer=proposers(len(tables), machine.num_devices),
        partitioner=PlacingPartitioner(
            {name: constraint.ranks for name, constraint in allowed.items() if constraint.ranks},
            thorough=len(tables) * machine.num_devices <= _THOROUGH_UP_TO,
        ),
        stats=count,
        constraints=constraints,
        debug=False,
    )
    try:
        plan = planner.plan(model, [TableSharder()])
    except PlannerError as error:
        raise DoesNotFitError(_does_not_fit(tables, machine, options)) from error
    assert enumerator.last_stored_search_space is not None
    return Found(
        plan=plan,
        lower_bound_ms=lower_bound_ms(enumerator.last_stored_search_space, machine.num_devices),
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


def planner_constraints(
    tables: Sequence[Table], machine: Machine, options: PlanOptions, whole: Collection[str] = ()
) -> tuple[dict[str, TableConstraint], dict[str, ParameterConstraints]]:
    """What the planner may do with each table, in our words and in TorchRec's.

    Args:
        tables: of the model.
        machine: the ranks.
        options: whose constraints are read.
        whole: tables that are cut by rows only where a constraint leaves nothing else.

    Raises:
        PlanError: a constraint is wrong.
    """
    allowed = table_constraints(tables, options.constraints, machine, options.optimizer, whole=whole)
    kernels = [EmbeddingComputeKernel.FUSED.value]
    cache = None
    if machine.kind == "cuda" and options.cache_fraction is not None:
        kernels.append(EmbeddingComputeKernel.FUSED_UVM_CACHING.value)
        cache = CacheParams(load_factor=options.cache_fraction)
    return allowed, {
        table.name: ParameterConstraints(
            sharding_types=list(allowed[table.name].kinds),
            compute_kernels=kernels,
            min_partition=allowed[table.name].min_shard_columns,
            pooling_factors=[table.pooling_factor],
            cache_params=cache,
        )
        for table in tables
    }


def _does_not_fit(tables: Sequence[Table], machine: Machine, options: PlanOptions) -> str:
    sizes = {table.name: table.size_bytes("float32", options.optimizer) for table in tables}
    largest = max(sizes, key=lambda name: sizes[name])
    usable = int(machine.memory_bytes * (1 - options.reserved_fraction))
    return (
        f"the tables do not fit on {machine.num_devices} rank(s) with {show_bytes(usable)} each for tables: weights "
        f"and state of {options.optimizer.name} are {show_bytes(sum(sizes.values()))}, the largest, {largest}, "
        f"{show_bytes(sizes[largest])}\n"
        "dlrm plan shows what is missing and what would make it fit: more ranks, fewer rows (`min_count` "
        "and `max_embeddings` of dlrm preprocess), a smaller model.embedding_dim, another table_optimizer.name; "
        "sharding.host_memory_bytes and sharding.hbm_bytes say what each rank may use"
    )
