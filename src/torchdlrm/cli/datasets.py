"""Shows a dataset, to people and as JSON: what `dlrm inspect` says of one."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchdlrm.cli.terminal import look_at, print_json, print_table, progress_bars, say

if TYPE_CHECKING:
    from torchdlrm.data.manifest import Manifest
    from torchdlrm.data.summary import DatasetSummary, FrequentValue
    from torchdlrm.features.schema import FeatureSchema
    from torchdlrm.features.transforms import DenseTransform


def show_dataset(folder: Path, num_values: int, *, as_json: bool) -> None:
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
        about["buckets"] = buckets_as_dict(dataset.schema)
        about |= asdict(summary) | {"judgements": judgements}
        print_json({"kind": "dataset", "path": str(folder), "schema": dataset.schema.name} | about)
        return
    say(f"dataset {folder}, schema {manifest.feature_schema.name}, seed {manifest.seed}")
    say(f"split: {manifest.split_rule}")
    if manifest.period is not None:
        _print_turnover(manifest, summary)
    _print_summary(summary, dataset.label_name)
    print_inputs(dataset.schema, manifest.dense)
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
        if feature.turnover is not None and feature.table is None
    ]
    print_table("", rows)


def buckets_as_dict(schema: "FeatureSchema") -> dict[str, Any]:
    """Return the buckets that make categories of numbers, by the name of the feature, with fitted boundaries."""
    return {column.name: column.buckets.model_dump(mode="json") for column in schema.sparse if column.buckets}


def print_inputs(schema: "FeatureSchema", dense: "Mapping[str, DenseTransform]") -> None:
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


def _print_summary(summary: "DatasetSummary", label: str) -> None:
    """Print three tables; the values of each split are in one column, below the split's name."""
    splits = list(summary.splits)
    percents_head, drift_head = " ".join(f"{name:>5}" for name in splits), " ".join(f"{name:>4}" for name in splits[1:])

    def percents(fractions: Mapping[Any, float]) -> str:
        return " ".join(f"{100 * fractions[name]:5.1f}" for name in splits)

    def drifts(drift: Mapping[Any, float]) -> str:
        return " ".join(f"{drift[name]:4.2f}" if name in drift else f"{'-':>4}" for name in splits[1:])

    rows = [
        {"split": split, "rows": f"{size.rows:,}"}
        | {f"rate of {label}" if size.other_clicks else "click rate": f"{size.click_rate:.4f}"}
        | {f"rate of {name}": f"{clicks / max(1, size.rows):.4f}" for name, clicks in size.other_clicks.items()}
        | {"files": f"{size.files:,}"}
        for split, size in summary.splits.items()
    ]
    print_table("", rows)
    unknown, missing, drift = f"unknown %\n{percents_head}", f"missing %\n{percents_head}", f"drift\n{drift_head}"
    rows = [
        {"dense column": name, "transform": column.transform}
        | {missing: percents(column.missing_share), drift: drifts(column.drift)}
        for name, column in summary.dense.items()
    ]
    print_table("", rows)
    frequent = "most frequent\nand their share %"
    rows = [
        {"feature": name, "table\nrows": feature.table_size}
        | {unknown: percents(feature.unknown_share), missing: percents(feature.missing_share)}
        | {drift: drifts(feature.drift), frequent: ", ".join(map(_frequent, feature.most_frequent))}
        for name, feature in summary.sparse.items()
    ]
    print_table("", rows, cut=(frequent,))


def _frequent(value: "FrequentValue") -> str:
    return f"{'(missing)' if value.value is None else value.value} {100 * value.share:.1f}"
