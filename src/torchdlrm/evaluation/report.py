"""Writes a run, or several, as one self-contained HTML page: how they learnt, how good they are, what they are made of.

In: the folders of runs, also of those that are still training.  Out: HTML, in the style of a plan's page: no scripts,
nothing fetched, to be mailed, printed, and kept with the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain, pairwise
from typing import Any

from torchdlrm.config import Config, setting_values
from torchdlrm.errors import RunError, TorchDLRMError
from torchdlrm.evaluation.compare import compare
from torchdlrm.evaluation.pictures import FOLDER, difference_rows, picture_charts
from torchdlrm.html import Chart, Curve, Part, bars, colour, curve_chart, render, short
from torchdlrm.judging.slices import slice_table
from torchdlrm.metrics import BEST, LOSS, METRICS, metrics_in, metrics_of_any
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.plan_json import read_plan
from torchdlrm.training.log import read_metrics
from torchdlrm.training.run import METRICS_NAME, PLAN_NAME, Run
from torchdlrm.training.source_run import SourceRun
from torchdlrm.training.step_profile import read_profiles
from torchdlrm.units import show_bytes, show_duration, show_number

Line = Mapping[str, Any]
_COLOURS = {"train": "#8fb0dc", "val": "#b0521c"}
_MOST_SLICES = 40
_PERMUTED = "How much worse the model predicts where a feature has the values of other rows (permutation importance)."
_NOT_EVALUATED = "None yet: `dlrm evaluate RUN` judges every row of a split, and then its pictures are here."


def report_page(run: Run) -> str:
    """Make the page of a run; parts that the run does not have yet are left out or say so.

    Raises:
        RunError: a part is damaged.
    """
    lines, environment = read_metrics(run.path / METRICS_NAME), run.environment
    changed = _differing({"value": setting_values(run.config), "default": setting_values(Config())})
    machine = [
        {"": name, "at the start": _text(value)}
        for name, value in environment.items()
        if name not in {"dataset", "warm_start", "started", "command"} and value != []
    ]
    whose = (first := run.config.train.first_of_several) and f", {first}"
    source = f"Started from {SourceRun(environment['warm_start'])}." if "warm_start" in environment else ""
    parts = [
        Part(text=[text for text in ("" if lines else "Nothing has been logged yet.", source) if text]),
        *_curves("Learning curves", _by_split(lines), whose),
        *_judged({"": run}),
        Part("Time of a step by part", rows=_step(run)),
        Part("Config, where it differs from the defaults", [] if changed else ["Nowhere."], rows=changed, wraps=True),
        *_dataset(run),
        *_plan(run),
        Part("Environment", rows=machine, left=("at the start",), wraps=True),
    ]
    entries = [*_times(run, lines), *_cards(lines, whose)]
    title = f"Run {run.path.resolve().name}"
    return render(title, parts, command=environment.get("command", ""), entries=entries)


def runs_page(runs: Sequence[Run], split: str | None = None, progress: ProgressListener = SILENT) -> str:
    """Make the page of two or more runs; with a split, how the others compare with the first one on it.

    Raises:
        RunError: a part of a run is damaged.
        UserError: they cannot be compared.
    """
    names = [run.path.resolve().name for run in runs]
    named = dict(zip(names if len({*names}) == len(runs) else [str(run.path) for run in runs], runs, strict=True))
    lines = {name: read_metrics(run.path / METRICS_NAME) for name, run in named.items()}
    logs = {name: _by_split(of_run) for name, of_run in lines.items()}
    settings = {
        name: setting_values(run.config) | {"dataset": run.environment["dataset"]["path"]}
        for name, run in named.items()
    }
    whose = "".join(f", {first}" for first in dict.fromkeys(run.config.train.first_of_several for run in runs) if first)
    parts = [
        Part("Runs", rows=[{"run": name} | dict(_cards(of_run, whose)) for name, of_run in lines.items()]),
        Part("Settings that differ", rows=_differing(settings), wraps=True),
        *_curves("Learning curves, val", {name: log["val"] for name, log in logs.items()}, whose),
        *_curves("Learning curves, train", {name: log["train"] for name, log in logs.items()}, whose),
        *_judged(named),
    ]
    found = (
        None if split is None else compare({name: [run] for name, run in named.items()}, split=split, progress=progress)
    )
    if found is None:
        return render(f"{len(runs)} runs", parts)
    rows = difference_rows(found.as_json())
    parts.insert(0, Part("Comparison", [found.about], rows=rows, left=("metric", "verdict")))
    return render(f"{len(runs)} runs", parts, lead=f"{found.verdict}.")


def _curves(heading: str, logs: Mapping[str, Sequence[Line]], whose: str) -> Iterator[Part]:
    """Yield the curves of lines by name: of the label that comes first of several, then of each other."""
    yield Part(f"{heading}{whose}", charts=_log_charts(logs))
    for label in dict.fromkeys(label for lines in logs.values() for line in lines for label in line.get("labels", ())):
        of_label = {
            name: [{**line, **line["labels"][label]} for line in lines if label in line.get("labels", ())]
            for name, lines in logs.items()
        }
        yield Part(f"{heading}, {label}", charts=_log_charts(of_label))


def _judged(named: Mapping[str, Run]) -> Iterator[Part]:
    """Yield what is known of the predictions of runs, of which several have names."""

    def found(folder: str = "") -> dict[str, dict[str, Any]]:
        files = ((name, run, *file) for name, run in named.items() for file in run.evaluations(folder).items())
        # Of several labels a file has the name of a split, or of a split and a label behind the first.
        paths = ((name, f"{path}.{run.config.train.first_of_several}", content) for name, run, path, content in files)
        return {", ".join(filter(None, [name, *path.split(".")[:2]])): content for name, path, content in paths}

    evaluations = found()
    of_labels = dict[str, dict[str, Any]]()
    for name, result in evaluations.items():
        where, others = name.removesuffix(f", {result.get('label')}"), result.get("labels", {})
        of_labels |= {name: result} | {f"{where}, {label}": {**result, **of} for label, of in others.items()}
    yield Part("Evaluation", [] if evaluations else [_NOT_EVALUATED], rows=_evaluations(of_labels))
    try:
        yield Part(charts=picture_charts(found(FOLDER)))
    except (LookupError, TypeError, ValueError) as error:
        where = " or ".join(str(run.path) for run in named.values())
        msg = f"{where}: a file of evaluation/{FOLDER}/ is damaged; remove it, and let dlrm evaluate write it again"
        raise RunError(msg) from error
    for name, result in evaluations.items():
        if slices := result.get("slices", [])[:_MOST_SLICES]:
            heading = f"Slices of {name}, the one that is most surely predicted worse first"
            drawn = bars([each["click_rate"] for each in slices], [each["intervals"]["click_rate"] for each in slices])
            rows = [
                {"slice": "", "click rates": bar} | row for bar, row in zip(drawn, slice_table(slices), strict=True)
            ]
            yield Part(heading, rows=rows, left=("worse by",))
    for name, content in found("importance").items():
        rows = difference_rows(content, [content["metric"]])
        yield Part(f"What the model uses: {name}", [_PERMUTED], rows=rows, left=("metric", "verdict"))


def _differing(settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row for each key that does not have the same value everywhere, by the names of where it is."""
    rows = (
        {"key": key} | {name: _text(values.get(key)) for name, values in settings.items()}
        for key in dict.fromkeys(chain(*settings.values()))
    )
    return [row for row in rows if len({*row.values()} - {row["key"]}) > 1]


