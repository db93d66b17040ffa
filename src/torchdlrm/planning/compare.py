"""Two plans that were written to files, side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torchdlrm.errors import PlanError
from torchdlrm.units import show_bytes


@dataclass(frozen=True)
class Comparison:
    """What differs.

    Attributes:
        figures: rows of name, first, second, quotient.
        tables: rows of table, how the first places it, how the second does.
        values: the figures as numbers.
    """

    figures: list[list[str]]
    tables: list[list[str]]
    values: dict[str, tuple[Any, Any]]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "figures": {name: {"a": first, "b": second} for name, (first, second) in self.values.items()},
            "tables": [{"table": name, "a": first, "b": second} for name, first, second in self.tables],
        }


def compare_plans(first: Mapping[str, Any], second: Mapping[str, Any]) -> Comparison:
    """Set two plans beside one another.

    Raises:
        PlanError: one of them places no tables, or lacks its estimate.
    """
    try:
        plans = [_figures(first), _figures(second)]
    except (KeyError, TypeError) as error:
        msg = f"--compare: one of the plans has no {error}: it does not fit, or an older version wrote it; plan again"
        raise PlanError(msg) from error
    values = {name: (plans[0][name], plans[1][name]) for name in plans[0]}
    figures = []
    for name, pair in values.items():
        numbers = [value for value in pair if isinstance(value, int | float)]
        quotient = f"{numbers[1] / numbers[0]:.2f}" if len(numbers) == 2 and numbers[0] else ""
        figures.append([name, *(_show(name, value) for value in pair), quotient])
    names = dict.fromkeys([*first["tables"], *second["tables"]])
    places = [[name, _place(first["tables"].get(name)), _place(second["tables"].get(name))] for name in names]
    return Comparison(figures, [row for row in places if row[1] != row[2]], values)


def _figures(plan: Mapping[str, Any]) -> dict[str, Any]:
    fullest = plan["ranks"][plan["estimate"]["fullest_rank"]]
    return {
        "device": f"{plan['world_size']} x {plan['machine']['device']}",
        "optimizer": plan["optimizer"],
        "precision": plan["precision"],
        "batch size": plan["batch_size_global"],
        "weights (bytes)": plan["total"]["weight_bytes"],
        "optimizer state (bytes)": plan["total"]["state_bytes"],
        "fullest rank (bytes)": fullest["device_bytes"],
        "fullest rank (share)": fullest["memory_share"],
        "slowest rank's tables (ms)": plan["estimate"]["worst_rank_ms"],
        "step (ms)": plan["estimate"]["step_ms"],
        "rows/s": plan["estimate"]["rows_per_s"],
    }


def _show(name: str, value: Any) -> str:
    if "bytes" in name:
        return show_bytes(value)
    if "share" in name:
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.3f}" if value < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _place(table: Mapping[str, Any] | None) -> str:
    if table is None:
        return "not there"
    kernel = "" if table["compute_kernel"] == "fused" else f" {table['compute_kernel']}"
    ranks = ", ".join(map(str, table["ranks"])) if len(table["ranks"]) <= 4 else f"{len(table['ranks'])} shards"
    return f"{table['sharding_type']}{kernel} on {ranks}"
