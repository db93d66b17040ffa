"""`dlrm inspect`: what a folder that another command wrote holds."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from torchdlrm.cli.bundles import show_bundle, show_delta
from torchdlrm.cli.datasets import show_dataset
from torchdlrm.cli.explain import show_tables
from torchdlrm.cli.options import Flag, Json, OwnModel
from torchdlrm.cli.terminal import look_at, metric_cells, print_json, print_table, say, warn
from torchdlrm.errors import LiveError, UserError
from torchdlrm.folders import KindName, found_in
from torchdlrm.units import show_bytes, show_number


def inspect(
    folder: Path,
    *,
    values: int = 3,
    tables: Flag = False,
    neighbours: Annotated[list[str] | None, Parameter(consume_multiple=True)] = None,
    own_model: OwnModel = OwnModel(),  # noqa: B008 - frozen, and what the parser fills
    as_json: Json = False,
) -> None:
    """Show what a dataset, a run, a bundle, a delta or a live model holds.

    Of a dataset: rows, click rates, tables, unknown and missing values, and what to look at. Of a run: how far it is,
    its checkpoints, its evaluations. Of a bundle: tables and their precision, the check at the end of the export. Of a
    delta: which bundles it is between, and what of each table changed. All files of these are read and their checksums
    compared. Of a live model: its periods, and how each log was predicted before it was learnt from.

    Args:
        folder: What to look at.
        values: How many of a feature's most frequent values to show, of a dataset.
        tables: Of a bundle or a run show what its tables hold: rows seen in training, effective rank, norms.
        neighbours: And the values nearest to these, as in cat_5=68fd1e64.
    """
    if values < 0:
        msg = f"`values`: must not be negative, got {values}"
        raise UserError(msg)
    show_by_kind: Mapping[KindName, Callable[[], None]] = {
        "delta": lambda: show_delta(folder, as_json=as_json),
        "dataset": lambda: show_dataset(folder, values, as_json=as_json),
        "bundle": lambda: show_bundle(folder, as_json=as_json),
        "run": lambda: _show_run(folder, as_json=as_json),
        "live model": lambda: _show_live(folder, as_json=as_json),
    }
    if tables or neighbours:
        show_tables(folder, neighbours or [], own_model, as_json=as_json)
    else:
        show_by_kind[found_in(folder).name]()


def _show_run(folder: Path, *, as_json: bool) -> None:
    """Print what a run was started with, how far it is, and its checkpoints, after checking all of them."""
    content = _run_as_dict(folder)
    if as_json:
        print_json({"kind": "run"} | content)
        return
    from torchdlrm.metrics import metrics_in
    from torchdlrm.training.log import logged_names

    environment = content["environment"]
    say(
        f"run {folder}: {environment['world_size']} process(es), torchdlrm {environment['torchdlrm']}, "
        f"torch {environment['torch']}; dataset {environment['dataset']['path']}"
    )
    if "warm_start" in environment:
        from torchdlrm.training.source_run import SourceRun

        say(f"started from {SourceRun(environment['warm_start'])}")
    best = f"best val AUC so far{(first := content.get('label', '')) and f', {first}'}"
    for split, line in content["last_metrics"].items():
        names = ("loss", *logged_names())
        for label, of in {first: line, **line.get("labels", {})}.items():
            metrics = (f"{name} {show_number(of[name], 4)}" for name in names if of.get(name) is not None)
            say(f"{split} at step {line['step']:,}{label and f', {label}'}: {', '.join(metrics)}")
    rows = [
        {
            "checkpoint": f"step {step:,}",
            "epoch": "-" if about["epoch"] is None else str(about["epoch"]),
            best: "-" if about["best_auc"] is None else f"{about['best_auc']:.4f}",
            "files": about["damage"] or "undamaged",
        }
        for step, about in content["checkpoints"].items()
    ]
    print_table("checkpoints", rows, left_aligned=("files",))
    for name, result in content["evaluations"].items():
        ends = {of: pair for of, pair in result.get("intervals", {}).items() if pair}
        shown = {of: f" ({' to '.join(show_number(end, 4) for end in pair)})" for of, pair in ends.items()}
        brief = (
            f"{of.label} {show_number(result.get(of.name), 4)}{shown.get(of.name, '')}" for of in metrics_in("brief")
        )
        whose = f", {result['label']}" if result.get("labels") else ""
        say(f"evaluated {name.removesuffix('.' + result['label']) if whose else name}{whose}: {', '.join(brief)}")
    look_at(content["judgements"])


def _run_as_dict(folder: Path) -> dict[str, Any]:
    """Return, for JSON, each split's last metrics, every checkpoint with what is wrong with it, evaluations."""
    from torchdlrm.data.judgements import calibration
    from torchdlrm.training.checkpoint import checkpoint_path, find_damage, list_checkpoints, read_position
    from torchdlrm.training.log import read_metrics
    from torchdlrm.training.run import METRICS_NAME, Run

    run = Run.open(folder)
    evaluations = run.evaluations()
    checkpoints = {}
    for step in list_checkpoints(run.checkpoints):
        damage = find_damage(checkpoint_path(run.checkpoints, step))
        position = read_position(run.checkpoints, step) if damage is None else None
        checkpoints[step] = {
            "epoch": position.loader["epoch"] if position is not None else None,
            "best_auc": position.best_auc if position is not None else None,
            "damage": damage,
        }
    return {
        "path": str(folder),
        **({"label": label} if (label := run.config.train.first_of_several) else {}),
        "environment": run.environment,
        "last_metrics": {line["split"]: line for line in read_metrics(folder / METRICS_NAME)},
        "checkpoints": checkpoints,
        "evaluations": evaluations,
        "judgements": [line for name, result in evaluations.items() if (line := calibration(name, result))],
    }


