"""Writes a sweep as one HTML page: the values that were tried, which of them mattered, and what each trial cost."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

from optuna.distributions import CategoricalDistribution

from torchdlrm.html import COLOURS, Chart, Curve, Part, bars, curve_chart, render, short
from torchdlrm.sweeping.space import Distribution, Space

_KEY = {"the best": COLOURS[1], "complete": "#8fb0dc", "pruned": "#8a909966"}


def sweep_page(title: str, space: Space, result: Mapping[str, Any]) -> str:
    """Make the page of what `sweep` has found."""
    metric, shares = result["metric"], result["importance"]
    names = [*space.values, metric]
    drawn = [trial | {"state": "the best"} if trial["trial"] == result["best"] else trial for trial in result["trials"]]
    drawn = [trial for trial in drawn if trial[metric] is not None]
    drawn.sort(key=lambda trial: [*_KEY].index(trial["state"]), reverse=True)  # the best above the others
    low, high = (end(trial[metric] for trial in drawn) for end in (min, max))
    tried = Chart((0, len(names) - 1), (0, 1), 440, 190, "each trial", "keys, as numbered below", "lowest to highest")
    for trial in drawn:
        places = [_place(space.values[key], trial[key]) for key in space.values]
        points = [*enumerate([*places, (trial[metric] - low) / (high - low or 1.0)])]
        cells = trial_cells(trial)
        about = ", ".join(f"{name} {cells[name]}" for name in names)
        tried.curve(points, _KEY[trial["state"]], f"trial {trial['trial']}", partial("{}".format, about))
    for number in range(len(names)):
        tried.x_label(number, str(number + 1))
    cost = curve_chart(
        f"{metric} on val, and what it cost",
        [Curve(f"trial {t['trial']}", _KEY[t["state"]], [(t["seconds"], t[metric])]) for t in drawn],
        (0, max(trial["seconds"] for trial in drawn)),
        "seconds from its begin to its end",
        short,
        lambda seconds, value: f"{value:.5f}, {seconds:.1f} s",
    )
    cost.key = [(colour, name) for name, colour in _KEY.items()]
    tried.key = [*cost.key, *(("transparent", f"{number}: {name}") for number, name in enumerate(names, 1))]
    mattered = [
        {"key": key, "importance": f"{shares[key]:.0%}", "": bar}
        for key, bar in zip(shares, bars([*shares.values()]), strict=True)
    ]
    heads = ["trial", "state", metric, "seconds", *(str(number) for number in range(1, len(names)))]
    rows = [dict(zip(heads, trial_cells(trial).values(), strict=True)) for trial in result["trials"]]
    parts = [
        Part(charts=[tried, cost]),
        Part("What mattered", rows=mattered),
        Part("With other seeds", rows=repeated_rows(result)),
        Part("Trials", ["Columns with numbers are the keys numbered above."], rows=rows, left=heads[1:2], wraps=True),
    ]
    return render(title, parts, lead=result["verdict"])


def trial_cells(trial: Mapping[str, Any]) -> dict[str, str]:
    """A trial as text by column."""
    return {key: f"{value:.5g}" if isinstance(value, float) else str(value) for key, value in trial.items()}


def repeated_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The metric of each repetition of the best trials, and of the config as it was, as text by column."""
    return [
        {f"{result['metric']} on val": name} | {f"run {run}": f"{value:.5f}" for run, value in enumerate(values, 1)}
        for name, values in result["repeated"].items()
    ]


def _place(values: Distribution, value: Any) -> float:
    """Where a value lies between the first, 0, and the last, 1."""
    if isinstance(values, CategoricalDistribution):
        return values.choices.index(value) / max(1, len(values.choices) - 1)
    low, high, at = (math.log(number) if values.log else number for number in (values.low, values.high, value))
    return float((at - low) / (high - low or 1))
