"""The plots of the pages, made of the JSON that benchmarks have written into docs/performance/.

In: docs/performance/*.json, each with the command that wrote it and the processor.  Out: an SVG for each.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from website.drawing import SERIES, WIDTH, Drawing

_MEASURED = Path(__file__).parents[1] / "docs" / "performance"
_LEFT, _RIGHT = 52, 96  # pixels beside a plot, for the labels of its axis and the names of its curves


def bars(title: str, unit: str, rows: Sequence[tuple[str, float]], note: str) -> str:
    """Horizontal bars from 0: a name above each, its value at its end; the first is ours."""
    d = Drawing(64 + 42 * len(rows), f"{title}, {unit}")
    d.text(0, 16, title, "title")
    d.text(0, 34, unit, "small")
    longest = max(value for _, value in rows)
    for place, (name, value) in enumerate(rows):
        y = 58 + 42 * place
        d.text(0, y, name)
        d.rectangle(
            0,
            y + 6,
            max(2, (WIDTH - 76) * value / longest),
            15,
            colour=SERIES[0 if name.startswith(("torchdlrm", "dlrm")) else 1],
        )
        d.text((WIDTH - 76) * value / longest + 7, y + 18, _shown(value), "title")
    d.text(0, 64 + 42 * len(rows) - 4, note, "small")
    return d.svg


def curves(
    title: str, units: tuple[str, str], xs: Sequence[str], lines: Mapping[str, Sequence[float]], note: str
) -> str:
    """Curves over days or the like, named at their ends."""
    d = Drawing(322, title)
    d.text(0, 16, title, "title")
    d.text(0, 34, units[1], "small")
    values = [value for line in lines.values() for value in line]
    step = _round_step((max(values) - min(values)) / 4)
    decimals = max(0, -math.floor(math.log10(step)))
    low, high = math.floor(min(values) / step) * step, math.ceil(max(values) / step) * step
    right, top, bottom = WIDTH - _RIGHT, 48, 262

    def y_of(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    for tick in range(round((high - low) / step) + 1):
        value = low + tick * step
        d.line(_LEFT, y_of(value), right, y_of(value))
        d.text(_LEFT - 7, y_of(value) + 4, f"{value:.{decimals}f}", "small", "end")
    places = [_LEFT + (right - _LEFT) * number / (len(xs) - 1) for number in range(len(xs))]
    for x, name in zip(places, xs, strict=True):
        d.text(x, bottom + 18, name, "small", "middle")
    d.text((_LEFT + right) / 2, bottom + 36, units[0], "small", "middle")
    ends = _apart({name: y_of(line[-1]) for name, line in lines.items()})
    for colour, (name, line) in zip(SERIES, lines.items(), strict=False):
        d.curve([(x, y_of(value)) for x, value in zip(places, line, strict=True)], colour)
        d.coloured(right + 9, ends[name] + 4, name, colour)
    d.text(0, 318, note, "small")
    return d.svg


def live() -> str:
    """AUC by day: docs/performance/live.json is what `dlrm quickstart --live --json` printed."""
    data = measured("live")["measured"]
    lines = {name: [day["auc"] for day in data["scores"][name]] for name in ("live", "scratch", "frozen")}
    lines["attainable"] = data["attainable"]
    days = [str(int(day.split()[-1])) for day in data["days"]]
    return curves("AUC of each day, predicted before it was learnt", ("day", "AUC"), days, lines, _note("live"))


def preprocess() -> str:
    """Rows for a second of processor time, which other programs of a busy machine do not change much."""
    data = measured("preprocess")["measured"]

    upstream_rows = round(data["upstream_rows_per_s"] * min(turn["upstream"]["seconds"] for turn in data["rounds"]))

    def rate(name: str, rows: int) -> float:
        return rows / min(turn[name]["cpu_seconds"] for turn in data["rounds"])

    rows = [
        ("dlrm preprocess, the whole command", rate("dlrm", data["rows"])),
        ("upstream's BinaryCriteoUtils", rate("upstream", upstream_rows)),
    ]
    return bars("From text to a dataset", "rows for each second of processor time", rows, _note("preprocess"))


def step() -> str:
    """Rows/s of a training step of the paper's model."""
    data = measured("step")["measured"]
    rows = [
        ("torchdlrm", data["rows_per_s"]),
        ("plain torch loop, float32", data["plain_torch_rows_per_s"]),
        ("plain TorchRec, float32", data["torchrec_rows_per_s"]),
    ]
    title = f"A training step, batch of {data['batch_size_global']:,} rows"
    return bars(title, f"rows/s; ours in {data['precision'].split()[0]}", rows, _note("step"))


def predict() -> str:
    """Rows/s of predictions of encoded rows."""
    data = measured("predict")["measured"]["rows_per_s"]
    rows = [
        ("torchdlrm, int8 tables, bfloat16 products", data["served, int8 tables, bfloat16 products"]),
        ("torchdlrm, float32", data["served, float32 tables, float32 products"]),
        ("TorchRec, int8 (quantised)", data["TorchRec quantized, int8"]),
        ("TorchRec, float32 (eager)", data["TorchRec eager, float32"]),
    ]
    return bars("Predictions of encoded rows, batches of 2,048", "rows/s", rows, _note("predict"))


def measured(name: str) -> dict[str, Any]:
    """A file of docs/performance/: `command`, `processor`, `date`, and in `measured` what the benchmark wrote."""
    kept: dict[str, Any] = json.loads((_MEASURED / f"{name}.json").read_text())
    return kept


def _note(name: str) -> str:
    kept = measured(name)
    return f"{kept['processor']}, {kept['date']}"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _round_step(rough: float) -> float:
    unit = 10.0 ** math.floor(math.log10(rough))
    return next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)


def _apart(places: dict[str, float], least: float = 16) -> dict[str, float]:
    """Heights of names, moved down where two would lie on each other."""
    moved: dict[str, float] = {}
    last = -math.inf
    for name, y in sorted(places.items(), key=lambda place: place[1]):
        last = moved[name] = max(y, last + least)
    return moved


CHARTS: dict[str, Callable[[], str]] = {"live": live, "preprocess": preprocess, "step": step, "predict": predict}
