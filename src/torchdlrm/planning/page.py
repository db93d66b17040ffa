"""A plan as one self-contained HTML page: a picture of ranks and tables, then the figures.

Each rank is a column as high as its memory; each shard is a block as high as its bytes. No scripts and nothing fetched:
the page can be mailed, and prints.
"""

from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from torchdlrm.errors import PlanError
from torchdlrm.html import figures_table, whole_page
from torchdlrm.planning import report
from torchdlrm.planning.sweep import SweepPoint
from torchdlrm.sharding.problem import Problem, Solution
from torchdlrm.units import show_bytes

_KIND_COLOURS = {
    "table_wise": "#3b6fb6",
    "column_wise": "#b6703b",
    "row_wise": "#3f9464",
    "table_row_wise": "#7d5ba6",
    "grid_shard": "#a63f5b",
}
_STATE, _ACTIVATIONS, _RESERVED = "#c9a227", "#8a9099", "#e4e7eb"
_HEIGHT, _WIDTH, _LEFT, _TOP = 420, 1080, 70, 14


def plan_page(solution: Solution) -> str:
    """The page of a plan."""
    slowest = solution.bottleneck_rank
    cards = [
        (show_bytes(solution.total.weight_bytes), "weights"),
        (show_bytes(solution.total.state_bytes), f"state of {solution.problem.options.optimizer}"),
        (
            f"{solution.memory_fraction(solution.fullest_rank):.1%}",
            f"memory of the fullest rank, {solution.fullest_rank}",
        ),
        (f"{solution.step_ms:.2f} ms", f"predicted step; bottleneck rank {slowest}"),
        (f"{solution.rows_per_s:,.0f}", "predicted rows/s"),
    ]
    body = [
        "<h1>Sharding plan</h1>",
        f"<p>{escape(report.headline(solution))}</p>",
        '<div class="cards">',
        *(f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in cards),
        "</div><h2>Memory: ranks and the tables on them</h2>",
        _memory_picture(solution),
        _memory_key(solution),
        "<h2>Time: the tables' part of a step, by rank</h2>",
        _time_picture(solution),
        _key([("#3b6fb6", "forward"), ("#27497a", "backward and update"), ("#c26a3a", "exchange between ranks")]),
        *(f"<p>{escape(line)}</p>" for line in report.summary_lines(solution)),
        "<h2>Ranks</h2>",
        figures_table(*report.rank_rows(solution, limit=None), report.LEFT_ALIGNED),
        "<h2>Tables</h2>",
        figures_table(*report.table_rows(solution, limit=None), report.LEFT_ALIGNED),
    ]
    return whole_page("Sharding plan", body)


def sweep_page(problem: Problem, points: Sequence[SweepPoint]) -> str:
    """The page of a sweep: rows a second against devices, one line a batch size, and the figures."""
    intro = (
        f"{len(problem.tables)} tables, {show_bytes(problem.table_bytes)} of weights and state of "
        f"{problem.options.optimizer}, on {problem.machine.device}"
    )
    body = [
        "<h1>Sharding sweep</h1>",
        f"<p>{escape(intro)}</p>",
        "<h2>Rows a second</h2>",
        _sweep_picture(points, [point.rows_per_s for point in points], "rows/s", _millions),
        "<h2>Memory of the fullest rank</h2>",
        _sweep_picture(points, [_share(point) for point in points], "share of memory", "{:.0%}".format),
        "<h2>Figures</h2>",
        figures_table(*report.sweep_rows(points), report.LEFT_ALIGNED),
    ]
    return whole_page("Sharding sweep", body)


def write_page(path: Path, page: str) -> None:
    """Write the page.

    Raises:
        PlanError: the file cannot be written.
    """
    try:
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        msg = f"--html: cannot write {path}: {error.strerror}"
        raise PlanError(msg) from error


def _memory_picture(solution: Solution) -> str:
    memory = solution.problem.machine.memory_bytes
    usable = solution.problem.usable_bytes
    ranks = solution.ranks
    # Tables that fill a thousandth of a machine would be a line at the bottom: then the picture shows what is filled.
    top = (
        memory
        if max(cost.device_bytes for cost in ranks) > 0.05 * memory
        else max(1.0, 1.15 * max(cost.device_bytes for cost in ranks))
    )
    pitch = _WIDTH / len(ranks)
    width = min(110.0, 0.86 * pitch)
    parts = [_axis(top, show_bytes)]
    filled = [0.0] * len(ranks)

    def block(rank: int, size_bytes: float, colour: str, title: str, label: str = "") -> None:
        height = size_bytes / top * _HEIGHT
        y = _TOP + _HEIGHT - (filled[rank] + size_bytes) / top * _HEIGHT
        filled[rank] += size_bytes
        x = _LEFT + (rank + 0.5) * pitch - width / 2
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.2f}" width="{width:.1f}" height="{max(height - 0.6, 0.2):.2f}" fill="{colour}">'
            f"<title>{escape(title)}</title></rect>"
        )
        if label and height > 12 and width > 6.2 * len(label):
            parts.append(f'<text class="in" x="{x + 5:.1f}" y="{y + height / 2 + 4:.1f}">{escape(label)}</text>')

    by_size = sorted(solution.layout, key=lambda name: -sum(c.weight_bytes for c in solution.costs[name]))
    for name in by_size:
        placed = solution.layout[name]
        for shard, cost in zip(placed.shards, solution.costs[name], strict=True):
            on_device = cost.weight_bytes if not cost.host_bytes else 0
            if on_device:
                rows, columns = shard.sizes
                title = f"{name}: {rows:,} x {columns}, {show_bytes(on_device)}, {placed.sharding_type}"
                block(shard.rank, on_device, _KIND_COLOURS[placed.sharding_type], title, name)
    for rank, cost in enumerate(ranks):
        state = min(cost.state_bytes, max(0.0, cost.device_bytes - filled[rank]))
        block(rank, state, _STATE, f"rank {rank}: optimizer state, {show_bytes(state)}", "state")
        rest = max(0.0, cost.device_bytes - filled[rank])
        block(rank, rest, _ACTIVATIONS, f"rank {rank}: activations and caches, {show_bytes(rest)}", "activations")
        if top == memory:
            block(rank, max(0.0, usable - filled[rank]), "#ffffff", f"rank {rank}: free")
            block(rank, memory - usable, _RESERVED, f"reserved for the rest, {show_bytes(memory - usable)}")
        if len(ranks) <= 32:
            x = _LEFT + (rank + 0.5) * pitch
            parts.append(f'<text x="{x:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="middle">{rank}</text>')
    return _svg(parts, _HEIGHT + 44)


