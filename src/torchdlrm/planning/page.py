"""Writes a plan, or a sweep, as one self-contained HTML page: pictures of ranks and tables, then their values.

Each rank is a column as high as its memory; each shard is a block as high as its bytes.
"""

from collections.abc import Callable, Sequence

from torchdlrm.html import COLOURS, Chart, Part, render
from torchdlrm.planning import report
from torchdlrm.planning.side_by_side import Point
from torchdlrm.sharding.constraints import COLUMN_WISE, GRID_SHARD, ROW_WISE, TABLE_ROW_WISE, TABLE_WISE
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import Solution
from torchdlrm.units import show_bytes

_KIND_COLOURS = dict(zip((TABLE_WISE, COLUMN_WISE, ROW_WISE, TABLE_ROW_WISE, GRID_SHARD), COLOURS, strict=True))
_STATE, _ACTIVATIONS, _RESERVED = "#c9a227", "#8a9099", "var(--edge)"
_WIDTH = 1080
_MAX_LABELLED_RANKS = 32


def plan_page(solution: Solution) -> str:
    """Make the page of a plan."""
    fullest = solution.fullest_rank
    ranks = _without_pictures([*report.rank_rows(solution, limit=None), report.total_row(solution)])
    parts = [
        Part("Memory: ranks and the tables on them", charts=[_memory_chart(solution)]),
        Part("Time: the tables' part of a step, by rank", charts=[_time_chart(solution)]),
        Part(text=report.summary_lines(solution)),
        Part("Ranks", rows=ranks, left=report.LEFT_ALIGNED),
        Part("Tables", rows=report.table_rows(solution, limit=None), left=report.LEFT_ALIGNED),
    ]
    entries = [
        ("weights", show_bytes(solution.total.weight_bytes)),
        (f"state of {solution.problem.optimizer.name}", show_bytes(solution.total.state_bytes)),
        (f"memory of the fullest rank, {fullest}", f"{solution.memory_fraction(fullest):.1%}"),
        (f"predicted step; bottleneck rank {solution.bottleneck_rank}", f"{solution.step_ms:.2f} ms"),
        ("predicted rows/s", f"{solution.rows_per_s:,.0f}"),
    ]
    return render("Sharding plan", parts, lead=report.headline(solution), entries=entries)


def sweep_page(problem: Problem, points: Sequence[Point]) -> str:
    """Make the page of a sweep: rows a second against devices, one line a batch size, and all values."""
    fitting = [point for point in points if point["fits"]]
    lead = (
        f"{len(problem.tables)} tables, {show_bytes(problem.table_bytes)} of weights and state of "
        f"{problem.optimizer.name}, on {problem.machine.device}"
    )
    charts = (
        []
        if not fitting
        else [
            _sweep_chart("Rows a second", points, "rows_per_s", lambda value: f"{value / 1e6:.3g} M"),
            _sweep_chart("Memory of the fullest rank", points, "fullest_rank_memory_fraction", "{:.0%}".format),
        ]
    )
    parts = [
        Part(text=() if charts else ["The tables fit on none of these machines."], charts=charts),
        Part("All values", rows=_without_pictures(report.sweep_rows(points)), left=report.LEFT_ALIGNED),
    ]
    return render("Sharding sweep", parts, lead=lead)


def _without_pictures(rows: Sequence[report.Row]) -> list[report.Row]:
    """Leave out the bars of text, which the charts show better."""
    return [{name: text for name, text in row.items() if name not in report.PICTURES} for row in rows]


