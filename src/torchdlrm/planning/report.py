"""Describes plans in words and rows of text, for any output: a row is a mapping of columns to text."""

from collections.abc import Sequence
from itertools import groupby

from torchdlrm.planning.remedies import Shortfall
from torchdlrm.planning.side_by_side import Point
from torchdlrm.sharding.solution import Cost, Solution
from torchdlrm.units import show_bytes

Row = dict[str, str]
PICTURES = frozenset({"memory", "time", "rows/s plot"})  # columns of bars
LEFT_ALIGNED = PICTURES | {"kind", "kernel", "ranks"}
# Columns of `rank_rows`, for windows that have no room for all.
MEMORY_COLUMNS = ("rank", "shards", "weights", "state", "activations", "memory", "used")
TIME_COLUMNS = ("rank", "forward ms", "backward ms", "exchange ms", "time", "")
_MAX_ROWS = 40
_BAR_CELLS = 14


def headline(solution: Solution) -> str:
    """Say what was planned for what."""
    problem = solution.problem
    machine = problem.machine
    hosts = f"{machine.num_hosts} host{'s' if machine.num_hosts > 1 else ''}"
    return (
        f"yes, it fits: {len(problem.tables)} tables, {show_bytes(solution.total.weight_bytes)} of {problem.precision} "
        f"weights, on {machine.num_devices} x {machine.device} ({show_bytes(machine.memory_bytes)} each, {hosts}), "
        f"{problem.optimizer.name}, {problem.batch_size_global:,} rows a step"
    )


def rank_rows(solution: Solution, limit: int | None = _MAX_ROWS) -> list[Row]:
    """Describe each rank: what it holds, how full it is, how long it takes."""
    slowest_ms = solution.ranks[solution.bottleneck_rank].total_ms or 1.0
    shards = _shards_by_rank(solution)
    rows = [
        {
            "rank": str(rank),
            "shards": str(shards[rank]),
            **_bytes(cost),
            "memory": _bar(solution.memory_fraction(rank)),
            "used": f"{solution.memory_fraction(rank):.1%}",
            "forward ms": f"{cost.forward_ms:.3f}",
            "backward ms": f"{cost.backward_ms:.3f}",
            "exchange ms": f"{cost.communication_ms:.3f}",
            "time": _bar(cost.total_ms / slowest_ms),
            "": "bottleneck" if rank == solution.bottleneck_rank else "",
        }
        for rank, cost in enumerate(solution.ranks)
    ]
    return _shorten(rows, limit)


def total_row(solution: Solution) -> Row:
    """Describe what all ranks hold together, as the last of the rows of ranks."""
    return {"rank": "all", "shards": str(sum(_shards_by_rank(solution))), **_bytes(solution.total)}


def table_rows(solution: Solution, limit: int | None = _MAX_ROWS) -> list[Row]:
    """Describe each table: how it is sharded, where, and what it takes."""
    rows = []
    for table in sorted(solution.problem.tables, key=lambda table: -table.rows * table.dim):
        placed = solution.layout[table.name]
        cost = sum(solution.costs[table.name], Cost())
        rows.append(
            {
                "table": table.name,
                "rows": f"{table.rows:,}",
                "dim": str(table.dim),
                "kind": placed.sharding_type,
                "kernel": placed.compute_kernel,
                "ranks": show_ranks(placed.ranks),
                "bytes": show_bytes(cost.weight_bytes + cost.state_bytes),
                "ms": f"{cost.total_ms:.3f}",
            }
        )
    return _shorten(rows, limit)


