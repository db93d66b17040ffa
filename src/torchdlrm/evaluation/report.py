"""Writes a run as one self-contained HTML page: how it learnt, how good it is, what it was made of.

In: the folder of a run, also of one that is still training.  Out: HTML, in the style of a plan's page: no scripts,
nothing fetched, to be mailed, printed, and kept with the weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

from torchdlrm.config import Config, setting_values
from torchdlrm.errors import RunError, TorchDLRMError
from torchdlrm.evaluation.pictures import FOLDER, difference_rows, picture_charts
from torchdlrm.html import Chart, Curve, Part, bars, colour, curve_chart, render, short
from torchdlrm.judging.slices import slice_table
from torchdlrm.metrics import BEST, LOSS, METRICS, metrics_in, metrics_of_any
from torchdlrm.sharding.plan_json import read_plan
from torchdlrm.training.log import read_metrics
from torchdlrm.training.run import METRICS_NAME, PLAN_NAME, Run
from torchdlrm.training.source_run import SourceRun
from torchdlrm.training.step_profile import read_profiles
from torchdlrm.units import show_bytes, show_duration, show_number

Line = Mapping[str, Any]
_COLOURS = {"train": "#8fb0dc", "val": "#b0521c"}
_SLICES = 40
_PERMUTED = "How much worse the model predicts where a feature has the values of other rows (permutation importance)."
_NOT_EVALUATED = "None yet: `dlrm evaluate RUN` judges every row of a split, and then its pictures are here."


def report_page(run: Run) -> str:
    """Make the page of a run; parts that the run does not have yet are left out or say so.

    Raises:
        RunError: a part is damaged.
    """
    lines = read_metrics(run.path / METRICS_NAME)
    now, default = setting_values(run.config), setting_values(Config())
    changed = [
        {"key": key, "value": text_of(value), "default": text_of(default.get(key))}
        for key, value in now.items()
        if value != default.get(key)
    ]
    environment = [
        {"": name, "at the start": text_of(value)}
        for name, value in run.environment.items()
        if name not in {"dataset", "warm_start", "started", "command"} and value != []
    ]
    source = str(SourceRun(run.environment["warm_start"])) if "warm_start" in run.environment else ""
    evaluations = evaluation_rows([*run.evaluations().values()])
    parts = [
        Part(text=["Nothing has been logged yet."] * (not lines) + [f"Started from {source}."] * bool(source)),
        Part("Learning curves", charts=log_charts(lines_by_split(run))),
        Part("Evaluation", [] if evaluations else [_NOT_EVALUATED], rows=evaluations),
        Part(charts=charts_of(run.path, run.evaluations(FOLDER))),
        *(
            Part(
                f"Slices of {name}, the one that is most surely predicted worse first",
                rows=slice_table(found[:_SLICES]),
            )
            for name, result in run.evaluations().items()
            if (found := result.get("slices"))
        ),
        *(
            Part(f"What the model uses: {name}", [_PERMUTED], rows=difference_rows(found, [found["metric"]]))
            for name, found in run.evaluations("importance").items()
        ),
        Part("Time of a step by part", rows=_step(run)),
        Part("Config, where it differs from the defaults", [] if changed else ["Nowhere."], rows=changed, wraps=True),
        *_dataset(run),
        *_plan(run),
        Part("Environment", rows=environment, left=("at the start",), wraps=True),
    ]
    return render(
        f"Run {run.path.resolve().name}",
        parts,
        command=run.environment.get("command", ""),
        entries=[*_times(run, lines), *cards(lines)],
    )


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


def cards(lines: Sequence[Line]) -> Iterator[tuple[str, str]]:
    """Yield the most important values, each with its name."""
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
            yield f"val {caption}, last", show_number(judged[-1][name], 4)
        if judged and name == BEST:
            best = max(judged, key=lambda line: line[BEST])
            yield f"val {caption}, best (step {best['step']:,})", show_number(best[BEST], 4)


def _captions() -> dict[str, str]:
    """Of the metrics that a run logs besides the loss, by their names there."""
    return {metric.name: metric.caption for metric in metrics_in("log") if metric.name != LOSS}


def log_charts(logs: Mapping[str, Sequence[Line]], of: str = "") -> list[Chart]:
    """Draw every metric that was logged, over the rows seen: a curve for each log, which are called by their names."""
    charts = []
    captions = {"loss": f"loss: {METRICS[LOSS].caption}", **_captions(), "rows_per_s": "rows/s"}
    for metric, caption in captions.items():
        splits = ("train",) if metric == "rows_per_s" else ("train", "val")
        curves = {
            name: [
                (line["rows"], line[metric]) for line in lines if line["split"] in splits and _is_number(line, metric)
            ]
            for name, lines in logs.items()
        }
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            charts.append(split_chart(caption + of, curves))
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


def lines_by_split(run: Run) -> dict[str, list[Line]]:
    """What was logged of the training and of validations.

    Training lines over far fewer rows than others, as the last of a run, are left out: a spike that is only noise.
    """
    lines = read_metrics(run.path / METRICS_NAME)
    ends = [line["rows"] for line in lines if line["split"] == "train"]
    spans = dict(zip(ends, (end - start for start, end in pairwise([0, *ends])), strict=True))
    typical = sorted(spans.values())[len(spans) // 2] if spans else 0
    return {
        "train": [line for line in lines if line["split"] == "train" and spans[line["rows"]] >= typical / 2],
        "val": [line for line in lines if line["split"] == "val"],
    }


def _is_number(line: Line, key: str) -> bool:
    return isinstance(line.get(key), int | float)


def charts_of(where: object, pictures: Mapping[str, Mapping[str, Any]]) -> list[Chart]:
    """The charts of pictures that lie in the folder of a run, or in those of several.

    Raises:
        RunError: a file is damaged.
    """
    try:
        return picture_charts(pictures)
    except (LookupError, TypeError, ValueError) as error:
        msg = f"{where}: a file of evaluation/{FOLDER}/ is damaged; remove it, and let dlrm evaluate write it again"
        raise RunError(msg) from error


def evaluation_rows(results: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A table of what `dlrm evaluate` has written."""
    names = [metric.name for metric in metrics_of_any(results)]
    return [
        {
            "split": str(result.get("split", "")),
            "step": f"{result.get('step', 0):,}",
            "chosen as": str(result.get("checkpoint", "")),
            "rows": show_number(result["rows"], 0) if _is_number(result, "rows") else "-",
            **{name: _with_interval(result, name) for name in names},
        }
        for result in results
    ]


