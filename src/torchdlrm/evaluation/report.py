"""A run as one self-contained HTML page: how it learnt, how good it is, what it was made of.

In: the folder of a run, also of one that is still training.  Out: HTML, in the style of a plan's page: no scripts,
nothing fetched, to be mailed, printed, and kept beside the weights.
"""

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from torchdlrm.config import Config, settings
from torchdlrm.errors import RunError, TorchDLRMError
from torchdlrm.evaluation.curves import Curve, curve_chart
from torchdlrm.html import figures_table, whole_page
from torchdlrm.sharding.layout import read_plan
from torchdlrm.training.log import read_metrics
from torchdlrm.training.run import METRICS_NAME, PLAN_NAME, Run
from torchdlrm.units import show_bytes

Line = Mapping[str, Any]
_CHARTS = (("loss", "loss: logloss, nats"), ("auc", "AUC"), ("ne", "normalised entropy"), ("rows_per_s", "rows/s"))
_FIGURES = ("rows", "auc", "logloss", "ne", "calibration", "accuracy")
_STYLE = """<style>.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:8px 24px}
figure{margin:0}figcaption{font-weight:600;font-size:.9em;margin:.6em 0 .2em}
td{overflow-wrap:anywhere;white-space:normal}
@media print{body{max-width:none}}</style>"""


def report_page(run: Run) -> str:
    """The page of a run; parts that the run does not have yet are left out or say so.

    Raises:
        RunError: a part is damaged.
    """
    lines = read_metrics(run.path / METRICS_NAME)
    name = escape(run.path.resolve().name)
    body = [_STYLE, f"<h1>Run {name}</h1>", *_cards(lines), *_curves(lines), *_evaluations(run), *_config(run.config)]
    body += [*_dataset(run), *_plan(run), *_environment(run)]
    return whole_page(f"Run {name}", body)


def _cards(lines: Sequence[Line]) -> list[str]:
    if not lines:
        return ["<p>Nothing has been logged yet.</p>"]
    training = [line for line in lines if line["split"] == "train"]
    judged = [line for line in lines if line["split"] == "val" and _is_number(line, "auc")]
    cards = [("steps", f"{lines[-1]['step']:,}"), ("rows", f"{lines[-1]['rows']:,}")]
    speeds = sorted(line["rows_per_s"] for line in training if _is_number(line, "rows_per_s"))
    if speeds:
        cards.append(("rows/s, median", f"{speeds[len(speeds) // 2]:,.0f}"))
    if judged:
        best = max(judged, key=lambda line: line["auc"])
        cards.append(("val AUC, last", f"{judged[-1]['auc']:.4f}"))
        cards.append((f"val AUC, best (step {best['step']:,})", f"{best['auc']:.4f}"))
        if _is_number(judged[-1], "ne"):
            cards.append(("val normalised entropy, last", f"{judged[-1]['ne']:.4f}"))
    shown = (f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in cards)
    return ['<div class="cards">', *shown, "</div>"]


def _curves(lines: Sequence[Line]) -> list[str]:
    lines = _without_remainders(lines)
    charts = []
    for key, title in _CHARTS:
        splits = ("train", "val") if key != "rows_per_s" else ("train",)
        curves = [
            Curve(
                split, [(line["rows"], line[key]) for line in lines if line["split"] == split and _is_number(line, key)]
            )
            for split in splits
        ]
        drawn = [curve for curve in curves if curve.points]
        if drawn:
            charts.append(f"<figure><figcaption>{escape(title)}</figcaption>{curve_chart(drawn, title)}</figure>")
    return ["<h2>Learning curves</h2>", '<div class="charts">', *charts, "</div>"] if charts else []