def _memory_chart(solution: Solution) -> Chart:
    memory, usable = solution.problem.machine.memory_bytes, solution.problem.usable_bytes
    most = max(cost.device_bytes for cost in solution.ranks)
    # Tables that fill a thousandth of a machine would be a line at the bottom: then the picture shows what is filled.
    shows_all = most > 0.05 * memory
    chart = _rank_chart(
        solution, memory if shows_all else max(1.0, 1.15 * most), 420, "memory of each rank", show_bytes
    )
    filled = [0.0] * len(solution.ranks)

    def add(rank: int, size_bytes: float, colour: str, title: str, label: str = "") -> None:
        chart.block(rank, filled[rank], filled[rank] + size_bytes, colour, title, label)
        filled[rank] += size_bytes

    for name in sorted(solution.layout, key=lambda name: -sum(cost.weight_bytes for cost in solution.costs[name])):
        placed = solution.layout[name]
        for shard, cost in zip(placed.shards, solution.costs[name], strict=True):
            if cost.weight_bytes and not cost.host_bytes:
                rows, columns = shard.sizes
                title = f"{name}: {rows:,} x {columns}, {show_bytes(cost.weight_bytes)}, {placed.sharding_type}"
                add(shard.rank, cost.weight_bytes, _KIND_COLOURS[placed.sharding_type], title, name)
    for rank, cost in enumerate(solution.ranks):
        state = min(cost.state_bytes, max(0.0, cost.device_bytes - filled[rank]))
        add(rank, state, _STATE, f"rank {rank}: optimizer state, {show_bytes(state)}", "state")
        rest = max(0.0, cost.device_bytes - filled[rank])
        add(rank, rest, _ACTIVATIONS, f"rank {rank}: activations and caches, {show_bytes(rest)}", "activations")
        if shows_all:
            add(rank, max(0.0, usable - filled[rank]), "transparent", f"rank {rank}: free")
            add(rank, memory - usable, _RESERVED, f"reserved for the rest, {show_bytes(memory - usable)}")
    kinds = dict.fromkeys(placed.sharding_type for placed in solution.layout.values())
    chart.key += [(_KIND_COLOURS[kind], f"weights, {kind}") for kind in kinds]
    chart.key += [(_STATE, "optimizer state"), (_ACTIVATIONS, "activations and caches")]
    chart.key += [(_RESERVED, "reserved for the rest")]
    return chart


def _time_chart(solution: Solution) -> Chart:
    top_ms = 1.08 * max(cost.total_ms for cost in solution.ranks) or 1.0
    chart = _rank_chart(solution, top_ms, 170, "time of each rank's tables", lambda value: f"{value:.3g} ms")
    chart.key += [(COLOURS[0], "forward"), ("#27497a", "backward and update"), ("#c26a3a", "exchange between ranks")]
    for rank, cost in enumerate(solution.ranks):
        below_ms = 0.0
        for (colour, name), ms in zip(
            chart.key, (cost.forward_ms, cost.backward_ms, cost.communication_ms), strict=True
        ):
            chart.block(rank, below_ms, below_ms + ms, colour, f"rank {rank}: {name} {ms:.3f} ms")
            below_ms += ms
    if solution.found.lower_bound_ms:
        chart.line(solution.found.lower_bound_ms, "mark", "lower bound")
    return chart


def _rank_chart(solution: Solution, top: float, height: float, caption: str, show: Callable[[float], str]) -> Chart:
    """Make an empty chart with a column for each rank."""
    num_ranks = len(solution.ranks)
    chart = Chart((-0.5, num_ranks - 0.5), (0, top), _WIDTH, height, caption, "rank")
    chart.y_axis(show)
    if num_ranks <= _MAX_LABELLED_RANKS:
        for rank in range(num_ranks):
            chart.x_label(rank, str(rank))
    return chart


def _sweep_chart(caption: str, points: Sequence[Point], name: str, show: Callable[[float], str]) -> Chart:
    """Draw a line of a value for each batch size, over the numbers of devices; at least one point fits."""
    devices = sorted({point["num_devices"] for point in points})
    fitting = [point for point in points if point["fits"]]
    top = 1.1 * max(point[name] for point in fitting)
    chart = Chart((-0.5, len(devices) - 0.5), (0, top), _WIDTH, 240, caption, "number of devices")
    chart.y_axis(show)
    enough = {point["num_devices"] for point in fitting}
    for place, num_devices in enumerate(devices):
        chart.x_label(place, f"{num_devices} devices{'' if num_devices in enough else ': too few'}")
    for index, batch in enumerate(dict.fromkeys(point["batch_size_global"] for point in fitting)):
        chart.curve(
            [
                (devices.index(point["num_devices"]), point[name])
                for point in fitting
                if point["batch_size_global"] == batch
            ],
            COLOURS[index % len(COLOURS)],
            f"{batch:,} rows a step",
            lambda place, value: f"{show(value)} on {devices[int(place)]} devices",
        )
    return chart
