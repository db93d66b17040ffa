"""Sets plans side by side: of the same tables for several machines, or of two plan files."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchdlrm.errors import PlanError
from torchdlrm.planning.remedies import shortfall
from torchdlrm.sharding.plan_json import read_plan
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import try_solve
from torchdlrm.units import show_bytes

Point = dict[str, Any]  # of a sweep: what `dlrm plan --sweep --json` says of a machine and a batch size


def sweep(problem: Problem, axes: Sequence[str]) -> list[Point]:
    """Plan for every pair of a number of devices and a batch size.

    Args:
        problem: whose machine and batch size are varied.
        axes: such as `devices=1,2,4` and `batch=8192,65536`; one that is missing has the problem's own value.

    Raises:
        PlanError: an axis is none of these, or a number of devices cannot be spread evenly over hosts.
    """
    numbers = {"devices": [problem.machine.num_devices], "batch": [problem.batch_size_global]}
    numbers |= dict(map(_read_axis, axes))
    return [_point(problem, devices, batch) for batch in numbers["batch"] for devices in numbers["devices"]]


def _read_axis(axis: str) -> tuple[str, list[int]]:
    name, _, values = axis.partition("=")
    numbers = [int(value) for value in values.split(",") if value.isdecimal()]
    if name not in {"devices", "batch"} or len(numbers) != 1 + values.count(",") or min(numbers) < 1:
        raise PlanError(f"`sweep`: {axis!r}: expected devices=1,2,4,8 or batch=8192,65536 with numbers above zero")
    return name, numbers


def _point(problem: Problem, num_devices: int, batch: int) -> Point:
    problem = replace(problem, machine=problem.machine.resized(num_devices), batch_size_global=batch)
    solution = try_solve(problem)
    point: Point = {"num_devices": num_devices, "batch_size_global": batch, "fits": solution is not None}
    if solution is None:
        return point | {"missing_bytes": shortfall(problem).missing_bytes}
    return point | {
        "fullest_rank_memory_fraction": solution.memory_fraction(solution.fullest_rank),
        "step_ms": solution.step_ms,
        "rows_per_s": solution.rows_per_s,
        "rows_per_device_hour": 3600 * solution.rows_per_s / num_devices,  # what the rent buys
    }


def compare_plans(paths: Sequence[Path]) -> dict[str, Any]:
    """Find what differs between two plan files.

    Returns:
        `values` by name, each with `a`, `b` and, of numbers, their `ratio` (b / a); and `tables`, a list of those that
        are placed differently, with how `a` and how `b` places them.

    Raises:
        PlanError: there are not two; or a file is no plan, places no tables, or lacks its estimate.
    """
    if len(paths) != 2:
        raise PlanError(f"`compare`: expected two files that dlrm plan --out wrote, got {len(paths)}")
    plans = [*map(read_plan, paths)]
    try:
        a, b = (_values(plan) for plan in plans)
    except (KeyError, TypeError) as error:
        msg = f"`compare`: one of the plans has no {error}: it does not fit, or an older version wrote it; plan again"
        raise PlanError(msg) from error
    places = [{name: _place(table) for name, table in plan["tables"].items()} for plan in plans]
    tables = (
        {"table": name, "a": places[0].get(name, "not there"), "b": places[1].get(name, "not there")}
        for name in dict.fromkeys([*places[0], *places[1]])
    )
    return {
        "values": {name: {"a": a[name], "b": b[name], "ratio": _ratio(a[name], b[name])} for name in a},
        "tables": [table for table in tables if table["a"] != table["b"]],
    }


def compared_rows(compared: Mapping[str, Any], names: Sequence[str]) -> tuple[list[dict[str, str]], ...]:
    """The values and the tables of `compare_plans` as rows of text, in a column for each plan, called by its name."""
    first, second = names
    values = [
        {
            "": name,
            first: _show(name, pair["a"]),
            second: _show(name, pair["b"]),
            "b / a": "" if pair["ratio"] is None else f"{pair['ratio']:.2f}",
        }
        for name, pair in compared["values"].items()
    ]
    return values, [{"table": table["table"], first: table["a"], second: table["b"]} for table in compared["tables"]]


def _show(name: str, value: Any) -> str:
    if "bytes" in name:
        return show_bytes(value)
    if "fraction" in name:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _values(plan: Mapping[str, Any]) -> dict[str, Any]:
    fullest = plan["ranks"][plan["estimate"]["fullest_rank"]]
    return {
        "device": f"{plan['world_size']} x {plan['machine']['device']}",
        "optimizer": plan["optimizer"],
        "precision": plan["precision"],
        "batch size": plan["batch_size_global"],
        "weights (bytes)": plan["total"]["weight_bytes"],
        "optimizer state (bytes)": plan["total"]["state_bytes"],
        "fullest rank (bytes)": fullest["device_bytes"],
        "fullest rank (fraction)": fullest["memory_fraction"],
        "slowest rank's tables (ms)": plan["estimate"]["worst_rank_ms"],
        "step (ms)": plan["estimate"]["step_ms"],
        "rows/s": plan["estimate"]["rows_per_s"],
    }


def _ratio(a: Any, b: Any) -> float | None:
    return b / a if isinstance(a, int | float) and isinstance(b, int | float) and a else None


def _place(table: Mapping[str, Any]) -> str:
    kernel = "" if table["compute_kernel"] == "fused" else f" {table['compute_kernel']}"
    ranks = ", ".join(map(str, table["ranks"])) if len(table["ranks"]) <= 4 else f"{len(table['ranks'])} shards"
    return f"{table['sharding_type']}{kernel} on {ranks}"
