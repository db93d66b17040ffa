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
from torchdlrm.judging.reliability import ReliabilityBin, reliability
from torchdlrm.metrics import METRICS
from torchdlrm.units import show_number, show_p_value

FOLDER = "pictures"  # in RUN/evaluation/, a file for each split


def picture_of(judged: Judged) -> dict[str, Any]:
    """What is kept of predicted rows, as JSON has it: `curves` and `reliability`; empty where they have one class."""
    drawn = curves(judged)
    return {} if drawn is None else {"curves": asdict(drawn), "reliability": asdict(reliability(judged))}


def picture_charts(pictures: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """ROC and precision over recall, a curve for each picture; of each, reliability and how classes are predicted.

    Args:
        pictures: by what they are of, as the names of splits; empty ones are left out.
    """
    known = {name: picture for name, picture in pictures.items() if picture}
    roc, found = [], []
    for i, (name, picture) in enumerate(known.items()):
        rate, points = picture["curves"]["click_rate"], picture["curves"]["roc"]
        precision = [(100 * y, 100 * rate * y / (rate * y + (1 - rate) * x)) for x, y in points if y]
        roc.append(Curve(name, colour(i), [(100 * x, 100 * y) for x, y in points]))
        found.append(Curve(name, colour(i), precision))
    if not known:
        return []
    chance = [
        Curve("by chance", "var(--edge)", line) for line in ([(0, 0), (100, 100)], [(0, 100 * rate), (100, 100 * rate)])
    ]
    charts = [
        _percents("ROC", [chance[0], *roc], "false positive rate, %", "true positive rate, %"),
        _percents("precision and recall", [chance[1], *found], "recall, %", "precision, %"),
    ]
    for name, picture in known.items():
        charts += [_reliability(name, picture["reliability"]), _distribution(name, picture["curves"])]
    return charts


def _percents(caption: str, curves: list[Curve], x_name: str, y_name: str, top: float = 100.0) -> Chart:
    return curve_chart(caption, curves, (0, top), x_name, "{:.0f}".format, "{1:.2f} at {0:.2f}".format, y_name=y_name)


def _reliability(name: str, found: Mapping[str, Any]) -> Chart:
    bins = [ReliabilityBin(*each) for each in found["bins"]]
    top = max(max(each.prediction, each.high) for each in bins)
    scale, unit = (100, "%") if top >= 0.04 else (10_000, "in 10,000")  # axes have whole numbers
    line = [(scale * each.prediction, scale * each.click_rate) for each in bins]
    band = [(scale * each.prediction, scale * each.low, scale * each.high) for each in bins]
    error, _, low, high = map(show_number, found["error"])
    return _percents(
        f"reliability, {name}: calibration error {error} ({low} to {high}), by chance {found['by_chance']:.5f}",
        [
            Curve("calibrated", "var(--edge)", [(0, 0), (scale * top, scale * top)]),
            Curve("bins of as many rows, with their intervals", COLOURS[0], line, band),
        ],
        f"mean prediction, {unit}",
        f"click rate, {unit}",
        scale * top,
    )


def _distribution(name: str, drawn: Mapping[str, Any]) -> Chart:
    middles = [(low + high) / 2 for low, high in pairwise(drawn["edges"])]
    classes = {"rows without a click": drawn["others"], "rows with a click": drawn["clicked"]}
    curves = []
    for (caption, shares), of_class in zip(classes.items(), COLOURS, strict=False):
        line = [(x, 100 * share) for x, share in zip(middles, shares, strict=True)]
        curves.append(Curve(caption, of_class, line, [(x, 0.0, y) for x, y in line]))
    return curve_chart(
        f"predictions by class, {name}",
        curves,
        (drawn["edges"][0], drawn["edges"][-1]),
        "prediction, in steps of its log-odds",
        lambda logit: f"{100 / (1 + math.exp(-logit)):.2g} %",
        lambda logit, share: f"{share:.2f} % near {100 / (1 + math.exp(-logit)):.3g} %",
        y_name="of the rows of the class, %",
    )


def difference_rows(found: Mapping[str, Any], metrics: Collection[str] = METRICS) -> list[dict[str, str]]:
    """A table of a comparison as its `as_json` has it: differences in these metrics, drawn from 0."""
    rows = []
    for metric in metrics:
        pairs = {pair["name"]: pair["metrics"][metric] for pair in found["pairs"] if metric in pair["metrics"]}
        values, ends = ([pair[of] for pair in pairs.values()] for of in ("difference", "interval"))
        for (name, pair), bar in zip(pairs.items(), bars(values, ends), strict=True):
            shown = [f"{value:+.5f}" for value in (pair["difference"], *pair["interval"])]
            rows.append(
                {"": name, "metric": METRICS[metric].label, "from 0": bar}
                | dict(zip(("difference", "from", "to"), shown, strict=True))
                | {"p": show_p_value(pair["p_value_corrected"]), "verdict": pair["verdict"]}
            )
    return rows
