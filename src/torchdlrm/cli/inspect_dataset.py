"""How `dlrm inspect` shows a dataset."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from torchdlrm.cli.terminal import console, print_json, progress_bars
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SPLIT_NAMES, SplitName
from torchdlrm.data.summary import DatasetSummary, FrequentValue, summarize
from torchdlrm.features.bad_rows import describe_bad_rows

_SPLITS = "".join(f"{name:>6}" for name in SPLIT_NAMES)
_HELD_OUT = "".join(f"{name:>5}" for name in SPLIT_NAMES[1:])


def show(folder: Path, *, num_values: int, as_json: bool) -> None:
    """Print what a dataset holds, after comparing every byte with its checksum.

    Raises:
        DatasetError: the dataset is not whole, or damaged.
    """
    dataset = Dataset.open(folder)
    with progress_bars("") as progress:
        dataset.verify(progress)
    summary = summarize(dataset, num_values)
    manifest = dataset.manifest
    if as_json:
        about = manifest.model_dump(
            mode="json", include={"format_version", "split_rule", "seed", "min_count", "max_rows", "source", "bad_rows"}
        )
        print_json(
            {"kind": "dataset", "path": str(folder), "schema": manifest.feature_schema.name} | about | asdict(summary)
        )
        return
    console.print(f"dataset {folder}, schema {manifest.feature_schema.name}, seed {manifest.seed}", soft_wrap=True)
    console.print(f"split: {manifest.split_rule}", soft_wrap=True)
    console.print(_splits_table(summary))
    console.print(_dense_table(summary))
    console.print(_sparse_table(summary))
    console.print("drift: from train, 0 where the distribution is the same, 1 where nothing is in common")
    if manifest.bad_rows.total:
        console.print(f"bad rows that were skipped: {manifest.bad_rows.total:,}")
        lines = describe_bad_rows(manifest.bad_rows.counts, manifest.bad_rows.examples)
        console.print("\n".join(lines), markup=False, soft_wrap=True)


def _splits_table(summary: DatasetSummary) -> Table:
    table = _table("split", "rows", "click rate", "files")
    for name, split in summary.splits.items():
        table.add_row(name, f"{split.rows:,}", f"{split.click_rate:.4f}", f"{split.files:,}")
    return table


def _dense_table(summary: DatasetSummary) -> Table:
    table = _table("dense column", "transform", f"missing %\n{_SPLITS}", f"drift\n{_HELD_OUT}")
    for name, column in summary.dense.items():
        table.add_row(name, column.transform, _percents(column.missing_share), _drift(column.drift))
    return table


def _sparse_table(summary: DatasetSummary) -> Table:
    table = _table("feature", "table\nrows", f"unknown %\n{_SPLITS}", f"missing %\n{_SPLITS}", f"drift\n{_HELD_OUT}")
    # The one column that gives way where the terminal is narrow.
    table.add_column("most frequent\nand their share %", no_wrap=True, overflow="ellipsis")
    for name, feature in summary.sparse.items():
        table.add_row(
            name,
            f"{feature.num_embeddings:,}",
            _percents(feature.unknown_share),
            _percents(feature.missing_share),
            _drift(feature.drift),
            ", ".join(_frequent(value) for value in feature.most_frequent),
        )
    return table


def _table(first: str, *others: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)
    table.add_column(first, min_width=6)
    for header in others:
        table.add_column(header, justify="right", min_width=max(len(line) for line in header.splitlines()))
    return table


def _percents(shares: Mapping[SplitName, float]) -> str:
    return "".join(f"{100 * shares[name]:6.1f}" for name in SPLIT_NAMES)


def _drift(drift: Mapping[SplitName, float]) -> str:
    return "".join(f"{drift[name]:5.2f}" for name in SPLIT_NAMES[1:])


def _frequent(value: FrequentValue) -> str:
    text = "(missing)" if value.value is None else escape(str(value.value))
    return f"{text} {100 * value.share:.1f}"
