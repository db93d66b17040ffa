"""Renders self-contained HTML pages and SVG charts: without scripts or external files, ready to mail or to print.

In: the parts of a page: headings, text, charts, tables; `templates/page.html` escapes every text.  Out: HTML.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from itertools import chain
from pathlib import Path
from typing import Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

from torchdlrm.errors import UserError
from torchdlrm.files import write_atomically

Cards = Iterable[tuple[str, str]]
COLOURS = ("#3b6fb6", "#b6703b", "#3f9464", "#7d5ba6", "#a63f5b")
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 14, 14, 30  # pixels around the area of a chart that is drawn in
# On a small screen a chart that is no wider has larger text (page.css). A wider one scrolls before its text, of 11
# pixels, shrinks below 10.
_NARROW, _SMALLEST_TEXT = 440, 10.1 / 11
_MAX_POINTS = 600  # more than the pixels of a chart: beyond it, every n-th point and the last
_MAX_DOTS = 40


@dataclass(frozen=True)
class Part:
    """A part of a page.

    Attributes:
        heading: of the part; none where it is empty.
        text: paragraphs.
        charts: side by side where there is room.
        rows: of a table, below the charts: mappings by column; a cell that is not there is empty.
        left: columns of text, as the first one is.
        wraps: whether cells break where they have spaces.
    """

    heading: str = ""
    text: Sequence[str] = ()
    charts: Sequence["Chart"] = ()
    rows: Sequence[Mapping[str, str]] = ()
    left: Collection[str] = ()
    wraps: bool = False


def render(title: str, parts: Iterable[Part], *, lead: str = "", command: str = "", entries: Cards = ()) -> str:
    """Make a page of the parts that have something to show.

    Below the title come a sentence, the command that made what it is about, and the most important values by name.
    """
    shown = [part for part in parts if part.text or part.charts or part.rows]
    page = _environment().get_template("page.html")
    return page.render(title=title, parts=shown, lead=lead, command=command, entries=list(entries))


def colour(index: int) -> str:
    """The colour of a curve by its number, of any number of curves."""
    return COLOURS[index] if index < len(COLOURS) else f"hsl({137 * index % 360} 45% 45%)"


def write_page(path: Path, page: str, argument: str) -> None:
    """Write a page, complete or not at all; a message calls it by the argument that it was given as.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"`{argument}`: cannot write {path}: {error.strerror}") from error


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("torchdlrm"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@dataclass
class Chart:
    """An SVG chart: the methods draw in the units of its axes, and `svg` is the result.

    Attributes:
        x_range: values at the left and at the right edge.
        y_range: values at the lower and at the upper edge.
        width: pixels between the left and the right edge.
        height: pixels between the lower and the upper edge.
        caption: what the chart shows, as text.
        x_name: what the values from left to right are.
        y_name: what those from the bottom to the top are, where the caption does not say it.
        key: colours and what they mean.
    """

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float
    height: float
    caption: str
    x_name: str
    y_name: str = ""
    key: list[tuple[str, str]] = field(default_factory=list)
    _parts: list[str] = field(default_factory=list)

    def x(self, value: float) -> float:
        """Return the pixels from the left."""
        low, high = self.x_range
        return _LEFT + (value - low) / (high - low or 1.0) * self.width

    def y(self, value: float) -> float:
        """Return the pixels from the top."""
        low, high = self.y_range
        return _TOP + (high - value) / (high - low or 1.0) * self.height

    def y_axis(self, show: Callable[[float], str]) -> None:
        """Draw horizontal lines at round values, with the values to their left."""
        for value in ticks(*self.y_range):
            if self.y_range[0] <= value <= self.y_range[1]:
                self.line(value, "grid")
                self._text(_LEFT - 7, self.y(value) + 4, show(value), 'text-anchor="end"')

    def line(self, y: float, kind: Literal["grid", "mark"], label: str = "") -> None:
        """Draw a horizontal line over the whole width, with a label above its end."""
        ends = f'x1="{_LEFT}" x2="{_LEFT + self.width}" y1="{self.y(y):.1f}" y2="{self.y(y):.1f}"'
        self._parts.append(f'<line {ends} class="{kind}"/>')
        if label:
            self._text(_LEFT + self.width, self.y(y) - 4, label, 'text-anchor="end" class="mark"')

    def x_label(self, x: float, text: str) -> None:
        """Write text below the chart; at its right edge none that would reach beyond it."""
        is_last = self.x(x) > _LEFT + self.width - _RIGHT
        place, anchor = (_LEFT + self.width + _RIGHT, "end") if is_last else (self.x(x), "middle")
        self._text(place, _TOP + self.height + 16, text, f'text-anchor="{anchor}" class="x"')

    def block(self, x: float, low: float, high: float, colour: str, title: str, label: str = "") -> None:
        """Draw a part of the column at x: its title shows when it is pointed at, its label where it has room."""
        pitch = self.width / (self.x_range[1] - self.x_range[0])
        width, height = min(110.0, 0.86 * pitch), self.y(low) - self.y(high)
        left, top = self.x(x) - width / 2, self.y(high)
        size = f'x="{left:.1f}" y="{top:.2f}" width="{width:.1f}" height="{max(height - 0.6, 0.2):.2f}"'
        self._parts.append(f'<rect {size} fill="{colour}"><title>{escape(title)}</title></rect>')
        if label and height > 12 and width > 6.2 * len(label):
            self._text(left + 5, top + height / 2 + 4, label, 'class="in"')

    def curve(
        self, points: Sequence[tuple[float, float]], colour: str, name: str, show: Callable[[float, float], str]
    ) -> None:
        """Join points by rising x with a line; where they are few, each tells its values when it is pointed at."""
        every = math.ceil(len(points) / _MAX_POINTS)
        drawn = [*points[:-1:every], *points[-1:]]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in drawn)
        self._parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.8" stroke-linejoin="round"/>'
        )
        for x, y in drawn if len(drawn) <= _MAX_DOTS else ():
            place = f'cx="{self.x(x):.1f}" cy="{self.y(y):.1f}" r="{3 if len(drawn) > 1 else 5}" fill="{colour}"'
            self._parts.append(f"<circle {place}><title>{escape(f'{name}: {show(x, y)}')}</title></circle>")
        self.key.append((colour, name))

    def note(self, x: float, y: float, text: str) -> None:
        """Write text beside a point, on the side where there is more room."""
        side, anchor = (-11, "end") if self.x(x) > _LEFT + self.width / 2 else (11, "start")
        self._text(self.x(x) + side, self.y(y) + 4, text, f'text-anchor="{anchor}" class="mark"')

    def band(self, points: Sequence[tuple[float, float, float]], colour: str) -> None:
        """Fill what lies between two values at each rising x, as an interval of confidence does."""
        every = math.ceil(len(points) / _MAX_POINTS)
        drawn = [*points[:-1:every], *points[-1:]]
        edge = [(x, low) for x, low, _ in drawn] + [(x, high) for x, _, high in reversed(drawn)]
        path = " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in edge)
        # The outline shows the interval of a single x too.
        self._parts.append(f'<polygon points="{path}" fill="{colour}" stroke="{colour}" class="band"/>')

    @property
    def is_wide(self) -> bool:
        """Whether it needs the width of the page."""
        return self.width > _NARROW

    @property
    def svg(self) -> str:
        """The chart as text that stands in a page; `key` is not in it."""
        width = _LEFT + self.width + _RIGHT
        size = f'viewBox="0 0 {width:g} {_TOP + self.height + _BOTTOM:g}"'
        if self.is_wide:
            size += f' style="min-width:{width * _SMALLEST_TEXT:.0f}px"'
        return f'<svg {size} role="img"><title>{escape(self.caption)}</title>{"".join(self._parts)}</svg>'

    def _text(self, x: float, y: float, text: str, style: str) -> None:
        self._parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>')


