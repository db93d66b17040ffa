"""`dlrm inspect`: what a folder that another command wrote holds."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from torchdlrm.cli.terminal import (
    Json,
    console,
    look_at,
    print_json,
    print_table,
    progress_bars,
    say,
    shown_metric,
    warn,
)
from torchdlrm.errors import LiveError, UserError
from torchdlrm.folders import KINDS, KindName, kind_of
from torchdlrm.units import show_bytes

if TYPE_CHECKING:
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.bundle.check import Agreement
    from torchdlrm.data.dataset import Manifest
    from torchdlrm.data.summary import DatasetSummary, FrequentValue
    from torchdlrm.exporting.sensitivity import PrecisionSearch
    from torchdlrm.features.schema import FeatureSchema
    from torchdlrm.features.transforms import DenseTransform

_MAX_NAME_WIDTH = 16


def inspect(folder: Path, *, values: int = 3, as_json: Json = False) -> None:
    """Show what a dataset, a run, a bundle, a delta or a live model holds.

    Of a dataset: rows, click rates, tables, unknown and missing values, and what to look at. Of a run: how far it is,
    its checkpoints, its evaluations. Of a bundle: tables and their precision, the check at the end of the export. Of a
    delta: which bundles it is between, and what of each table changed. All files of these are read and their checksums
    compared. Of a live model: its periods, and how each log was predicted before it was learnt from.

    Args:
        folder: What to look at.
        values: How many of a feature's most frequent values to show, of a dataset.
        as_json: Print one JSON object on standard output, and nothing else.
    """
    if values < 0:
        msg = f"`values`: must not be negative, got {values}"
        raise UserError(msg)
    show_by_kind: Mapping[KindName, Callable[[], None]] = {
        "delta": lambda: _show_delta(folder, as_json=as_json),
        "dataset": lambda: _show_dataset(folder, values, as_json=as_json),
        "bundle": lambda: _show_bundle(folder, as_json=as_json),
        "run": lambda: _show_run(folder, as_json=as_json),
        "live model": lambda: _show_live(folder, as_json=as_json),
    }
    kind = kind_of(folder)
    if kind is None:
        found = "holds none of these" if folder.is_dir() else "is not a folder"
        names = " or ".join(f"a {kind.name} ({kind.marker})" for kind in KINDS)
        msg = f"{folder}: {found}: {names}; give the folder that another `dlrm` command wrote"
        raise UserError(msg)
    show_by_kind[kind.name]()


def _show_run(folder: Path, *, as_json: bool) -> None:
    """Print what a run was started with, how far it is, and its checkpoints, after checking all of them."""
    content = _run_as_dict(folder)
    if as_json:
        print_json({"kind": "run"} | content)
        return
    environment = content["environment"]
    say(
        f"run {folder}: {environment['world_size']} process(es), torchdlrm {environment['torchdlrm']}, "
        f"torch {environment['torch']}; dataset {environment['dataset']['path']}"
    )
    if "warm_start" in environment:
        from torchdlrm.training.source_run import SourceRun

        say(f"started from {SourceRun.of(environment['warm_start'])}")
    for split, line in content["last_metrics"].items():
        metrics = (f"{name} {line[name]:.4f}" for name in ("loss", "ne", "auc") if line.get(name) is not None)
        say(f"{split} at step {line['step']:,}: {', '.join(metrics)}")
    rows = [
        {
            "checkpoint": f"step {step:,}",
            "epoch": "-" if about["epoch"] is None else str(about["epoch"]),
            "best val AUC so far": "-" if about["best_auc"] is None else f"{about['best_auc']:.4f}",
            "files": about["damage"] or "undamaged",
        }
        for step, about in content["checkpoints"].items()
    ]
    print_table("checkpoints", rows, left_aligned=("files",))
    for name, result in content["evaluations"].items():
        say(f"evaluated {name}: AUC {shown_metric(result['auc'], 4)}, logloss {shown_metric(result['logloss'], 4)}")
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
        "environment": run.environment,
        "last_metrics": {line["split"]: line for line in read_metrics(folder / METRICS_NAME)},
        "checkpoints": checkpoints,
        "evaluations": evaluations,
        "judgements": [line for name, result in evaluations.items() if (line := calibration(name, result))],
    }


def _show_bundle(folder: Path, *, as_json: bool) -> None:
    """Print what a bundle holds, after checking all of it."""
    from torchdlrm.bundle.bundle import Bundle
    from torchdlrm.model import table_weight

    bundle = Bundle.open(folder)
    if as_json:
        print_json({"kind": "bundle"} | bundle_as_dict(bundle, None))
        return
    manifest, source = bundle.manifest, bundle.manifest.source
    best = ", the best of the val split" if source.checkpoint == "best" else ""
    say(
        f"bundle {folder}, model {bundle.name}, version {bundle.version}: complete and undamaged; from run "
        f"{source.run}, step {source.step:,}{best}; schema {bundle.schema.name}"
    )
    hashed = {column.name for column in bundle.schema.sparse if column.hash is not None}
    rows = []
    for name, record in manifest.sparse.items():
        mine = [table for table in manifest.tables if table.feature == name]
        spans = [bundle.weights.span(table_weight(table.key)) for table in mine]
        known = "yes" if record.vocabulary is not None else "hashed" if name in hashed else "ids as they are"
        rows.append(
            {
                "feature": name,
                "table rows": " and ".join(f"{table.rows:,}" for table in mine),
                "dim": str(mine[0].dim),
                "precision": record.precision,
                "bytes": show_bytes(sum(end - start for start, end in spans)),
                "vocabulary": known,
            }
        )
    print_table("", rows)
    _print_inputs(bundle.schema, bundle.dense)
    model = manifest.model
    sizes = (max(1, len(bundle.schema.dense)), *model.dense_arch_layer_sizes), model.over_arch_layer_sizes
    layers = " and ".join("-".join(map(str, arch)) for arch in sizes)
    interaction = f", interaction {model.interaction_text}"
    say(
        f"arches {layers}, dimension {model.embedding_dim}{'' if manifest.model_class else interaction}; products in "
        f"{manifest.dense_precision}"
    )
    if manifest.model_class is not None:
        say(f"model class {manifest.model_class.name}: --model-class of whatever predicts")
    labels = [column.name for column in bundle.schema.labels]
    if len(labels) > 1:
        say(f"label {bundle.schema.label.name}, of {', '.join(labels)}")
    print_check(bundle)


def _show_delta(folder: Path, *, as_json: bool) -> None:
    """Print what a delta changes, after checking all of it."""
    from torchdlrm.bundle.delta import Delta
    from torchdlrm.cli.apply import delta_as_dict, print_delta

    delta = Delta.open(folder)
    if as_json:
        print_json({"kind": "delta"} | delta_as_dict(delta))
        return
    print_delta(delta)


def _show_live(folder: Path, *, as_json: bool) -> None:
    """Print the periods of a live model, and which one is current."""
    content = _live_as_dict(folder)
    if as_json:
        print_json({"kind": "live"} | content)
        return
    say(f"live model {folder}: {len(content['periods'])} period(s), current is {content['current'] or 'none'}")
    rows = [
        {
            "period": str(period["period"]),
            "base": str(period["base"] or "-"),
            "rows": f"{period['rows']:,}",
            **{name: shown_metric(period[name]) for name in ("auc", "logloss", "ne", "calibration")},
            "published": "yes" if period["published"] else "no",
            "bundle": show_bytes(period["bundle_bytes"]),
            "delta": "-" if period["delta_bytes"] is None else show_bytes(period["delta_bytes"]),
        }
        for period in content["periods"]
    ]
    print_table("each log, by the model of before", rows, droppable=("bundle", "delta", "base"))
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
    from torchdlrm.live.model import LiveModel

    live = LiveModel.open(folder)
    periods = []
    for record in live.periods:
        metrics = {} if record.progressive is None else record.progressive.all.model_dump()
        names = ("auc", "auc_low", "auc_high", "logloss", "ne", "calibration")
        periods.append(
            {"period": record.period, "base": record.base, "rows": record.rows, "clicks": record.clicks}
            | {name: metrics.get(name) for name in names}
            | {"published": record.published, "reasons": record.gate.reasons}
            | {"bundle_bytes": record.bundle_bytes, "delta_bytes": record.delta_bytes}
        )
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


def print_check(bundle: "Bundle", agreement: "Agreement | None" = None) -> None:
    """Print how the bundle's predictions compare with the checkpoint's; of an export with what is not recorded."""
    check = bundle.manifest.check
    if check is None:
        return
    rows = [
        {"": name, "AUC": shown_metric(metrics.auc, 6), "logloss": shown_metric(metrics.logloss, 6)}
        for name, metrics in (("checkpoint", check.checkpoint), ("bundle", check.bundle))
    ]
    print_table(f"{check.rows:,} rows of {check.split}", rows)
    if check.checkpoint.auc is None:
        say("AUC is undefined: it needs rows of both labels")
    say(
        f"largest difference of two probabilities: {check.largest_difference:.2g} (the precision explains "
        f"{check.largest_allowed:.2g})"
    )
    if agreement is not None:
        say(
            f"in parts of the probability: {agreement.largest_relative:.2g}, in half of the rows less than "
            f"{agreement.median_relative:.2g}; {agreement.distinct:,} different probabilities, the checkpoint has "
            f"{agreement.distinct_before:,}"
        )


def print_precision_search(search: "PrecisionSearch") -> None:
    """Print what each table costs and saves at each precision, and what was chosen."""
    rows = [
        {
            "feature": name,
            "table rows": f"{choice.num_embeddings:,}",
            "float32": show_bytes(choice.size_bytes["float32"]),
            **{precision: f"{1e6 * cost:.2f}" for precision, cost in list(choice.logloss_increase.items())[1:]},
            "chosen": choice.chosen,
            "bytes": show_bytes(choice.size_bytes[choice.chosen]),
        }
        for name, choice in search.tables.items()
    ]
    print_table(f"logloss increase expected of each table alone, on {search.rows:,} rows, in millionths", rows)
    before = sum(choice.size_bytes["float32"] for choice in search.tables.values())
    after = sum(choice.size_bytes[choice.chosen] for choice in search.tables.values())
    measured = search.measured_increase
    say(
        f"tables: {show_bytes(before)} -> {show_bytes(after)}; logloss increase {search.expected_increase:.2g} "
        f"expected, {measured.mean:.2g} (standard error {measured.standard_error:.1g}) measured,"
        f" {search.max_logloss_increase:.2g} allowed"
    )


def bundle_as_dict(bundle: "Bundle", search: "PrecisionSearch | None") -> dict[str, Any]:
    """Return what the manifest says, for JSON."""
    content = bundle.manifest.model_dump(
        mode="json", exclude={"files", "block_sha256", "block_bytes", "feature_schema"}
    )
    about: dict[str, Any] = {"path": str(bundle.path), "version": bundle.version, "schema": bundle.schema.name}
    about["buckets"] = _buckets_as_dict(bundle.schema)
    about["size_bytes"] = sum(record.size_bytes for record in bundle.manifest.files.values())
    return about | content | ({} if search is None else {"precision_search": asdict(search)})


def _show_dataset(folder: Path, num_values: int, *, as_json: bool) -> None:
    """Print what a dataset holds, after comparing every byte with its checksum."""
    from torchdlrm.data.dataset import Dataset
    from torchdlrm.data.judgements import judge_dataset
    from torchdlrm.data.summary import summarize
    from torchdlrm.features.bad_rows import describe_bad_rows

    dataset = Dataset.open(folder)
    with progress_bars("") as progress:
        dataset.verify(progress)
    summary = summarize(dataset, num_values)
    manifest, judgements = dataset.manifest, judge_dataset(dataset)
    if as_json:
        about = manifest.model_dump(
            mode="json",
            by_alias=True,  # as dataset.json has them
            include={
                *("format_version", "split_rule", "seed", "min_count", "max_embeddings", "source", "bad_rows"),
                *("period", "expire_after", "admit_over", "extends"),
            },
        )
        about["buckets"] = _buckets_as_dict(dataset.schema)
        about |= asdict(summary) | {"judgements": judgements}
        print_json({"kind": "dataset", "path": str(folder), "schema": dataset.schema.name} | about)
        return
    say(f"dataset {folder}, schema {manifest.feature_schema.name}, seed {manifest.seed}")
    say(f"split: {manifest.split_rule}")
    if manifest.period is not None:
        _print_turnover(manifest, summary)
    _print_summary(summary)
    _print_inputs(dataset.schema, manifest.dense)
    say("drift: from train, 0 where the distribution is the same, 1 where nothing is in common")
    if manifest.bad_rows.total:
        say(f"bad rows that were skipped: {manifest.bad_rows.total:,}")
        say("\n".join(describe_bad_rows(manifest.bad_rows.counts, manifest.bad_rows.examples)))
    look_at(judgements)


def _print_turnover(manifest: "Manifest", summary: "DatasetSummary") -> None:
    """Print of which period the vocabularies are, and for each feature what came and went in it."""
    about = [f"period {manifest.period}"]
    if manifest.extends is not None:
        before = manifest.extends.period
        about.append("extends a dataset without one" if before is None else f"extends period {before}")
    if manifest.expire_after is not None:
        about.append(f"a value that is not seen in {manifest.expire_after} loses its id")
    if manifest.admit_over > 1:
        about.append(f"values are counted over {manifest.admit_over} until they have one")
    say("; ".join(about))
    rows = [
        {
            "feature": name,
            "table rows": f"{feature.num_embeddings:,}",
            "values with ids": f"{feature.num_values:,}",
            "got one": f"{feature.turnover.admitted:,}",
            "lost theirs": f"{feature.turnover.expired:,}",
            "ids given again": f"{feature.turnover.reset:,}",
            "counts of others": f"{feature.turnover.candidates:,}",
        }
        for name, feature in summary.sparse.items()
        if feature.turnover is not None
    ]
    print_table("", rows)


def _buckets_as_dict(schema: "FeatureSchema") -> dict[str, Any]:
    """Return the buckets that make categories of numbers, by the name of the feature, with fitted boundaries."""
    return {column.name: column.buckets.model_dump(mode="json") for column in schema.sparse if column.buckets}


def _print_inputs(schema: "FeatureSchema", dense: "Mapping[str, DenseTransform]") -> None:
    """Print by what numbers are categories, which features that are, and what else a row has than ids and numbers."""
    alike: dict[str, list[str]] = {}
    for column in schema.sparse:
        if column.buckets is not None:
            alike.setdefault(str(column.buckets), []).append(column.name)
    for buckets, names in alike.items():
        say(f"buckets by {buckets}: {', '.join(names)}")
    if weighted := [column.name for column in schema.sparse_columns if column.weight_separator is not None]:
        say(f"values with weights: {', '.join(weighted)}")
    if schema.weight is not None:
        say(f"rows count by their weight: {schema.weight.name}")
    print_never_missing(dense)


def print_never_missing(dense: "Mapping[str, DenseTransform]") -> None:
    """Print for which numbers the mean stands where they are missing."""
    if names := [name for name, fitted in dense.items() if fitted.never_missing]:
        say(f"never missing in training, so the mean stands for a missing one: {', '.join(names)}")


def _print_summary(summary: "DatasetSummary") -> None:
    """Print three tables; the values of each split are in one column, below the split's name."""
    splits = list(summary.splits)
    six, five = "".join(f"{name:>6}" for name in splits), "".join(f"{name:>5}" for name in splits[1:])

    def percents(fractions: Mapping[Any, float]) -> str:
        return "".join(f"{100 * fractions[name]:6.1f}" for name in splits)

    def drifts(drift: Mapping[Any, float]) -> str:
        return "".join(f"{drift[name]:5.2f}" for name in splits[1:])

    others = summary.splits["train"].other_clicks
    table = _tight_table("split", "rows", "click rate", *others, "files")
    for split, size in summary.splits.items():
        rates = (f"{clicks / max(1, size.rows):.4f}" for clicks in size.other_clicks.values())
        table.add_row(split, f"{size.rows:,}", f"{size.click_rate:.4f}", *rates, f"{size.files:,}")
    console.print(table)
    table = _tight_table("dense column", "transform", f"missing %\n{six}", f"drift\n{five}")
    for name, column in summary.dense.items():
        table.add_row(name, column.transform, percents(column.missing_share), drifts(column.drift))
    console.print(table)
    table = _tight_table("feature", "table\nrows", f"unknown %\n{six}", f"missing %\n{six}", f"drift\n{five}")
    table.columns[0].min_width = min(_MAX_NAME_WIDTH, max(map(len, summary.sparse)))
    # The one column that gives way where the terminal is narrow.
    table.add_column("most frequent\nand their share %", no_wrap=True, overflow="ellipsis")
    for name, feature in summary.sparse.items():
        table.add_row(
            name,
            f"{feature.num_embeddings:,}",
            percents(feature.unknown_share),
            percents(feature.missing_share),
            drifts(feature.drift),
            ", ".join(_frequent(value) for value in feature.most_frequent),
        )
    console.print(table)


def _tight_table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column(first, min_width=6)
    for header in others:
        table.add_column(header, justify="right", min_width=max(len(line) for line in header.splitlines()))
    return table


def _frequent(value: "FrequentValue") -> str:
    text = "(missing)" if value.value is None else escape(str(value.value))
    return f"{text} {100 * value.share:.1f}"
