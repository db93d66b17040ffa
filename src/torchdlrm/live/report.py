"""Writes a live model as one self-contained HTML page: how good it was, what came and went, what was published.

In: the records of its periods.  Out: HTML, in the style of a run's page: no scripts, nothing fetched.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePath
from statistics import fmean, median
from typing import Any, get_args

from torchdlrm.html import COLOURS, Chart, Curve, Part, curve_chart, render, short
from torchdlrm.live.record import PeriodRecord, StepName, StepTime
from torchdlrm.metrics import BEST, LOSS, METRICS, Metric, metrics_in
from torchdlrm.units import show_bytes, show_number

Times = Mapping[int, Mapping[StepName, StepTime]]  # by period

_STEP_COLOURS = dict(zip(get_args(StepName), (*COLOURS, "#8a8f98"), strict=True))
_ROWS = {"known": "rows of known values", "unseen": "rows with an unknown value", "all": "all rows"}
_SIZES = {"num_embeddings": "rows of their tables", "values_in_use": "values that have an id"}
_CHANGES = {"admitted": "admitted: were given an id", "expired": "expired: lost their id"}
_HOW = (
    "By the model that was current, which had not seen the log. The band is the interval of 95 % of the AUC of all "
    "rows. A value is unknown if it had no id: it was never seen, or was too rare."
)
_RECENT = 7  # periods of which a mean is shown: a week of days
_MAX_FEATURES = 4  # that have a curve of their own
_MAX_BLOCKS = 60  # periods whose steps are drawn


def report_page(title: str, periods: Sequence[PeriodRecord], times: Times, current: int | None) -> str:
    """Make the page of a live model.

    Args:
        title: of the page.
        periods: by rising number.
        times: what the steps of each took, where that is known.
        current: the period whose bundle is `current`.
    """
    if not periods:
        return render(title, [Part(text=["No period is complete yet."])])
    progressive = _drawn(_progressive(periods, metric) for metric in metrics_in("table") if metric.name != LOSS)
    failures = [
        f"Period {record.period} did not pass: {'; '.join(record.gate.reasons)}."
        for record in reversed(periods)
        if not record.gate.passed
    ]
    maps = (periods[-1].recalibration or "").split("; ")
    recalibrated = [f"Recalibration in period {periods[-1].period}: {how}." for how in maps if how]
    values = [
        _unseen(periods),
        _vocabularies("size of all vocabularies", periods, _SIZES),
        # Not of the first period, to which all values are new: next to it, the others would be nothing.
        _vocabularies("values that came and went", periods[1:], _CHANGES),
    ]
    cost = _drawn([_seconds(periods, times), _published_bytes(periods)])
    whose = periods[-1].label and f", {periods[-1].label}"
    rows = [_period(record, times.get(record.period, {}), current) for record in reversed(periods)]
    parts = [
        Part(
            f"How well each log was predicted before it was learnt from, by period{whose}",
            [_HOW if progressive else "Nothing yet: the first period has no model before it."],
            progressive,
        ),
        Part("The gate, by period", [*(failures or ["All periods passed."]), *recalibrated], _drawn(_gates(periods))),
        Part("Values that come and go, by period", charts=_drawn(values), rows=_features(periods)),
        Part("Time and size, by period", charts=cost, rows=_steps(periods, times)),
        Part(f"All periods{whose}", rows=rows, left=("log", "published")),
    ]
    return render(title, parts, entries=_cards(periods, current))


def _cards(periods: Sequence[PeriodRecord], current: int | None) -> Iterator[tuple[str, str]]:
    """Yield the most important values, each with its name."""
    if current is not None:
        yield "current: the period of the model that is served", str(current)
    yield "periods", f"{len(periods):,}"
    yield "rows in all logs", f"{sum(record.rows for record in periods):,}"
    judged = [(record.period, metrics) for record in periods if (metrics := _metrics(record))]
    if judged:
        period, metrics = judged[-1]
        whose = periods[-1].label and f", {periods[-1].label}"
        best, recent = METRICS[BEST], [value for _, each in judged if (value := each.get(BEST)) is not None][-_RECENT:]
        yield f"{best.label} of period {period}, before learning from it{whose}", _shown(metrics, best)
        if len(recent) > 1:
            yield f"mean {best.label} of the last {len(recent)} periods{whose}", show_number(fmean(recent), best.digits)
        for metric in metrics_in("table"):
            if metric.target is not None:
                yield f"{metric.label} of period {period}{whose}", _shown(metrics, metric)
        for label, others in _metrics(periods[-1], "labels").items():
            yield f"{best.label} of period {periods[-1].period}, before learning from it, {label}", _shown(others, best)
    failed = sum(not record.gate.passed for record in periods)
    if failed:
        yield "periods that did not pass the gate", f"{failed:,}"


def _metrics(record: PeriodRecord, rows: str = "all") -> Mapping[str, Any]:
    """What is known of rows of a log before it was learnt from, or of its other `labels`; empty where nothing is."""
    return getattr(record.progressive, rows, None) or {}


def _shown(metrics: Mapping[str, Any], metric: Metric, end: str = "") -> str:
    """A metric as text, or an end of its interval."""
    return show_number(metrics.get(metric.name + end), metric.digits)


def _drawn(charts: Iterable[Chart | None]) -> list[Chart]:
    return [chart for chart in charts if chart is not None]


def _chart(
    caption: str,
    periods: Sequence[PeriodRecord],
    curves: Mapping[str, Sequence[float | None]],
    band: Sequence[tuple[float, float, float]] = (),
    show: Callable[[float], str] = short,
    mark: float | None = None,
) -> Chart | None:
    """Draw a curve of each name, with a value for each period where it has one; None where there is none at all.

    Args:
        caption: what the chart shows.
        periods: the records.
        curves: by name.
        band: around the last one, which is on top.
        show: a value, next to the axis.
        mark: a value that should be near.
    """
    drawn: list[Curve] = []
    last = [*curves][-1]
    for (name, values), colour in zip(curves.items(), COLOURS, strict=False):
        of_records = zip(periods, values, strict=True)
        points = [(record.period, value) for record, value in of_records if value is not None]
        if points:
            drawn.append(Curve(name, colour, points, band if name == last else ()))
    if not drawn:
        return None
    return curve_chart(
        caption,
        drawn,
        (periods[0].period - 0.5, periods[-1].period + 0.5),
        "period",
        lambda period: f"{period:.0f}",
        lambda period, value: f"{f'{value:.5g}' if show is short else show(value)} in period {period:.0f}",
        show,
        mark,
    )


def _progressive(periods: Sequence[PeriodRecord], metric: Metric) -> Chart | None:
    judged = {name: [_metrics(record, rows) for record in periods] for rows, name in _ROWS.items()}
    curves = {name: [metrics.get(metric.name) for metrics in found] for name, found in judged.items()}
    interval = [
        (record.period, low, high)
        for record, found in zip(periods, judged[_ROWS["all"]], strict=True)
        if (low := found.get(f"{metric.name}_low")) is not None
        if (high := found.get(f"{metric.name}_high")) is not None
    ]
    return _chart(metric.caption, periods, curves, interval, mark=metric.target)


def _gates(periods: Sequence[PeriodRecord]) -> Iterator[Chart | None]:
    for label in (periods[-1].label, *periods[-1].gate.labels):
        gates = [record.gate.labels.get(label, record.gate) for record in periods]
        curves = {
            "the previous model": [(gate.old or {}).get(LOSS) for gate in gates],
            "the new model": [gate.new.get(LOSS) for gate in gates],
        }
        yield _chart(f"{METRICS[LOSS].caption}, of the rows held back{label and f', {label}'}", periods, curves)


def _unseen(periods: Sequence[PeriodRecord]) -> Chart | None:
    features = {name: [record.features[name].unseen_fraction for record in periods] for name in periods[-1].features}
    most = sorted(features, key=lambda name: -(_percent(features[name]) or 0.0))[:_MAX_FEATURES]
    curves = {name: [_percent([fraction]) for fraction in features[name]] for name in most}
    mean = [_mean_unseen_percent(record) for record in periods]
    return _chart("unknown values, % of all values of a log", periods, {"all features": mean} | curves)


def _mean_unseen_percent(record: PeriodRecord) -> float | None:
    return _percent(feature.unseen_fraction for feature in record.features.values())


def _percent(fractions: Iterable[float | None]) -> float | None:
    """The mean of those that are known."""
    known = [fraction for fraction in fractions if fraction is not None]
    return 100 * fmean(known) if known else None


def _vocabularies(caption: str, periods: Sequence[PeriodRecord], names: Mapping[str, str]) -> Chart | None:
    curves = {shown: [_sum(record, name) for record in periods] for name, shown in names.items()}
    return _chart(caption, periods, curves, show=lambda number: show_number(number, 0))


def _sum(record: PeriodRecord, name: str) -> int | None:
    """Over the features that have a vocabulary; None where there are none."""
    features = [feature for feature in record.features.values() if feature.values_in_use is not None]
    return sum(getattr(feature, name) for feature in features) if features else None


def _seconds(periods: Sequence[PeriodRecord], times: Times) -> Chart | None:
    drawn = [record.period for record in periods if times.get(record.period)][-_MAX_BLOCKS:]
    if not drawn:
        return None
    top_s = 1.05 * max(sum(step.seconds for step in times[period].values()) for period in drawn)
    of_last = f", last {_MAX_BLOCKS} periods" if len(drawn) < len(periods) else ""
    chart = Chart((drawn[0] - 0.5, drawn[-1] + 0.5), (0, top_s), 440, 190, f"seconds of each step{of_last}", "period")
    chart.y_axis(short)
    for period in drawn[:: -(-len(drawn) // 8)]:
        chart.x_label(period, str(period))
    for period in drawn:
        below_s = 0.0
        for name, step in times[period].items():
            end_s = below_s + step.seconds
            chart.block(period, below_s, end_s, _STEP_COLOURS[name], f"period {period}: {name} {step.seconds:,.1f} s")
            below_s = end_s
    chart.key += [(colour, name) for name, colour in _STEP_COLOURS.items()]
    return chart


def _published_bytes(periods: Sequence[PeriodRecord]) -> Chart | None:
    curves: dict[str, list[float | None]] = {
        "bundle": [record.bundle_bytes for record in periods],
        "delta": [record.delta_bytes for record in periods],
    }
    return _chart("size of what is published", periods, curves, show=show_bytes)


def _period(record: PeriodRecord, steps: Mapping[StepName, StepTime], current: int | None) -> dict[str, str]:
    """A line of the table of all periods."""
    metrics, best, loss = _metrics(record), METRICS[BEST], METRICS[LOSS]
    shown: dict[str, str] = {}
    for metric in metrics_in("table"):
        shown[metric.label] = _shown(metrics, metric)
        if metric.name == BEST:
            shown |= {"from": _shown(metrics, metric, "_low"), "to": _shown(metrics, metric, "_high")}
    names = [PurePath(log.path).name for log in record.logs]
    return {
        "period": str(record.period),
        "log": f"{names[0]} and {len(names) - 1:,} more" if len(names) > 1 else "".join(names),
        "published": "current" if record.period == current else "yes" if record.published else "no",
        "base": "-" if record.base is None else str(record.base),
        "rows": f"{record.rows:,}",
        "click rate": show_number(record.clicks / record.rows if record.rows else None, 4),
        **shown,
        **{f"{best.label} {label}": _shown(of, best) for label, of in _metrics(record, "labels").items()},
        "unknown %": show_number(_mean_unseen_percent(record), 2),
        "gate: before": _shown(record.gate.old or {}, loss),
        "gate: after": _shown(record.gate.new, loss),
        "bundle": show_bytes(record.bundle_bytes),
        "delta": "-" if record.delta_bytes is None else show_bytes(record.delta_bytes),
        "seconds": show_number(sum(step.seconds for step in steps.values()) if steps else None, 1),
    }


def _features(periods: Sequence[PeriodRecord]) -> list[dict[str, str]]:
    """The sparse features in the newest period, and over all of them."""
    rows = []
    for name, newest in periods[-1].features.items():
        records = [record.features[name] for record in periods]
        rows.append(
            {
                "feature": name,
                "table rows": show_number(newest.num_embeddings, 0),
                "values with an id": show_number(newest.values_in_use, 0),
                "admitted, last": show_number(newest.admitted, 0),
                "admitted in all": show_number(sum(record.admitted for record in records), 0),
                "expired, last": show_number(newest.expired, 0),
                "expired in all": show_number(sum(record.expired for record in records), 0),
                "unknown %, last": show_number(_percent([newest.unseen_fraction]), 2),
                "unknown %, mean": show_number(_percent(record.unseen_fraction for record in records), 2),
            }
        )
    return rows


def _steps(periods: Sequence[PeriodRecord], times: Times) -> list[dict[str, str]]:
    """What each step took and wrote, in the newest period and in the median."""
    rows = []
    for name in _STEP_COLOURS:
        found = [times[record.period][name] for record in periods if name in times.get(record.period, {})]
        if found:
            rows.append(
                {
                    "step": name,
                    "seconds, last": show_number(found[-1].seconds, 1),
                    "seconds, median": show_number(median(step.seconds for step in found), 1),
                    "written, last": show_bytes(found[-1].bytes),
                    "written, median": show_bytes(median(step.bytes for step in found)),
                }
            )
    return rows