@dataclass(frozen=True)
class Curve:
    """A line of a chart.

    Attributes:
        name: what it shows.
        colour: as CSS has it.
        points: x and y, by rising x; at least one.
        band: x, low and high, of an interval around the line.
    """

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    band: Sequence[tuple[float, float, float]] = ()


def curve_chart(
    caption: str,
    curves: Sequence[Curve],
    x_range: tuple[float, float],
    x_name: str,
    show_x: Callable[[float], str],
    show: Callable[[float, float], str],
    y_of: Callable[[float], str] | None = None,
    mark: float | None = None,
    y_name: str = "",
) -> Chart:
    """Draw curves that share both axes; at least one.

    Args:
        caption: what the chart shows.
        curves: they fill the height of the chart.
        x_range: values at its left and its right edge, which stand for whole numbers.
        x_name: what they are.
        show_x: text below a round x.
        show: the values of a point, when it is pointed at.
        y_of: text next to a round y; a short number by default.
        mark: a y that should be near: it has a line, and the chart reaches a twentieth beyond it to both sides.
        y_name: what the y are, where the caption does not say it.
    """
    values = [y for curve in curves for _, y in curve.points]
    values += [y for curve in curves for _, *ends in curve.band for y in ends]
    values += [] if mark is None else [0.95 * mark, 1.05 * mark]
    edges = ticks(min(values), max(values))
    chart = Chart(x_range, (edges[0], edges[-1]), _NARROW, 190, caption, x_name, y_name)
    chart.y_axis(y_of or short)
    for x in ticks(*x_range, is_whole=True):
        if x_range[0] <= x <= x_range[1]:
            chart.x_label(x, show_x(x))
    if mark is not None:
        chart.line(mark, "mark")
    for curve in curves:
        if curve.band:
            chart.band(curve.band, curve.colour)
    for curve in curves:
        chart.curve(curve.points, curve.colour, curve.name, show)
    return chart


