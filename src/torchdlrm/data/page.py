"""Writes a dataset as one self-contained HTML page: click rates, drift, unknown and missing values, frequencies.

In: a `Dataset`.  Out: HTML, in the style of a run's page.  Cost: reads the manifest, the vocabularies, and
the labels of 1,600 row groups at most.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchdlrm.data.dataset import ROW_GROUP_ROWS, Dataset, Split
from torchdlrm.data.judgements import judge_dataset
from torchdlrm.data.summary import DatasetSummary, summarize
from torchdlrm.errors import DatasetError
from torchdlrm.html import COLOURS, Bar, Chart, Curve, Part, bars, curve_chart, render, short
from torchdlrm.judged import NORMAL_95
from torchdlrm.units import show_number

_MOST_PIECES, _LEAST_ROWS, _MOST_GROUPS = 20, 500, 800  # of val, and of test
_COVERED = (1, 10, 100, 1_000)
_DRIFT = "Jensen-Shannon divergence of the values' distributions, in bits: 0 where they are the same, at most 1."
_UNKNOWN = "Values without an id, which are too rare in train or new: % of a feature's values."
_MISSING = "% of the rows."


def dataset_page(dataset: Dataset) -> str:
    """Make the page of a dataset.

    Raises:
        DatasetError: a file of it is damaged.
    """
    try:
        judgements, click_rates = judge_dataset(dataset), _click_rates(dataset)
    except (OSError, pa.ArrowException) as error:
        msg = f"{dataset.path}: cannot be read: {error}; `dlrm inspect {dataset.path}` looks at all of its files"
        raise DatasetError(msg) from error
    manifest, summary = dataset.manifest, summarize(dataset, 1)
    filled = [name for name, size in summary.splits.items() if size.rows]
    splits = [
        {"split": name, "rows": f"{split.rows:,}"}
        | {
            f"click rate, {label.name}": f"{split.clicks_of(label.name) / max(1, split.rows):.4f}"
            for label in dataset.schema.labels
        }
        for name, split in manifest.splits.items()
    ]
    parts = [
        Part("What to look at", judgements),
        Part("Click rate", [f"Split: {manifest.split_rule}."], [click_rates], splits),
        Part("Drift from train, worst first", [_DRIFT], rows=_worst_first(summary, filled[1:], "drift", 1.0)),
        Part("Unknown values, worst first", [_UNKNOWN], rows=_worst_first(summary, filled, "unknown_share", 100.0)),
        Part("Missing values, worst first", [_MISSING], rows=_worst_first(summary, filled, "missing_share", 100.0)),
        Part("Frequencies", charts=_coverage(summary), rows=_frequencies(summary), left=("most frequent value",)),
    ]
    entries = {
        "rows": f"{sum(size.rows for size in summary.splits.values()):,}",
        "dense features": f"{len(summary.dense):,}",
        "sparse features": f"{len(summary.sparse):,}",
        "rows of all tables": f"{sum(dataset.num_embeddings.values()):,}",
        "bad rows, which were skipped": f"{manifest.bad_rows.total:,}",
    }
    return render(f"Dataset {dataset.path.resolve().name}", parts, entries=entries.items())


def _worst_first(summary: DatasetSummary, splits: Sequence[str], what: str, scale: float) -> list[dict[str, str | Bar]]:
    """A row for each feature that has some of it in a split, and a bar of the split that has most."""
    found: dict[str, list[float]] = {}
    for name, feature in [*summary.dense.items(), *summary.sparse.items()]:
        by_split: Mapping[str, float] = getattr(feature, what, {})
        found[name] = [scale * by_split.get(split, 0.0) for split in splits]
    worst = sorted((name for name, values in found.items() if any(values)), key=lambda name: -max(found[name]))
    return [
        {
            "feature": name,
            "the largest": bar,
            **{split: show_number(value, 3) for split, value in zip(splits, found[name], strict=True)},
        }
        for name, bar in zip(worst, bars([max(found[name]) for name in worst]), strict=True)
    ]


def _click_rates(dataset: Dataset) -> Chart:
    curves = []
    filled = {name: record for name, record in dataset.manifest.splits.items() if record.rows}
    for place, (name, record) in enumerate(filled.items()):
        split = dataset.splits[name]
        if name == "train":  # shuffled: each piece of it is like all others
            rows, clicks = np.array([[split.rows] * 2, [record.clicks_of(dataset.label_name)] * 2], np.float64)
        else:
            rows, clicks = _pieces(split, dataset.label_name)
        rate = clicks / rows
        reach = NORMAL_95 * np.sqrt(rate * (1 - rate) / rows)
        x = (place + (np.arange(rows.size) + 0.5) / rows.size - 0.5).tolist()
        band = zip(x, np.maximum(0.0, rate - reach).tolist(), np.minimum(1.0, rate + reach).tolist(), strict=True)
        curves.append(Curve(name, COLOURS[place], [*zip(x, rate.tolist(), strict=True)], [*band]))
    return curve_chart(
        f"click rate over the log, label {dataset.label_name}: the band is its interval of 95 %",
        curves,
        (-0.5, len(filled) - 0.5),
        "rows of each split, in the order of the log; train is shuffled",
        lambda place: [*filled][round(place)],
        lambda _, rate: f"{rate:.4f}",
    )


def _pieces(split: Split, label: str) -> NDArray[np.float64]:
    """Rows, and clicks among them, in pieces of a split that are as long; in a large one of some row groups of each."""
    num_pieces = max(1, min(_MOST_PIECES, split.rows // _LEAST_ROWS))
    every = 1 + split.rows // (_MOST_GROUPS * ROW_GROUP_ROWS)
    found, first, number = np.zeros((2, num_pieces)), 0, 0
    for path in (file.path for file in split.files):
        with pq.ParquetFile(path, page_checksum_verification=True) as part:
            for group in range(part.num_row_groups):
                rows = part.metadata.row_group(group).num_rows
                if number % every == 0:
                    clicked = part.read_row_group(group, columns=[label]).column(0).to_numpy()
                    place = (first + np.arange(rows)) * num_pieces // split.rows
                    found += [np.bincount(place, weight, num_pieces) for weight in (None, clicked)]
                first, number = first + rows, number + 1
    return found


def _coverage(summary: DatasetSummary) -> list[Chart]:
    """Of the features with the most values."""
    known = {name: feature.coverage for name, feature in summary.sparse.items() if feature.coverage}
    most = sorted(known, key=lambda name: -max(known[name]))[: len(COLOURS)]
    if not most:
        return []
    curves = [
        Curve(name, COLOURS[i], [(math.log10(size), 100 * share) for size, share in known[name].items()])
        for i, name in enumerate(most)
    ]
    return [
        curve_chart(
            "how much of the rows the most frequent values cover, in features with the most values",
            curves,
            (0, max(max(x for x, _ in curve.points) for curve in curves)),
            "values, the most frequent ones first",
            lambda power: short(10**power),
            lambda power, share: f"{round(10**power):,} values cover {share:.1f} %",
            y_name="of the training rows, %",
        )
    ]


def _frequencies(summary: DatasetSummary) -> list[dict[str, str]]:
    rows = []
    for name, feature in summary.sparse.items():
        top, covered = next(iter(feature.most_frequent), None), feature.coverage
        shares = {f"top {size:,}, %": covered.get(size, max(covered.values(), default=math.nan)) for size in _COVERED}
        rows.append(
            {
                "feature": name,
                "table rows": f"{feature.num_embeddings:,}",
                "most frequent value": "-"
                if top is None
                else "(missing)"
                if top.value is None
                else str(top.value)[:24],
                **{column: show_number(100 * share, 1) for column, share in shares.items()},
                "all with an id, %": show_number(100 * max(covered.values(), default=math.nan), 1),
            }
        )
    return rows