def summary_lines(solution: Solution) -> list[str]:
    """Describe the totals, the bottleneck, the estimate and how far to trust it."""
    found, dense = solution.found, solution.problem.dense
    slowest, fullest = solution.bottleneck_rank, solution.fullest_rank
    tables_ms = solution.ranks[slowest].total_ms
    reserved = f"{solution.problem.reserved_fraction:.0%} kept free for the rest"
    full = f"rank {fullest}, {solution.memory_fraction(fullest):.1%} of its memory by tables, {reserved}"
    lines = [f"bottleneck: rank {slowest}, whose tables take {tables_ms:.3f} ms a step; fullest: {full}"]
    if solution.above_lower_bound is not None:
        lines.append(
            f"search: {found.num_proposals} proposals in {found.search_s:.1f} s; the slowest rank is "
            f"{max(0.0, solution.above_lower_bound):.1%} above the lower bound ({found.lower_bound_ms:.3f} ms: all "
            "work spread perfectly, memory no object), which no plan of these kinds can beat"
        )
    lines.append(
        f"predicted step: {solution.step_ms:.2f} ms = {tables_ms:.3f} ms tables + {dense.compute_ms:.3f} ms dense "
        f"parts + {dense.all_reduce_ms:.3f} ms all-reduce; {solution.rows_per_s:,.0f} rows/s"
    )
    lines.append(
        f"dense parts: {dense.multiply_adds:,} multiply-adds a row forward; of the memory that is kept free they take "
        f"{show_bytes(dense.weight_bytes)} for weights, gradients and their optimizer, and "
        f"{show_bytes(dense.activation_bytes)} for activations"
    )
    if solution.problem.measured is not None:
        lines.append(
            "estimate: TorchRec's model of bytes moved, with the rates and the dense part measured on this machine "
            "just now; expect it within 30 % of what dlrm bench step measures here"
        )
    else:
        machine = solution.problem.machine
        lines.append(
            f"estimate: TorchRec's model of bytes moved over the peak rates of {machine.device} ({machine.source}) and "
            "matrix products at half of peak, nothing overlapping. Trust the bytes to a few percent and the order of "
            "plans; the milliseconds only to a factor of two or so, for they leave out kernel launches, skewed ids and "
            "input"
        )
    return lines


def largest_rows(missing: Shortfall) -> list[Row]:
    """Describe where the memory goes."""
    return [
        {"table": name, "weights and state": show_bytes(size), "of all": f"{size / missing.needed_bytes:.1%}"}
        for name, size in missing.largest
    ]


def sweep_rows(points: Sequence[Point]) -> list[Row]:
    """Give memory, time and rows per device-hour for each number of devices and batch size."""
    best = max((point["rows_per_s"] for point in points if point["fits"]), default=1.0)
    rows = []
    for point in points:
        row = {"devices": str(point["num_devices"]), "batch": f"{point['batch_size_global']:,}"}
        if not point["fits"]:
            row |= {"fits": "no", "fullest rank": f"{show_bytes(point['missing_bytes'])} missing"}
            row |= dict.fromkeys(("memory", "step ms", "rows/s", "rows per\ndevice-hour", "rows/s plot"), "")
        else:
            fraction = point["fullest_rank_memory_fraction"]
            row |= {
                "fits": "yes",
                "fullest rank": f"{fraction:.1%}",
                "memory": _bar(fraction, 10),
                "step ms": f"{point['step_ms']:.2f}",
                "rows/s": f"{point['rows_per_s']:,.0f}",
                "rows per\ndevice-hour": f"{point['rows_per_device_hour']:,.0f}",
                "rows/s plot": _bar(point["rows_per_s"] / best),
            }
        rows.append(row)
    return rows


def show_ranks(ranks: Sequence[int]) -> str:
    """Write ranks with runs shortened: 0-7, or 1, 3."""
    runs = []
    for _, group in groupby(enumerate(sorted(set(ranks))), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in group]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(runs)


def _bytes(cost: Cost) -> Row:
    parts = {"weights": cost.weight_bytes, "state": cost.state_bytes, "activations": cost.activation_bytes}
    return {name: show_bytes(size_bytes) for name, size_bytes in parts.items()}


def _bar(fraction: float, cells: int = _BAR_CELLS) -> str:
    """Draw a fraction of one as a bar of cells, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, fraction)) * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")).ljust(cells, "·")


def _shards_by_rank(solution: Solution) -> list[int]:
    shards = [0] * len(solution.ranks)
    for placed in solution.layout.values():
        for shard in placed.shards:
            shards[shard.rank] += shard.num_values > 0
    return shards


def _shorten(rows: list[Row], limit: int | None) -> list[Row]:
    if limit is None or len(rows) <= limit:
        return rows
    first = next(iter(rows[0]))
    return [*rows[:limit], {first: f"and {len(rows) - limit} more, in plan.json"}]
