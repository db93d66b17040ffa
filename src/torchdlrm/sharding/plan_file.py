"""Reads and writes plan.json, which `dlrm train --plan` follows and `dlrm plan --compare` reads."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchdlrm.config import ModelConfig
from torchdlrm.errors import PlanError
from torchdlrm.files import write_atomically
from torchdlrm.sharding.estimate import Cost
from torchdlrm.sharding.layout import FORMAT, FORMAT_VERSION, layout_as_dict
from torchdlrm.sharding.problem import Problem, Solution


def plan_as_dict(solution: Solution) -> dict[str, Any]:
    """Return the plan for JSON."""
    tables = layout_as_dict(solution.layout)
    for table in solution.problem.tables:
        shards = solution.costs[table.name]
        tables[table.name] |= {
            "rows": table.rows,
            "dim": table.dim,
            "pooling_factor": table.pooling_factor,
            **_cost_as_dict(sum(shards, Cost())),
        }
    return {
        **problem_as_dict(solution.problem),
        "fits": True,
        "estimate": {
            "step_ms": solution.step_ms,
            "rows_per_s": solution.rows_per_s,
            "dense": asdict(solution.dense) | {"overhead_ms": 0.0},  # never measured, but format version 1 has it
            "bottleneck_rank": solution.bottleneck_rank,
            "fullest_rank": solution.fullest_rank,
            "worst_rank_ms": solution.ranks[solution.bottleneck_rank].total_ms,
            "lower_bound_ms": solution.lower_bound_ms,
            "above_lower_bound": solution.above_lower_bound,
        },
        "total": _cost_as_dict(solution.total),
        "ranks": [
            {"rank": rank, "memory_fraction": solution.memory_fraction(rank), **_cost_as_dict(cost)}
            for rank, cost in enumerate(solution.ranks)
        ],
        "tables": tables,
    }


def features_as_dict(model: ModelConfig) -> dict[str, Any]:
    """Return the smaller tables of a config as `model.features` has them."""
    return {name: feature.model_dump(exclude_defaults=True) for name, feature in model.features.items()}


def problem_as_dict(problem: Problem) -> dict[str, Any]:
    """Return what was planned for, for JSON."""
    options = problem.options
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "world_size": problem.machine.num_devices,
        "machine": asdict(problem.machine),
        **({"features": smaller} if (smaller := features_as_dict(problem.model)) else {}),
        "optimizer": options.optimizer.name,
        "precision": problem.precision,
        "batch_size_global": options.batch_size_global,
        "reserved_fraction": options.reserved_fraction,
        "constraints": list(options.constraints),
        "cache_fraction": options.cache_fraction,
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