def _times(run: Run, lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """Yield when a run began and how long it has lasted, with its breaks if it was resumed."""
    logged_s = [line["time"] for line in lines if _is_number(line, "time")]
    try:
        text = run.environment.get("started")  # older runs do not have it
        began_s = logged_s[0] if text is None else datetime.fromisoformat(text).timestamp()
        yield "began, UTC", f"{datetime.fromtimestamp(began_s, UTC):%Y-%m-%d %H:%M}"
    except (IndexError, ValueError, OverflowError, OSError):
        return
    if logged_s:
        yield "until its last line of metrics", show_duration(max(0.0, logged_s[-1] - began_s))


def _cards(lines: Sequence[Line], whose: str) -> Iterator[tuple[str, str]]:
    """Yield the most important values, each with its name, and that of the label that comes first of several."""
    if not lines:
        return
    yield "steps", f"{lines[-1]['step']:,}"
    yield "rows", f"{lines[-1]['rows']:,}"
    speeds = sorted(line["rows_per_s"] for line in lines if line["split"] == "train" and _is_number(line, "rows_per_s"))
    if speeds:
        yield "rows/s, median", f"{speeds[len(speeds) // 2]:,.0f}"
    for name, caption in _captions().items():
        judged = [line for line in lines if line["split"] == "val" and _is_number(line, name)]
        if judged:
            yield f"val {caption}, last{whose}", show_number(judged[-1][name], 4)
        if judged and name == BEST:
            best = max(judged, key=lambda line: line[BEST])
            yield f"val {caption}, best{whose}", f"{show_number(best[BEST], 4)} at step {best['step']:,}"


def _captions() -> dict[str, str]:
    """Of the metrics that a run logs besides the loss, by their names there."""
    return {metric.name: metric.caption for metric in metrics_in("log") if metric.name != LOSS}


def _log_charts(logs: Mapping[str, Sequence[Line]]) -> list[Chart]:
    """Draw every metric that was logged, over the rows seen, of the training or of validations by name."""
    charts = []
    captions = {"loss": f"loss: {METRICS[LOSS].caption}", **_captions(), "rows_per_s": "rows/s"}
    for metric, caption in captions.items():
        curves = {
            name: [
                (line["rows"], line[metric])
                for line in lines
                if _is_number(line, metric) and (line["split"] == "train" or metric != "rows_per_s")
            ]
            for name, lines in logs.items()
        }
        if any(curves.values()):
            charts.append(split_chart(caption, {name: points for name, points in curves.items() if points}))
    return charts


def split_chart(caption: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Draw a chart of curves by (rows, value), as of splits, that share both axes; none of them may be empty."""
    chart = curve_chart(
        caption,
        [Curve(name, _COLOURS.get(name, colour(i)), points) for i, (name, points) in enumerate(curves.items())],
        (0, max(rows for points in curves.values() for rows, _ in points)),
        "training rows seen",
        short,
        lambda rows, value: f"{value:.5g} at {rows:,.0f} rows",
    )
    for name, points in curves.items():
        if len(points) == 1 and name in _COLOURS:  # no line leads the eye to it
            chart.note(*points[0], f"{name}, once: {short(points[0][1])}")
    return chart


def _by_split(lines: Sequence[Line]) -> dict[str, list[Line]]:
    """Training lines and validations.

    Left out are training lines over far fewer rows than others, as the last of a run: a spike that is only noise.
    """
    ends = [line["rows"] for line in lines if line["split"] == "train"]
    spans = dict(zip(ends, (end - start for start, end in pairwise([0, *ends])), strict=True))
    typical = sorted(spans.values())[len(spans) // 2] if spans else 0
    return {
        "train": [line for line in lines if line["split"] == "train" and spans[line["rows"]] >= typical / 2],
        "val": [line for line in lines if line["split"] == "val"],
    }


def _is_number(line: Line, key: str) -> bool:
    return isinstance(line.get(key), int | float)


def _evaluations(results: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line for each evaluation; the interval of a metric stands below it."""

    def cell(result: Mapping[str, Any], name: str) -> str:
        ends = result.get("intervals", {}).get(name)
        shown = show_number(result[name]) if _is_number(result, name) else "-"
        return shown if ends is None else f"{shown}\n{' to '.join(map(show_number, ends))}"

    return [
        {
            "split": split,
            "step": f"{result.get('step', 0):,}",
            "chosen as": str(result.get("checkpoint", "")),
            "rows": show_number(result["rows"], 0) if _is_number(result, "rows") else "-",
            **{metric.name: cell(result, metric.name) for metric in metrics_of_any([*results.values()])},
        }
        for split, result in results.items()
    ]


def _step(run: Run) -> list[dict[str, str]]:
    """What the parts of a step took on the first rank, where steps were profiled."""
    parts = next((profile.ms_per_step_by_part for profile in read_profiles(run.profile)), {})
    return [
        {"part": name, "ms a step": show_number(ms, 3), "of the largest": bar}
        for (name, ms), bar in zip(parts.items(), bars([*parts.values()]), strict=True)
    ]


def _text(value: object) -> str:
    """The value of a setting, for people."""
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value))
    return "not set" if value is None else str(value)


