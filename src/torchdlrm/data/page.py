"""Writes a dataset as one self-contained HTML page: click rates, drift, unknown and missing values, frequencies.

In: a `Dataset`.  Out: HTML, in the style of a run's page.  Cost: reads the manifest, the vocabularies, and
the labels of val and test, batch by batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchdlrm.data.dataset import Dataset, Split
from torchdlrm.data.judgements import judge_dataset
from torchdlrm.data.summary import DatasetSummary, summarize
from torchdlrm.errors import DatasetError
from torchdlrm.html import COLOURS, Chart, Curve, Part, bars, curve_chart, render
from torchdlrm.judged import NORMAL_95
from torchdlrm.storage.mirror import fetch_missing
from torchdlrm.units import show_number

_MOST_PIECES, _LEAST_ROWS = 20, 500  # of val, and of test
_COVERED = (1, 10, 100, 1_000, 10_000)
_COVERS = "How much of the training values the most frequent ones are."
# What is told of every feature, worst first: heading, text, unit.
_WORST = {
    "drift": ("Drift from train", "Jensen-Shannon divergence of the distributions, in bits: 0 where they are alike", 1),
    "unknown_share": ("Unknown values", "Values without an id, too rare in train or new, % of a feature's values", 100),
    "missing_share": ("Missing values", "% of the rows", 100),
}


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
    manifest, summary, labels = dataset.manifest, summarize(dataset, 1), dataset.schema.labels
    rows = {name: size.rows for name, size in summary.splits.items() if size.rows}
    splits = [
        {"split": name, "rows": f"{number:,}"}
        | {f"click rate, {each.name}": f"{manifest.splits[name].clicks_of(each.name) / number:.4f}" for each in labels}
        for name, number in rows.items()
    ]
    parts = [
        Part("What to look at", judgements),
        Part("Click rate", [f"Split: {manifest.split_rule}."], [click_rates], splits),
        *(
            _worst_first(summary, [name for name in rows if name != "train" or what != "drift"], what)
            for what in _WORST
        ),
        Part("Frequencies", [_COVERS], rows=_frequencies(summary), left=("most frequent value",)),
    ]
    entries = {
        "rows": sum(rows.values()),
        "dense features": len(summary.dense),
        "sparse features": len(summary.sparse),
        "rows of all tables": sum(dataset.table_rows.values()),
        "bad rows, which were skipped": manifest.bad_rows.total,
    }
    cards = ((name, f"{number:,}") for name, number in entries.items())
    return render(f"Dataset {dataset.path.resolve().name}", parts, entries=cards)


def _worst_first(summary: DatasetSummary, splits: Sequence[str], what: str) -> Part:
    """A row for each feature that has some of it in a split, and a bar of the split that has most."""
    heading, text, unit = _WORST[what]
    features = {**summary.dense, **summary.sparse}
    found = {
        name: [unit * getattr(each, what, {}).get(split, 0.0) for split in splits] for name, each in features.items()
    }
    worst = sorted((name for name, values in found.items() if any(values)), key=lambda name: -max(found[name]))
    rows = [
        {"feature": name, "the largest": bar}
        | {split: show_number(value, 4 if unit == 1 else 2) for split, value in zip(splits, found[name], strict=True)}
        for name, bar in zip(worst, bars([max(found[name]) for name in worst]), strict=True)
    ]
    return Part(f"{heading}, worst first", [f"{text}."] * bool(rows), rows=rows)


def _click_rates(dataset: Dataset) -> Chart:
    curves = []
    filled = {name: record for name, record in dataset.manifest.splits.items() if record.rows}
    for place, (name, record) in enumerate(filled.items()):
        if name == "train":  # shuffled: each piece of it is like all others
            rows, clicks = np.array([[record.rows] * 2, [record.clicks_of(dataset.label_name)] * 2], np.float64)
        else:
            rows, clicks = _pieces(dataset.splits[name], dataset.label_name)
        x, rate = place + (np.arange(rows.size) + 0.5) / rows.size - 0.5, clicks / rows
        reach = NORMAL_95 * np.sqrt(rate * (1 - rate) / rows)
        line, band = (np.stack(of, axis=1).tolist() for of in ((x, rate), (x, (rate - reach).clip(0), rate + reach)))
        curves.append(Curve(name, COLOURS[place], line, band))
    return curve_chart(
        f"click rate over the log, label {dataset.label_name}: the band is its interval of 95 %",
        curves,
        (-0.5, len(filled) - 0.5),
        "rows of each split, in the order of the log; train is shuffled",
        lambda place: [*filled][round(place)],
        lambda _, rate: f"{rate:.4f}",
    )


def _pieces(split: Split, label: str) -> NDArray[np.float64]:
    """Rows, and clicks among them, in pieces of a split that are as long: [2, P]."""
    num_pieces = max(1, min(_MOST_PIECES, split.rows // _LEAST_ROWS))
    found, first = np.zeros((2, num_pieces)), 0
    for file in split.files:
        with pq.ParquetFile(fetch_missing(file.path), page_checksum_verification=True) as part:
            for batch in part.iter_batches(columns=[label]):
                place = (first + np.arange(batch.num_rows)) * num_pieces // split.rows
                found += [np.bincount(place, weight, num_pieces) for weight in (None, batch.column(0).to_numpy())]
                first += batch.num_rows
    return found


def _frequencies(summary: DatasetSummary) -> list[dict[str, str]]:
    """How much of the training values the most frequent ones cover, with a bar for the first ten."""
    rows = []
    for name, feature in summary.sparse.items():
        known, most = feature.coverage, max(feature.coverage.values(), default=math.nan)
        value = "".join("(missing)" if top.value is None else str(top.value)[:24] for top in feature.most_frequent)
        rows.append(
            {"feature": name, "most frequent value": value or "-", "the top 10": bars([1.0, known.get(10, most)])[1]}
            | {f"top {size:,}, %": show_number(100 * known.get(size, most), 1) for size in _COVERED}
            | {"rows of its table": feature.table_size}
        )
    return rows