def _show_live(folder: Path, *, as_json: bool) -> None:
    """Print the periods of a live model, and which one is current."""
    content = _live_as_dict(folder)
    if as_json:
        print_json({"kind": "live"} | content)
        return
    say(f"live model {folder}: {len(content['periods'])} period(s), current is {content['current'] or 'none'}")
    newest = content["periods"][-1] if content["periods"] else {}
    others, whose = newest.get("labels", {}), f", {newest['label']}" if "label" in newest else ""
    first = next(iter(metric_cells({})))
    rows = [
        {
            "period": str(period["period"]),
            "base": str(period["base"] or "-"),
            "rows": f"{period['rows']:,}",
            **metric_cells(period),
            **{f"{first} {of}": metric_cells(period.get("labels", {}).get(of, {}))[first] for of in others},
            "published": "yes" if period["published"] else "no",
            "bundle": show_bytes(period["bundle_bytes"]),
            "delta": "-" if period["delta_bytes"] is None else show_bytes(period["delta_bytes"]),
        }
        for period in content["periods"]
    ]
    print_table(f"each log, by the previous model{whose}", rows, droppable=("bundle", "delta", "base"))
    for period in content["periods"]:
        for reason in period["reasons"]:
            say(f"period {period['period']}: {reason}")
    if (draft := content["unfinished"]) is not None:
        done = ", ".join(draft["done"]) or "no step"
        say(f"period {draft['period']} is not complete, learnt from {draft['base'] or 'nothing'}; done: {done}")
    for problem in content["problems"]:
        warn(problem)


def _live_as_dict(folder: Path) -> dict[str, Any]:
    """Return, for JSON, the current period, and each one's rows, metrics before it was learnt from, and outcome."""
    from torchdlrm.live.gate import period_names
    from torchdlrm.live.model import LiveModel

    live = LiveModel.open(folder)
    unknown = dict.fromkeys(period_names())  # of a period without a base
    periods = [
        {"period": record.period, "base": record.base}
        | (unknown if record.progressive is None else record.progressive.all)
        | {"rows": record.rows, "clicks": record.clicks, "published": record.published}
        | ({"label": record.label} if record.label else {})
        | ({"labels": record.progressive.labels} if record.progressive and record.progressive.labels else {})
        | {"reasons": record.gate.reasons, "bundle_bytes": record.bundle_bytes, "delta_bytes": record.delta_bytes}
        for record in live.periods
    ]
    found: dict[str, Any] = {"current": None, "draft": None}
    problems = []  # what is broken is shown with the periods: one of them helps
    for name in found:
        try:
            found[name] = getattr(live, name)
        except LiveError as error:
            problems.append(str(error))
    draft = found["draft"]
    unfinished = None if draft is None else draft.model_dump(mode="json", include={"period", "base", "done"})
    about = {"periods": periods, "unfinished": unfinished, "problems": problems}
    return {"live": str(folder), "current": found["current"], **about}
