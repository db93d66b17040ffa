"""Plans in words and rows of text, for whoever draws them."""

from collections.abc import Sequence
from itertools import groupby

from torchdlrm.planning.remedies import Remedy, Shortfall
from torchdlrm.planning.sweep import SweepPoint
from torchdlrm.sharding.estimate import Cost
from torchdlrm.sharding.problem import Solution
from torchdlrm.units import show_bytes

PICTURES = frozenset({"memory", "time", "rows/s plot"})  # columns of bars
LEFT_ALIGNED = PICTURES | {"kind", "kernel", "ranks"}
_MAX_ROWS = 40
_BAR_CELLS = 14


def bar(share: float, cells: int = _BAR_CELLS) -> str:
    """A share of one as a bar of so many cells, in eighths of a cell."""
    eighths = round(max(0.0, min(1.0, share)) * cells * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + ("▏▎▍▌▋▊▉"[rest - 1] if rest else "")).ljust(cells, "·")


def headline(solution: Solution) -> str:
    """What was planned for what."""
    problem = solution.problem
    machine = problem.machine
    hosts = f"{machine.num_hosts} host{'s' if machine.num_hosts > 1 else ''}"
    return (
        f"yes, it fits: {len(problem.tables)} tables, {show_bytes(solution.total.weight_bytes)} of {problem.precision} "
        f"weights, on {machine.num_devices} x {machine.device} ({show_bytes(machine.memory_bytes)} each, {hosts}), "
        f"{problem.options.optimizer}, {problem.options.batch_size_global:,} rows a step"
    )


def rank_rows(solution: Solution, limit: int | None = _MAX_ROWS) -> tuple[list[str], list[list[str]]]:
    """Per rank: what it holds, how full it is, how long it takes."""
    slowest = solution.ranks[solution.bottleneck_rank].total_ms or 1.0
    shards = [0] * len(solution.ranks)
    for placed in solution.layout.values():
        for shard in placed.shards:
            shards[shard.rank] += shard.num_values > 0
    head = ["rank", "shards", "weights", "state", "activations", "memory", "share"]
    head += ["forward ms", "backward ms", "exchange ms", "time", ""]
    rows = [
        [
            str(rank),
            str(shards[rank]),
            *map(show_bytes, (cost.weight_bytes, cost.state_bytes, cost.activation_bytes)),
            bar(solution.memory_fraction(rank)),
            f"{solution.memory_fraction(rank):.1%}",
            f"{cost.forward_ms:.3f}",
            f"{cost.backward_ms:.3f}",
            f"{cost.communication_ms:.3f}",
            bar(cost.total_ms / slowest),
            "bottleneck" if rank == solution.bottleneck_rank else "",
        ]
        for rank, cost in enumerate(solution.ranks)
    ]
    total = solution.total
    rows = _shorten(rows, limit)
    rows.append(["all", str(sum(shards)), *map(show_bytes, (total.weight_bytes, total.state_bytes))])
    rows[-1] += [show_bytes(total.activation_bytes)]
    return head, rows


MEMORY_COLUMNS = ("rank", "shards", "weights", "state", "activations", "memory", "share")
TIME_COLUMNS = ("rank", "forward ms", "backward ms", "exchange ms", "time", "")


