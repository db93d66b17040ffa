"""Pictures as SVG: boxes and arrows, bars and curves, in colours that a page, dark or light, may set.

In: texts and numbers.  Out: a file that shows by itself as well as in a page. Pictures are 440 wide, so that their text
stays readable on a phone without scrolling.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import pairwise

WIDTH = 440
SERIES = ("s1", "s2", "s3", "s4", "s5")
_LIGHT = (
    "--ink:#1d2330;--soft:#566072;--grid:#d5dae1;--fill:#f1f4f8;--mark:#e4ecf7;"
    "--s1:#2f66b0;--s2:#b0612a;--s3:#2f855a;--s4:#7350a0;--s5:#a63f5b"
)
_DARK = (
    "--ink:#e6e9ef;--soft:#a9b3c2;--grid:#414856;--fill:#262b35;--mark:#2b3950;"
    "--s1:#83b4f3;--s2:#e3a571;--s3:#7bcf9f;--s4:#bda6e6;--s5:#ea90a8"
)
STYLE = f"""<style>
svg.drawing {{{_LIGHT}}}
@media (prefers-color-scheme: dark) {{svg.drawing {{{_DARK}}}}}
svg.drawing text {{font: 14px system-ui, sans-serif; fill: var(--ink)}}
svg.drawing text.small {{font-size: 12px; fill: var(--soft)}}
svg.drawing text.title {{font-weight: 600}}
svg.drawing .box {{fill: var(--fill); stroke: var(--soft); stroke-width: 1}}
svg.drawing .mark {{fill: var(--mark); stroke: var(--s1)}}
svg.drawing .frame {{fill: none; stroke: var(--grid); stroke-width: 1.5; stroke-dasharray: 5 4}}
svg.drawing .arrow {{fill: none; stroke: var(--soft); stroke-width: 1.6}}
svg.drawing .head {{fill: var(--soft)}}
svg.drawing .grid {{stroke: var(--grid); stroke-width: 1}}
</style>"""
# For the style sheet of the site: the page's own switch decides, whatever the system prefers.
SCHEMES = "".join(
    f'[data-md-color-scheme="{scheme}"] svg.drawing {{{colours}}}\n'
    for scheme, colours in (("default", _LIGHT), ("slate", _DARK))
)


class Drawing:
    """A picture that grows by its methods; lengths are in pixels, from the upper left corner."""

    def __init__(self, height: float, caption: str) -> None:
        self._height, self._caption = height, caption
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> None:
        """Write a line, whose baseline is at y."""
        end = "" if anchor == "start" else f' text-anchor="{anchor}"'
        name = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{x:g}" y="{y:g}"{name}{end}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, lines: Sequence[str], kind: str = "box") -> float:
        """Draw a box around a title and smaller lines; returns its lower edge."""
        height = 14 + 17 * len(lines)
        self.rectangle(x, y, width, height, kind)
        for place, line in enumerate(lines):
            self.text(x + width / 2, y + 20 + 17 * place, line, "small" if place else "title", "middle")
        return y + height

    def rectangle(self, x: float, y: float, width: float, height: float, kind: str = "box", colour: str = "") -> None:
        """Draw an area: a box, a marked one, a frame, or one in a colour of `SERIES`."""
        look = f'style="fill:var(--{colour})"' if colour else f'class="{"box " * (kind == "mark")}{kind}"'
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{2 if colour else 7}" {look}/>'
        )

    def arrow(self, *points: tuple[float, float], label: str = "", anchor: str = "start") -> None:
        """Draw a line through points, with a head at its end and words at the middle of its longest piece."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._parts.append(f'<polyline class="arrow" points="{path}"/>')
        (x0, y0), (x1, y1) = points[-2:]
        if x0 == x1:
            back = 8 if y1 > y0 else -8
            corners = f"{x1:g},{y1:g} {x1 - 5:g},{y1 - back:g} {x1 + 5:g},{y1 - back:g}"
        else:
            back = 8 if x1 > x0 else -8
            corners = f"{x1:g},{y1:g} {x1 - back:g},{y1 - 5:g} {x1 - back:g},{y1 + 5:g}"
        self._parts.append(f'<polygon class="head" points="{corners}"/>')
        if label:
            (xa, ya), (xb, yb) = max(pairwise(points), key=lambda ends: math.dist(*ends))
            beside = 8 if anchor == "start" else -8
            if xa == xb:
                self.text(xa + beside, (ya + yb) / 2 + 4, label, "small", anchor)
            else:
                self.text((xa + xb) / 2, ya - 6, label, "small", "middle")

    def line(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """Draw a thin line of a scale."""
        self._parts.append(f'<line class="grid" x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"/>')

    def curve(self, points: Sequence[tuple[float, float]], colour: str) -> None:
        """Join points, each with a dot."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<polyline points="{path}" style="fill:none;stroke:var(--{colour});stroke-width:2.2"/>')
        self._parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.2" style="fill:var(--{colour})"/>' for x, y in points]

    def coloured(self, x: float, y: float, text: str, colour: str) -> None:
        """Write a line in a colour of `SERIES`."""
        self._parts.append(
            f'<text x="{x:g}" y="{y:g}" style="fill:var(--{colour});font-weight:600">{escape(text)}</text>'
        )

    @property
    def svg(self) -> str:
        """The whole file."""
        parts = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" class="drawing" viewBox="0 0 {WIDTH} {self._height:g}" '
            f'role="img">\n<title>{escape(self._caption)}</title>\n{STYLE}\n{parts}\n</svg>\n'
        )