def _without_remainders(lines: Sequence[Line]) -> list[Line]:
    """Without training lines over far fewer rows than the others, as the last of a run: a spike that is only noise."""
    ends = [line["rows"] for line in lines if line["split"] == "train"]
    spans = dict(zip(ends, (end - start for start, end in pairwise([0, *ends])), strict=True))
    typical = sorted(spans.values())[len(spans) // 2] if spans else 0
    return [line for line in lines if line["split"] != "train" or spans[line["rows"]] >= typical / 2]


def _is_number(line: Line, *keys: str) -> bool:
    return all(isinstance(line.get(key), int | float) for key in keys)


def _evaluations(run: Run) -> list[str]:
    results = run.evaluations()
    if not results:
        return ["<h2>Evaluation</h2>", "<p>None yet: <code>dlrm evaluate</code> judges every row of a split.</p>"]
    head = ["split", "step", "chosen as", *_FIGURES]
    rows = [
        [
            str(result.get("split", "")),
            f"{result.get('step', 0):,}",
            str(result.get("checkpoint", "")),
            *(_shown(result.get(name)) for name in _FIGURES),
        ]
        for result in results.values()
    ]
    return ["<h2>Evaluation</h2>", figures_table(head, rows)]


def _shown(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5f}" if isinstance(value, float) and value == value else "-"  # noqa: PLR0124 - NaN is not itself


def _config(config: Config) -> list[str]:
    default = Config()
    pairs = ((name, _at(config, name), _at(default, name)) for name, _ in settings())
    changed = [[name, _text(now), _text(before)] for name, now, before in pairs if now != before]
    if not changed:
        return ["<h2>Config</h2>", "<p>All defaults.</p>"]
    return ["<h2>Config, where it differs from the defaults</h2>", figures_table(["key", "value", "default"], changed)]


def _at(config: Config, dotted_name: str) -> object:
    value: object = config
    for part in dotted_name.split("."):
        value = getattr(value, part)
    return value


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    return "not set" if value is None else str(value)


def _dataset(run: Run) -> list[str]:
    title = "<h2>Dataset</h2>"
    try:
        dataset = run.open_dataset()
    except TorchDLRMError:
        path, sha256 = (run.environment["dataset"][name] for name in ("path", "manifest_sha256"))
        told = f"{path}, no longer there or changed; sha256 of its dataset.json: {sha256}"
        return [title, f"<p>{escape(told)}</p>"]
    tables = dataset.num_embeddings
    rows = [
        [split, f"{record.rows:,}", f"{record.clicks / record.rows:.4f}" if record.rows else "-"]
        for split, record in dataset.manifest.splits.items()
    ]
    told = (
        f"{dataset.path}: schema {dataset.schema.name}, {len(dataset.dense_names)} dense and {len(tables)} sparse "
        f"features, {sum(tables.values()):,} rows in all tables"
    )
    return [title, f"<p>{escape(told)}</p>", figures_table(["split", "rows", "click rate"], rows)]


def _plan(run: Run) -> list[str]:
    path = run.path / PLAN_NAME
    if not path.is_file():
        return []
    try:
        return _plan_table(read_plan(path))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        msg = f"{path}: damaged; remove it: dlrm train writes it anew, and the report can do without it"
        raise RunError(msg) from error


def _plan_table(plan: Mapping[str, Any]) -> list[str]:
    tables = sorted(plan["tables"].items(), key=lambda item: -item[1]["weight_bytes"])
    rows = [
        [
            name,
            table["sharding_type"],
            table["compute_kernel"],
            f"{table['rows']:,}",
            f"{table['dim']:,}",
            show_bytes(table["weight_bytes"]),
            ", ".join(map(str, table["ranks"])),
        ]
        for name, table in tables
    ]
    weights = show_bytes(plan["total"]["weight_bytes"])
    ranks = "one rank" if plan["world_size"] == 1 else f"{plan['world_size']} ranks"
    told = f"{weights} of weights on {ranks}, planned for {plan['machine']['device']}"
    head = ["table", "sharding", "kernel", "rows", "dim", "weights", "ranks"]
    return ["<h2>Plan</h2>", f"<p>{escape(told)}</p>", figures_table(head, rows, left_aligned=("sharding", "kernel"))]


def _environment(run: Run) -> list[str]:
    rows = [
        [name, _text(tuple(v) if isinstance(v, list) else v)]
        for name, v in run.environment.items()
        if name != "dataset"
    ]
    return ["<h2>Environment</h2>", figures_table(["", "at the start"], rows, left_aligned=("at the start",))]
