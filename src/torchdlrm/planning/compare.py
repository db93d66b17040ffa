"""Compares two plan files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchdlrm.errors import PlanError
from torchdlrm.sharding.layout import read_plan
from torchdlrm.units import show_bytes


def compare_plans(first: Path, second: Path) -> dict[str, Any]:
    """Find what differs between two plan files.

    Returns:
        `values` by name, each with `a`, `b` and, of numbers, their `ratio` (b / a); and `tables`, a list of those that
        are placed differently, with how `a` and how `b` places them.

    Raises:
        PlanError: a file is no plan, places no tables, or lacks its estimate.
    """
    plans = [read_plan(first), read_plan(second)]
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


def show_value(name: str, value: Any) -> str:
    """Write a value of a comparison as text."""
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
