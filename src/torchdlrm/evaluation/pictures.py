"""The pictures of an evaluation: what is kept of its predicted rows, and the charts that a page makes of that.

In: predicted rows.  Out: a few hundred numbers, which `dlrm evaluate` writes into RUN/evaluation/pictures/; of these,
later and without a prediction, charts.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from torchdlrm.html import COLOURS, Chart, Curve, bars, colour, curve_chart
from torchdlrm.judged import Judged
from torchdlrm.judging.curves import curves
from torchdlrm.metrics import METRICS
from torchdlrm.units import show_number

FOLDER = "pictures"  # in RUN/evaluation/, a file for each split
Picture = Mapping[str, Any]


def picture_of(judged: Judged) -> dict[str, Any]:
    """What is kept of predicted rows, as JSON has it: `curves`; empty where they have one class."""
    drawn = curves(judged)
    return {} if drawn is None else {"curves": asdict(drawn)}


def picture_charts(pictures: Mapping[str, Picture]) -> list[Chart]:
    """ROC and precision over recall, one curve for each picture; of each, reliability and how classes are predicted.

    Args:
        pictures: by the names of their splits, or of their runs; empty ones are left out.
    """
    known = {name: picture for name, picture in pictures.items() if picture}
    if not known:
        return []
    chance = Curve("chance", "var(--edge)", [(0.0, 0.0), (100.0, 100.0)])
    rate = next(iter(known.values()))["curves"]["click_rate"]
    precision = Curve("chance", "var(--edge)", [(0.0, 100 * rate), (100.0, 100 * rate)])
    charts = [
        _percent_chart("ROC", "false positive rate, %", "true positive rate, %", chance, known, "roc"),
        _percent_chart("precision and recall", "recall, %", "precision, %", precision, known, "precision_recall"),
    ]
    for name, picture in known.items():
        charts += [_distribution_chart(name, picture["curves"])]
    return charts


def _percent_chart(
    caption: str, x_name: str, y_name: str, chance: Curve, pictures: Mapping[str, Picture], key: str
) -> Chart:
    found = [
        Curve(name, colour(i), [(100 * x, 100 * y) for x, y in picture["curves"][key]])
        for i, (name, picture) in enumerate(pictures.items())
    ]
    return curve_chart(caption, [chance, *found], (0, 100), x_name, _whole, _both, y_name=y_name)


def _distribution_chart(name: str, drawn: Mapping[str, Any]) -> Chart:
    edges = drawn["edges"]
    middles = [(low + high) / 2 for low, high in pairwise(edges)]

    def curve(caption: str, shares: list[float], index: int) -> Curve:
        line = [(x, 100 * share) for x, share in zip(middles, shares, strict=True)]
        return Curve(caption, COLOURS[index], line, [(x, 0.0, y) for x, y in line])

    return curve_chart(
        f"how rows of {name} are predicted, by class",
        [curve("rows without a click", drawn["others"], 0), curve("rows with a click", drawn["clicked"], 1)],
        (edges[0], edges[-1]),
        "prediction, in steps of its log-odds",
        lambda logit: f"{100 / (1 + math.exp(-logit)):.2g} %",
        lambda logit, share: f"{share:.2f} % near {100 / (1 + math.exp(-logit)):.3g} %",
        y_name="of the rows of the class, %",
    )


def _whole(value: float) -> str:
    return f"{value:.0f}"


def _both(x: float, y: float) -> str:
    return f"{y:.2f} at {x:.2f}"


def difference_rows(found: Mapping[str, Any], metrics: Collection[str] = METRICS) -> list[dict[str, str]]:
    """A table of a comparison as its `as_json` has it: differences in these metrics, drawn with 0 in the middle."""
    rows = []
    for metric in metrics:
        pairs = {pair["name"]: pair["metrics"][metric] for pair in found["pairs"] if metric in pair["metrics"]}
        values, ends = ([pair[of] for pair in pairs.values()] for of in ("difference", "interval"))
        for (name, pair), bar in zip(pairs.items(), bars(values, ends, centred=True), strict=True):
            shown = [f"{value:+.5f}" for value in (pair["difference"], *pair["interval"])]
            rows.append(
                {"": name, "metric": METRICS[metric].label, "around 0": bar}
                | dict(zip(("difference", "from", "to"), shown, strict=True))
                | {"p": show_number(pair["p_value_corrected"], 4), "verdict": pair["verdict"]}
            )
    return rows
