"""Metrics over the rows seen, as an SVG chart.

In: named series of (rows, value).  Out: SVG text that stands in a page without scripts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_COLOURS = ("#8fb0dc", "#b0521c", "#3f9464", "#7d5ba6")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 520, 240, 62, 14, 8, 38
_MAX_POINTS = 600  # more than the pixels of a chart: beyond it, every n-th point and the last


@dataclass(frozen=True)
class Curve:
    """A series: its name and its points, (rows, value), by rising rows."""

    name: str
    points: Sequence[tuple[float, float]]


def curve_chart(curves: Sequence[Curve], title: str) -> str:
    """A chart of curves that share both axes; the title is for those who cannot see it.

    Args:
        curves: at least one, none of them empty.
        title: text, not HTML.
    """
    rows = [x for curve in curves for x, _ in curve.points]
    values = [y for curve in curves for _, y in curve.points]
    x_ticks, y_ticks = ticks(0, max(rows)), ticks(min(values), max(values))
    place_x = _scale(0, max(rows), _LEFT, _WIDTH - _RIGHT)
    place_y = _scale(y_ticks[0], y_ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = [f"<title>{escape(title)} over rows seen</title>"]
    for value in y_ticks:
        y = place_y(value)
        parts.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#e8ebef"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short(value)}</text>')
    below = f'y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle"'
    parts += [f'<text x="{place_x(x):.1f}" {below}>{short(x)}</text>' for x in x_ticks if x <= max(rows)]
    parts.append(f'<text x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 5}" text-anchor="middle">rows</text>')
    for curve, colour in zip(curves, _COLOURS, strict=False):
        parts += _drawn(curve, colour, place_x, place_y)
    entries = "".join(
        f'<span><i style="background:{colour}"></i>{escape(curve.name)}</span>'
        for curve, colour in zip(curves, _COLOURS, strict=False)
    )
    return f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img">{"".join(parts)}</svg><div class="key">{entries}</div>'


def ticks(low: float, high: float) -> list[float]:
    """Round numbers at equal distances, about five, from at most `low` to at least `high`."""
    rough = (high - low) / 4 or max(abs(high), 1.0) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 250k, 1.5M, 0.775."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _drawn(
    curve: Curve, colour: str, place_x: Callable[[float], float], place_y: Callable[[float], float]
) -> list[str]:
    every = math.ceil(len(curve.points) / _MAX_POINTS)
    points = [*curve.points[:-1:every], curve.points[-1]]
    path = " ".join(f"{place_x(x):.1f},{place_y(y):.1f}" for x, y in points)
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>']
    if len(points) <= 40:
        parts += [
            f'<circle cx="{place_x(x):.1f}" cy="{place_y(y):.1f}" r="3" fill="{colour}">'
            f"<title>{escape(curve.name)}: {y:.5g} at {x:,.0f} rows</title></circle>"
            for x, y in points
        ]
    return parts


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - low) / (high - low or 1.0) * (end - start)