def _with_interval(result: Mapping[str, Any], name: str) -> str:
    """A metric, and in a second line the interval of 95 % around it, if the evaluation has one."""
    if not _is_number(result, name):
        return "-"
    low, high = result.get("intervals", {}).get(name) or (None, None)
    return show_number(result[name]) + ("" if low is None else f"\n{show_number(low)} to {show_number(high)}")


def _step(run: Run) -> list[dict[str, str]]:
    """What the parts of a step took on the first rank, where steps were profiled."""
    parts = next((profile.ms_per_step_by_part for profile in read_profiles(run.profile)), {})
    return [
        {"part": name, "ms a step": show_number(ms, 3), "of the largest": bar}
        for (name, ms), bar in zip(parts.items(), bars([*parts.values()]), strict=True)
    ]


def text_of(value: object) -> str:
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
    tables = dataset.num_embeddings
    about = (
        f"{dataset.path}: schema {dataset.schema.name}, {len(dataset.dense_names)} dense and {len(tables)} "
        f"sparse features, {sum(tables.values()):,} rows in all tables; label {dataset.label_name}"
    )
    splits = [
        {
            "split": split,
            "rows": f"{record.rows:,}",
            "click rate": f"{record.clicks_of(dataset.label_name) / record.rows:.4f}" if record.rows else "-",
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
