"""Represents a plan as data: which rank holds which part of which table; from TorchRec and JSON, and to them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

from torchdlrm.errors import PlanError
from torchdlrm.sharding.constraints import GRID_SHARD, KINDS, TABLE_ROW_WISE
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.planner import collections_of
from torchdlrm.sharding.tables import Table

FORMAT, FORMAT_VERSION, _WITH_OLD_NAMES = "torchdlrm-plan", 2, 1
_NEW_NAMES = {
    "cache_share": "cache_fraction",
    "host_cache_share": "cache_fraction",
    "memory_share": "memory_fraction",
    "reserved_share": "reserved_fraction",
}
_CACHED_KERNEL = "fused_uvm_caching"
_KERNELS = ("fused", _CACHED_KERNEL)


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
    if sharding.compute_kernel != _CACHED_KERNEL or sharding.cache_params is None:
        return None
    fraction: float | None = sharding.cache_params.load_factor
    return fraction


def layout_as_dict(layout: Layout) -> dict[str, Any]:
    """Return a layout for JSON."""
    return {
        name: {
            "sharding_type": placed.sharding_type,
            "compute_kernel": placed.compute_kernel,
            "cache_fraction": placed.cache_fraction,
            "ranks": placed.ranks,
            "shards": [asdict(shard) for shard in placed.shards],
        }
        for name, placed in layout.items()
    }


def read_plan(path: Path) -> dict[str, Any]:
    """Read the object in a plan.json.

    Raises:
        PlanError: the file cannot be read, is no plan, or of another format version.
    """
    try:
        plan: Any = json.loads(path.read_text(encoding="utf-8"), object_hook=_in_new_names)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        msg = f"{path}: cannot read the plan: {error}; dlrm plan writes one"
        raise PlanError(msg) from error
    if not isinstance(plan, dict) or "tables" not in plan or "format_version" not in plan:
        msg = f"{path}: not a plan (no tables, no format_version); dlrm plan writes one"
        raise PlanError(msg)
    if plan["format_version"] not in {FORMAT_VERSION, _WITH_OLD_NAMES}:
        msg = f"{path}: format_version is {plan['format_version']!r}, this version reads {FORMAT_VERSION}; plan again"
        raise PlanError(msg)
    return plan


def _in_new_names(found: dict[str, Any]) -> dict[str, Any]:
    """What the first format version called otherwise; a table, which is an object itself, keeps its name."""
    return {key if isinstance(value, dict) else _NEW_NAMES.get(key, key): value for key, value in found.items()}


@dataclass(frozen=True)
class SavedPlan:
    """What a plan.json says to training.

    Attributes:
        place: what to call it in messages.
        world_size: ranks that it was made for.
        layout: of all tables.
    """

    place: str
    world_size: int
    layout: Layout


def read_saved_plan(path: Path) -> SavedPlan:
    """Read a plan.json to follow.

    Raises:
        PlanError: the file is no plan, or says that there is none.
    """
    plan = read_plan(path)
    if plan.get("fits") is False:
        msg = f"{path}: says that the tables do not fit, so it places none; dlrm plan shows what would make them fit"
        raise PlanError(msg)
    try:
        layout = {
            name: PlacedTable(
                placed["sharding_type"],
                placed["compute_kernel"],
                tuple(PlacedShard(int(s["rank"]), _pair(s["offsets"]), _pair(s["sizes"])) for s in placed["shards"]),
                placed.get("cache_fraction"),
            )
            for name, placed in plan["tables"].items()
        }
        return SavedPlan(str(path), int(plan["world_size"]), layout)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"{path}: an entry is missing or damaged ({type(error).__name__}: {error}); plan again"
        raise PlanError(msg) from error


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def sharding_plan(layout: Layout, model: nn.Module, machine: Machine) -> ShardingPlan:
    """Make TorchRec's plan for a model of a layout that `check_layout` has accepted."""
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


