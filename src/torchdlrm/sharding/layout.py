"""Represents a plan as data: which rank holds which part of which table; from TorchRec, and to it."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn
from torchrec.distributed.sharding_plan import placement
from torchrec.distributed.types import (
    CacheParams,
    EmbeddingModuleShardingPlan,
    EnumerableShardingSpec,
    ParameterSharding,
    ShardingPlan,
    ShardMetadata,
)
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.tables import Table

CACHED_KERNEL = "fused_uvm_caching"
KERNELS = ("fused", CACHED_KERNEL)


@dataclass(frozen=True)
class PlacedShard:
    """A rectangle of a table on a rank.

    Attributes:
        rank: who holds it.
        offsets: first row and first column.
        sizes: rows and columns.
    """

    rank: int
    offsets: tuple[int, int]
    sizes: tuple[int, int]

    @property
    def num_values(self) -> int:
        """Rows times columns; 0 on ranks that a table with fewer rows than ranks leaves empty."""
        return self.sizes[0] * self.sizes[1]


@dataclass(frozen=True)
class PlacedTable:
    """How one table is sharded.

    Attributes:
        sharding_type: TorchRec's name for it.
        compute_kernel: TorchRec's name for where its rows live and how they are updated.
        shards: in the order that TorchRec has them.
        cache_fraction: of the rows that a kernel with a cache keeps on the device.
    """

    sharding_type: str
    compute_kernel: str
    shards: tuple[PlacedShard, ...]
    cache_fraction: float | None = None

    @property
    def ranks(self) -> list[int]:
        """The rank of each shard."""
        return [shard.rank for shard in self.shards]

    @property
    def cache_params(self) -> CacheParams | None:
        """The cache in TorchRec's words."""
        return None if self.cache_fraction is None else CacheParams(load_factor=self.cache_fraction)


Layout = Mapping[str, PlacedTable]


@dataclass(frozen=True)
class Found:
    """A layout, and how the planner has found it; of one that was given the rest is not known.

    Attributes:
        layout: of all tables.
        lower_bound_ms: no plan of these kinds has a faster slowest rank: work spread perfectly, memory no object.
        num_proposals: plans that were tried.
        search_s: wall time.
    """

    layout: Layout
    lower_bound_ms: float | None = None
    num_proposals: int = 0
    search_s: float = 0.0


def layout_of(plan: ShardingPlan) -> dict[str, PlacedTable]:
    """Return what a TorchRec plan says, by table."""
    layout: dict[str, PlacedTable] = {}
    for module_plan in plan.plan.values():
        for table, sharding in module_plan.items():
            layout[table] = PlacedTable(
                sharding.sharding_type,
                sharding.compute_kernel,
                tuple(
                    PlacedShard(shard.placement.rank(), tuple(shard.shard_offsets), tuple(shard.shard_sizes))
                    for shard in sharding.sharding_spec.shards
                ),
                _cache_fraction(sharding),
            )
    return layout


def _cache_fraction(sharding: ParameterSharding) -> float | None:
    """The planner hands cache parameters to every table that might have had a cache."""
    if sharding.compute_kernel != CACHED_KERNEL or sharding.cache_params is None:
        return None
    return sharding.cache_params.load_factor


def sharding_plan(layout: Layout, model: nn.Module, machine: Machine) -> ShardingPlan:
    """Make TorchRec's plan for a model of a layout ."""
    modules: dict[str, EmbeddingModuleShardingPlan] = {}
    for path, collection in collections_of(model):
        modules[path] = EmbeddingModuleShardingPlan()
        for config in collection.embedding_bag_configs():
            modules[path][config.name] = _parameter_sharding(layout[config.name], machine)
    return ShardingPlan(dict(modules))


def _parameter_sharding(placed: PlacedTable, machine: Machine) -> ParameterSharding:
    shards = [
        ShardMetadata(
            shard_offsets=list(shard.offsets),
            shard_sizes=list(shard.sizes),
            placement=placement(machine.kind, shard.rank, machine.devices_per_host),
        )
        for shard in placed.shards
    ]
    return ParameterSharding(
        sharding_type=placed.sharding_type,
        compute_kernel=placed.compute_kernel,
        ranks=placed.ranks,
        sharding_spec=EnumerableShardingSpec(shards),
        cache_params=placed.cache_params,
    )


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