class Html(str):
    """A cell of a table that is HTML already."""

    __slots__ = ()

    def __html__(self) -> str:
        """What stands in the page."""
        return self


def bars(values: Sequence[float | None], intervals: Sequence[Sequence[float] | None] = ()) -> list[Html]:
    """Cells with bars from 0 to values, all on one scale, and intervals around their ends; None and NaN have none."""
    drawn = [math.nan if value is None else value for value in values]
    ends = [pair or (math.nan, math.nan) for pair in intervals or [None] * len(values)]
    known = [value for value in (0.0, *drawn, *chain(*ends)) if math.isfinite(value)]
    low, high = min(known), max(known)

    def span(tag: str, start: float, end: float) -> str:
        left, width = (100 * length / (high - low or 1.0) for length in (start - low, end - start))
        return f'<{tag} style="left:{left:.1f}%;width:{width:.1f}%"></{tag}>' if start <= end else ""

    return [
        Html(f'<div class="bar">{span("s", 0, 0)}{span("i", min(0, value), max(0, value))}{span("u", *pair)}</div>')
        for value, pair in zip(drawn, ends, strict=True)
    ]


def ticks(low: float, high: float, *, is_whole: bool = False) -> list[float]:
    """Round numbers at equal distances, about five, from at most `low` to at least `high`; or whole ones."""
    rough = (high - low) / 4 or max(abs(high), 1.0) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    steps = [factor * unit for factor in (1, 2, 2.5, 5, 10, 20) if not is_whole or factor * unit % 1 == 0] or [1.0]
    step = next(step for step in steps if step >= rough * (0.7 if is_whole else 0.999))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [step * number for number in range(first, max(last, first + 1) + 1)]


def short(value: float) -> str:
    """A number as an axis shows it: 250k, 1.5M, 0.775."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"