def _memory_key(solution: Solution) -> str:
    kinds = dict.fromkeys(placed.sharding_type for placed in solution.layout.values())
    return _key(
        [(_KIND_COLOURS[kind], f"weights, {kind}") for kind in kinds]
        + [(_STATE, "optimizer state"), (_ACTIVATIONS, "activations and caches"), (_RESERVED, "reserved for the rest")]
    )


def _time_picture(solution: Solution) -> str:
    top = 1.08 * max(cost.total_ms for cost in solution.ranks) or 1.0
    height = 170
    pitch = _WIDTH / len(solution.ranks)
    width = min(110.0, 0.86 * pitch)
    parts = [_axis(top, lambda value: f"{value:.3g} ms", height)]
    for rank, cost in enumerate(solution.ranks):
        below = 0.0
        for value, colour, name in (
            (cost.forward_ms, "#3b6fb6", "forward"),
            (cost.backward_ms, "#27497a", "backward"),
            (cost.communication_ms, "#c26a3a", "exchange"),
        ):
            y = _TOP + height - (below + value) / top * height
            parts.append(
                f'<rect x="{_LEFT + (rank + 0.5) * pitch - width / 2:.1f}" y="{y:.2f}" width="{width:.1f}" '
                f'height="{value / top * height:.2f}" fill="{colour}"><title>rank {rank}: {name} {value:.3f} ms</title>'
                "</rect>"
            )
            below += value
        if len(solution.ranks) <= 32:
            x = _LEFT + (rank + 0.5) * pitch
            parts.append(f'<text x="{x:.1f}" y="{_TOP + height + 16}" text-anchor="middle">{rank}</text>')
    if solution.lower_bound_ms:
        y = _TOP + height - solution.lower_bound_ms / top * height
        parts.append(
            f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#222" stroke-dasharray="5 4"/>'
        )
        parts.append(
            f'<text x="{_LEFT + _WIDTH}" y="{y - 4:.1f}" text-anchor="end" style="fill:#111">lower bound</text>'
        )
    return _svg(parts, height + 44)


def _sweep_picture(
    points: Sequence[SweepPoint], values: Sequence[float | None], unit: str, show: Callable[[float], str]
) -> str:
    height, colours = 240, list(_KIND_COLOURS.values())
    known = [value for value in values if value is not None]
    if not known:
        return "<p>The tables fit on none of these machines.</p>"
    top = 1.1 * max(known)
    devices = sorted({point.num_devices for point in points})
    batches = list(dict.fromkeys(point.batch_size_global for point in points))
    place = {n: _LEFT + (i + 0.5) * _WIDTH / len(devices) for i, n in enumerate(devices)}
    parts = [_axis(top, show, height)]
    for index, batch in enumerate(batches):
        colour = colours[index % len(colours)]
        line = [
            (place[point.num_devices], _TOP + height - value / top * height)
            for point, value in zip(points, values, strict=True)
            if point.batch_size_global == batch and value is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in line)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in line]
    fitting = {point.num_devices for point in points if point.solution}
    parts += [
        f'<text x="{x:.1f}" y="{_TOP + height + 16}" text-anchor="middle">{n} devices'
        f"{'' if n in fitting else ': too few'}</text>"
        for n, x in place.items()
    ]
    key = [(colours[i % len(colours)], f"{unit}, {batch:,} rows a step") for i, batch in enumerate(batches)]
    return _svg(parts, height + 44) + _key(key)


def _millions(value: float) -> str:
    return f"{value / 1e6:.3g} M"


def _share(point: SweepPoint) -> float | None:
    return point.solution.memory_fraction(point.solution.fullest_rank) if point.solution else None


def _axis(top: float, show: Callable[[float], str], height: int = _HEIGHT) -> str:
    lines = []
    for quarter in range(5):
        y = _TOP + height - quarter / 4 * height
        lines.append(f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e8ebef"/>')
        label = escape(show(top * quarter / 4))
        lines.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    return "".join(lines)


def _svg(parts: Sequence[str], height: int) -> str:
    return f'<svg viewBox="0 0 {_LEFT + _WIDTH + 10} {height}" role="img">{"".join(parts)}</svg>'


def _key(entries: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for colour, name in entries)
    return f'<div class="key">{items}</div>'
