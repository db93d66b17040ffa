"""Reads and writes plan.json, which `dlrm train --plan` follows and `dlrm plan --compare` reads."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchdlrm.config import ModelConfig
from torchdlrm.errors import PlanError
from torchdlrm.files import write_atomically
from torchdlrm.sharding.constraints import GRID_SHARD, KINDS, TABLE_ROW_WISE
from torchdlrm.sharding.layout import KERNELS, Layout, PlacedShard, PlacedTable
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.plan_json import FORMAT, FORMAT_VERSION, read_plan
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Cost, Solution
from torchdlrm.sharding.tables import Table


def plan_as_dict(solution: Solution) -> dict[str, Any]:
    """Return the plan for JSON."""
    sizes = {table.name: table for table in solution.problem.tables}
    return {
        **problem_as_dict(solution.problem),
        "fits": True,
        "estimate": {
            "step_ms": solution.step_ms,
            "rows_per_s": solution.rows_per_s,
            "dense": asdict(solution.problem.dense)
            | {"overhead_ms": 0.0},  # never measured, but format version 1 has it
            "bottleneck_rank": solution.bottleneck_rank,
            "fullest_rank": solution.fullest_rank,
            "worst_rank_ms": solution.ranks[solution.bottleneck_rank].total_ms,
            "lower_bound_ms": solution.found.lower_bound_ms,
            "above_lower_bound": solution.above_lower_bound,
        },
        "total": _cost_as_dict(solution.total),
        "ranks": [
            {"rank": rank, "memory_fraction": solution.memory_fraction(rank), **_cost_as_dict(cost)}
            for rank, cost in enumerate(solution.ranks)
        ],
        "tables": {
            name: {
                "sharding_type": placed.sharding_type,
                "compute_kernel": placed.compute_kernel,
                "cache_fraction": placed.cache_fraction,
                "ranks": placed.ranks,
                "shards": [asdict(shard) for shard in placed.shards],
                "rows": sizes[name].rows,
                "dim": sizes[name].dim,
                "pooling_factor": sizes[name].pooling_factor,
                **_cost_as_dict(sum(solution.costs[name], Cost())),
            }
            for name, placed in solution.layout.items()
        },
    }


def features_as_dict(model: ModelConfig) -> dict[str, Any]:
    """Return the smaller tables of a config as `model.features` has them."""
    return {name: feature.model_dump(exclude_defaults=True) for name, feature in model.features.items()}


def problem_as_dict(problem: Problem) -> dict[str, Any]:
    """Return what was planned for, for JSON."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "world_size": problem.machine.num_devices,
        "machine": asdict(problem.machine),
        **({"features": smaller} if (smaller := features_as_dict(problem.shape.config)) else {}),
        "optimizer": problem.optimizer.name,
        "precision": problem.precision,
        "batch_size_global": problem.batch_size_global,
        "reserved_fraction": problem.asked_reserved_fraction,
        "constraints": list(problem.constraints),
        "cache_fraction": problem.cache_fraction,
    }


def write_plan(path: Path, solution: Solution) -> None:
    """Write plan.json, complete or not at all.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        write_atomically(path, json.dumps(plan_as_dict(solution), indent=1) + "\n")
    except OSError as error:
        msg = f"cannot write the plan to {path}: {error.strerror}; give a file in a folder that exists"
        raise PlanError(msg) from error


def _cost_as_dict(cost: Cost) -> dict[str, Any]:
    return {
        **asdict(cost),
        "total_bytes": cost.total_bytes,
        "device_bytes": cost.device_bytes,
        "total_ms": cost.total_ms,
    }


def read_layout(path: Path, tables: Sequence[Table], machine: Machine) -> Layout:
    """Read a plan.json to follow.

    Raises:
        PlanError: the file is no plan, says that there is none, or is not for these tables and this machine.
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
        world_size = int(plan["world_size"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        msg = f"{path}: an entry is missing or damaged ({type(error).__name__}: {error}); plan again"
        raise PlanError(msg) from error
    problems = _problems(layout, world_size, tables, machine)
    if problems:
        more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
        lines = [f"{path}: the plan is not for this model and machine:", *problems[:5], *more]
        msg = "\n  ".join(lines) + "\nplan again with dlrm plan, for the same dataset, config and number of devices"
        raise PlanError(msg)
    return layout


def _pair(values: Sequence[Any]) -> tuple[int, int]:
    first, second = values
    return int(first), int(second)


def _problems(layout: Layout, world_size: int, tables: Sequence[Table], machine: Machine) -> list[str]:
    """Everything that does not match: a plan has to be for these tables and this machine."""
    names = [table.name for table in tables]
    problems = [f"{name}: the model has it, the plan does not" for name in names if name not in layout]
    problems += [f"{name}: the plan has it, the model does not" for name in layout if name not in set(names)]
    problems += [problem for table in tables if table.name in layout for problem in _misfits(layout[table.name], table)]
    if world_size != machine.num_devices:
        problems.insert(0, f"it is for {world_size} rank(s), there are {machine.num_devices}")
    if any(not 0 <= rank < world_size for placed in layout.values() for rank in placed.ranks):
        problems.append(f"it puts shards on ranks that are not among 0 to {world_size - 1}")
    problems += [
        f"{name}: unknown kind {placed.sharding_type!r}; kinds: {', '.join(KINDS)}"
        for name, placed in layout.items()
        if placed.sharding_type not in KINDS
    ]
    problems += [
        f"{name}: unknown kernel {placed.compute_kernel!r}, or not for {machine.kind}"
        for name, placed in layout.items()
        if placed.compute_kernel not in KERNELS[: 2 if machine.kind == "cuda" else 1]
    ]
    problems += [
        f"{name}: {placed.sharding_type} needs its shards on all {machine.devices_per_host} rank(s) of a host"
        for name, placed in layout.items()
        if placed.sharding_type in {TABLE_ROW_WISE, GRID_SHARD} and not _is_by_hosts(placed, machine)
    ]
    return problems


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