def check_layout(saved: SavedPlan, tables: Sequence[Table], machine: Machine) -> None:
    """Refuse a plan that is not for these tables and this machine.

    Raises:
        PlanError: names the first few of everything that does not match.
    """
    layout = saved.layout
    names = [table.name for table in tables]
    problems = [f"{name}: the model has it, the plan does not" for name in names if name not in layout]
    problems += [f"{name}: the plan has it, the model does not" for name in layout if name not in set(names)]
    problems += [problem for table in tables if table.name in layout for problem in _misfits(layout[table.name], table)]
    if saved.world_size != machine.num_devices:
        problems.insert(0, f"it is for {saved.world_size} rank(s), there are {machine.num_devices}")
    if any(not 0 <= rank < saved.world_size for placed in layout.values() for rank in placed.ranks):
        problems.append(f"it puts shards on ranks that are not among 0 to {saved.world_size - 1}")
    problems += [
        f"{name}: unknown kind {placed.sharding_type!r}; kinds: {', '.join(KINDS)}"
        for name, placed in layout.items()
        if placed.sharding_type not in KINDS
    ]
    problems += [
        f"{name}: unknown kernel {placed.compute_kernel!r}, or not for {machine.kind}"
        for name, placed in layout.items()
        if placed.compute_kernel not in _KERNELS[: 2 if machine.kind == "cuda" else 1]
    ]
    problems += [
        f"{name}: {placed.sharding_type} needs its shards on all {machine.devices_per_host} rank(s) of a host"
        for name, placed in layout.items()
        if placed.sharding_type in {TABLE_ROW_WISE, GRID_SHARD} and not _is_by_hosts(placed, machine)
    ]
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        lines = [f"{saved.place}: the plan is not for this model and machine:", *problems[:5], *more]
        msg = "\n  ".join(lines) + "\nplan again with dlrm plan, for the same dataset, config and number of devices"
        raise PlanError(msg)


def _is_by_hosts(placed: PlacedTable, machine: Machine) -> bool:
    """Whether the shards of each piece of the columns are on the ranks of one host, in their order."""
    per_host = machine.devices_per_host
    ranks_by_column: dict[int, list[int]] = {}
    for shard in placed.shards:
        ranks_by_column.setdefault(shard.offsets[1], []).append(shard.rank)
    return all(
        ranks[0] % per_host == 0 and ranks == list(range(ranks[0], ranks[0] + per_host))
        for ranks in ranks_by_column.values()
    )


def _misfits(placed: PlacedTable, table: Table) -> list[str]:
    """What is wrong with one table: its shards have to tile it."""
    shards = [shard for shard in placed.shards if shard.num_values]
    rows = max((shard.offsets[0] + shard.sizes[0] for shard in shards), default=0)
    columns = max((shard.offsets[1] + shard.sizes[1] for shard in shards), default=0)
    if (rows, columns) != (table.rows, table.dim):
        return [
            f"{table.name}: the plan is for {rows:,} rows of {columns}, the model has {table.rows:,} of {table.dim}"
        ]
    if sum(shard.num_values for shard in shards) != rows * columns or _overlap(shards):
        return [f"{table.name}: its shards do not cover every row once"]
    return []


def _overlap(shards: Sequence[PlacedShard]) -> bool:
    """Whether two shards share a value.  Sorted by row and column, only neighbours of a grid can."""
    taken: set[tuple[int, int]] = set()
    for shard in shards:
        if shard.offsets in taken or min(shard.sizes) < 1 or min(shard.offsets) < 0:
            return True
        taken.add(shard.offsets)
    edges_r = sorted({s.offsets[0] for s in shards})
    edges_c = sorted({s.offsets[1] for s in shards})
    next_r = dict(zip(edges_r, [*edges_r[1:], float("inf")], strict=True))
    next_c = dict(zip(edges_c, [*edges_c[1:], float("inf")], strict=True))
    return any(
        s.offsets[0] + s.sizes[0] > next_r[s.offsets[0]] or s.offsets[1] + s.sizes[1] > next_c[s.offsets[1]]
        for s in shards
    )