def _dataset(run: Run) -> Iterator[Part]:
    try:
        dataset = run.open_dataset()
    except TorchDLRMError:
        path, sha256 = (run.environment["dataset"][name] for name in ("path", "manifest_sha256"))
        yield Part("Dataset", [f"{path}, no longer there or changed; sha256 of its dataset.json: {sha256}"])
        return
    num_rows, labels = sum(dataset.table_rows.values()), ", ".join(label.name for label in dataset.schema.learnt)
    rate = f"click rate{(first := dataset.schema.first_of_several) and f', {first}'}"
    about = (
        f"{dataset.path}: schema {dataset.schema.name}, {len(dataset.dense_names)} dense and "
        f"{len(dataset.sparse_names)} sparse features, {num_rows:,} rows in all tables; label {labels}"
    )
    splits = [
        {
            "split": split,
            "rows": f"{record.rows:,}",
            rate: f"{record.clicks_of(dataset.label_name) / record.rows:.4f}" if record.rows else "-",
        }
        for split, record in dataset.manifest.splits.items()
    ]
    yield Part("Dataset", [about], rows=splits)


def _plan(run: Run) -> Iterator[Part]:
    path = run.path / PLAN_NAME
    if not path.is_file():
        return
    try:
        plan = read_plan(path)
        ranks = "one rank" if plan["world_size"] == 1 else f"{plan['world_size']} ranks"
        weights = show_bytes(plan["total"]["weight_bytes"])
        about = f"{weights} of weights on {ranks}, planned for {plan['machine']['device']}"
        rows = [
            {
                "table": name,
                "sharding": table["sharding_type"],
                "kernel": table["compute_kernel"],
                "rows": f"{table['rows']:,}",
                "dim": f"{table['dim']:,}",
                "weights": show_bytes(table["weight_bytes"]),
                "ranks": ", ".join(map(str, table["ranks"])),
            }
            for name, table in sorted(plan["tables"].items(), key=lambda item: -item[1]["weight_bytes"])
        ]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        msg = f"{path}: damaged; remove it: dlrm train writes it again, and the report can do without it"
        raise RunError(msg) from error
    yield Part("Plan", [about], rows=rows, left=("sharding", "kernel"))