def pick(names: Sequence[str], head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Some columns of a table, for windows that are not wide; a row that ends before the second of them is left out."""
    places = [list(head).index(name) for name in names]
    return list(names), [[row[p] for p in places if p < len(row)] for row in rows if len(row) > places[1]]


def table_rows(solution: Solution, limit: int | None = _MAX_ROWS) -> tuple[list[str], list[list[str]]]:
    """Per table: how it is sharded, where, and what it takes."""
    head = ["table", "rows", "dim", "kind", "kernel", "ranks", "bytes", "ms"]
    rows = []
    for table in sorted(solution.problem.tables, key=lambda table: -table.rows * table.dim):
        placed = solution.layout[table.name]
        cost = sum(solution.costs[table.name], Cost())
        row = [table.name, f"{table.rows:,}", str(table.dim), placed.sharding_type, placed.compute_kernel]
        row += [show_ranks(placed.ranks), show_bytes(cost.weight_bytes + cost.state_bytes), f"{cost.total_ms:.3f}"]
        rows.append(row)
    return head, _shorten(rows, limit)


def summary_lines(solution: Solution) -> list[str]:
    """Totals, the bottleneck, the estimate and how far to trust it."""
    problem, dense = solution.problem, solution.dense
    slowest = solution.bottleneck_rank
    lines = []
    lines.append(
        f"bottleneck: rank {slowest}, whose tables take {solution.ranks[slowest].total_ms:.3f} ms a step; fullest: "
        f"rank {solution.fullest_rank}, {solution.memory_fraction(solution.fullest_rank):.1%} of its memory by tables, "
        f"{problem.options.reserved_fraction:.0%} kept free for the rest"
    )
    if solution.above_lower_bound is not None:
        lines.append(
            f"search: {solution.num_proposals} proposals in {solution.search_s:.1f} s; the slowest rank is "
            f"{max(0.0, solution.above_lower_bound):.1%} above the lower bound ({solution.lower_bound_ms:.3f} ms: all "
            "work spread perfectly, memory no object), which no plan of these kinds can beat"
        )
    parts = f"{dense.compute_ms:.3f} ms dense parts + {dense.all_reduce_ms:.3f} ms all-reduce"
    parts += f" + {dense.overhead_ms:.3f} ms overhead" if dense.overhead_ms else ""
    lines.append(
        f"predicted step: {solution.step_ms:.2f} ms = {solution.ranks[slowest].total_ms:.3f} ms tables + {parts}; "
        f"{solution.rows_per_s:,.0f} rows/s"
    )
    lines.append(trust(solution))
    return lines


def trust(solution: Solution) -> str:
    """How the estimate is made, and how far it goes."""
    if solution.problem.measured is not None:
        return (
            "estimate: TorchRec's model of bytes moved, with the rates and the dense part measured on this machine "
            "just now; expect it within 30 % of what dlrm bench step measures here"
        )
    return (
        f"estimate: TorchRec's model of bytes moved over the peak rates of {solution.problem.machine.device} "
        f"({solution.problem.machine.source}) and matrix products at half of peak, nothing overlapping. Trust the "
        "bytes to a few percent and the order of plans; the milliseconds only to a factor of two or so, for they leave "
        "out kernel launches, skewed ids and input. --measure times the machine at hand"
    )


def largest_rows(missing: Shortfall) -> tuple[list[str], list[list[str]]]:
    """Where the memory goes."""
    return ["table", "weights and state", "share"], [
        [name, show_bytes(size), f"{size / missing.needed_bytes:.1%}"] for name, size in missing.largest
    ]


def remedy_lines(found: Sequence[Remedy]) -> list[str]:
    """What helps, how to say so, and its price: four lines each, for they are words and no figures."""
    lines = []
    for number, remedy in enumerate(found, start=1):
        solution = remedy.solution
        full = f"{solution.memory_fraction(solution.fullest_rank):.1%} of the fullest rank"
        lines.append(f"{number}. {remedy.change}")
        lines.append(f"     say    {remedy.options}")
        lines.append(f"     price  {remedy.price}")
        lines.append(f"     then   {full}, {solution.step_ms:.2f} ms a step, {solution.rows_per_s:,.0f} rows/s")
    return lines


def sweep_rows(points: Sequence[SweepPoint]) -> tuple[list[str], list[list[str]]]:
    """Memory, time and rows a device-hour against devices and batch size."""
    best = max((point.rows_per_s or 0.0 for point in points), default=0.0) or 1.0
    head = [
        "devices",
        "batch",
        "fits",
        "fullest rank",
        "memory",
        "step ms",
        "rows/s",
        "rows per\ndevice-hour",
        "rows/s plot",
    ]
    rows = []
    for point in points:
        row = [str(point.num_devices), f"{point.batch_size_global:,}"]
        if point.solution is None:
            rows.append([*row, "no", f"{show_bytes(point.missing_bytes)} missing", "", "", "", "", ""])
            continue
        share = point.solution.memory_fraction(point.solution.fullest_rank)
        rows.append(
            [
                *row,
                "yes",
                f"{share:.1%}",
                bar(share, 10),
                f"{point.solution.step_ms:.2f}",
                f"{point.rows_per_s:,.0f}",
                f"{point.rows_per_device_hour:,.0f}",
                bar((point.rows_per_s or 0) / best),
            ]
        )
    return head, rows


def show_ranks(ranks: Sequence[int]) -> str:
    """Ranks with runs shortened: 0-7, or 1, 3."""
    runs = []
    for _, group in groupby(enumerate(sorted(set(ranks))), lambda pair: pair[1] - pair[0]):
        members = [rank for _, rank in group]
        runs.append(str(members[0]) if len(members) == 1 else f"{members[0]}-{members[-1]}")
    return ", ".join(runs)


def _shorten(rows: list[list[str]], limit: int | None) -> list[list[str]]:
    if limit is None or len(rows) <= limit:
        return rows
    return [*rows[:limit], [f"and {len(rows) - limit} more, in --json, --out and --html"]]
