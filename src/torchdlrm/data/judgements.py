"""Judges a dataset and the metrics of a run: what a person should know before they trust them, and what to do about it.

In: what the manifest counts, a row group, metrics.  Out: lines, one a judgement, each with its figure and its remedy.
"""

import math
from collections.abc import Mapping
from itertools import combinations

import polars as pl
import pyarrow.parquet as pq

from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SplitName
from torchdlrm.storage.reading import open_to_read

_MOST, _NEARLY_ALL = 0.5, 0.9
_NEW = 0.2  # by how much more is unknown in val than in train where values are new, and not just rare
_NEARLY_ONE_TO_ONE = 1.02
_SURE_AUC, _SURE_CALIBRATION = 0.02, 0.1  # what may be left of doubt: half an interval of 95 %
_MAX_NAMES = 5


def judge_dataset(dataset: Dataset) -> list[str]:
    """All that is to be said of a dataset; reads the manifest and a row group of the training rows.

    Raises:
        OSError: the row group cannot be read.
    """
    own = _named_rows(dataset)
    held_out = {name: split for name, split in dataset.manifest.splits.items() if name != "train" and split.rows}
    found = [few_clicks(name, split.rows, split.clicks_of(dataset.label_name)) for name, split in held_out.items()]
    found += [unknown_values(dataset, name) for name in [*held_out][:1]]
    return [line for line in (*found, rare_values(dataset, own), row_ids(own), *repeated_columns(dataset)) if line]


def judge_validation(dataset: Dataset, metrics: Mapping[str, float | None]) -> list[str]:
    """What is to be said of the last validation of a run that learnt this dataset; `metrics` are `BinaryMetrics`."""
    val, rows = dataset.manifest.splits["val"], int(metrics["rows"] or 0)
    clicks = round(val.clicks_of(dataset.label_name) * rows / max(1, val.rows))  # it may have judged a part of them
    lines = (few_clicks("val", rows, clicks), calibration("val", metrics, clicks), unknown_values(dataset, "val"))
    return [line for line in lines if line]


def few_clicks(split: str, rows: int, clicks: int, doubt: float | None = None) -> str:
    """Whether an AUC of these rows says little.

    `doubt` is half its interval; where that is not known, by Hanley and McNeil (1982), for an AUC of 0.75 and many of
    one class.
    """
    least = min(clicks, rows - clicks)
    doubt = 1.96 * 0.194 / math.sqrt(max(1, least)) if doubt is None else doubt
    if doubt <= _SURE_AUC:
        return ""
    what = f"{clicks:,} clicks in {rows:,} rows"
    if not least:
        return f"{split} has {what}, so no AUC: hold more rows out (split.{split} of the schema), or take a larger log"
    return (
        f"{split} has {what}: its AUC is known to about +-{doubt:.2f}. Differences between models are known better, "
        "where both predict these rows (dlrm compare); hold more rows out ([split] of the schema), or take a larger log"
    )


def calibration(split: str, metrics: Mapping[str, float | None], clicks: int | None = None) -> str:
    """Whether predictions are far from the click rate; `clicks` of the rows say what chance does, None: not known."""
    value = metrics.get("calibration")
    if value is None or math.isnan(value):
        return ""
    allowed = 0.25 if clicks is None else max(_SURE_CALIBRATION, 3 / math.sqrt(max(1, clicks)))
    if abs(value - 1) <= allowed:
        return ""
    return (
        f"calibration on {split} is {value:.2f}: the mean prediction is {abs(value - 1):.0%} too "
        f"{'high' if value > 1 else 'low'}, which bids and budgets feel; train longer, and on newer rows where "
        "`dlrm inspect DATASET` shows another click rate there than in train"
    )


def unknown_values(dataset: Dataset, split: SplitName) -> str:
    """Features most of whose values in a held-out split are unknown though most in train are not."""
    there, train = dataset.manifest.splits[split], dataset.manifest.splits["train"]
    found = {
        name: fraction
        for name in dataset.sparse_names
        if (fraction := there.unknown_rate(name)) > max(_MOST, train.unknown_rate(name) + _NEW)
    }
    if not found:
        return ""
    is_random = dataset.schema.split.rule == "random"
    remedy = "a live model (dlrm advance) learns new values as they come (docs/faq.md#unknown-ids)"
    if not is_random:
        remedy += ', and [split] rule = "random" in the schema judges on values that train has seen'
    return f"{_names(found)}: most values in {split} are new, and what was learnt of others cannot help; {remedy}"


def rare_values(dataset: Dataset, named_rows: Mapping[str, float]) -> str:
    """Features most of whose training values are too rare for an id; not those that name the rows."""
    train = dataset.manifest.splits["train"]
    fractions = {name: train.unknown_rate(name) for name in dataset.sparse_names if name not in named_rows}
    found = {name: fraction for name, fraction in fractions.items() if fraction > _MOST}
    if not found:
        return ""
    return f"{_names(found)}: most training values are too rare for an id; lower min_count, or give the column `hash`"


def row_ids(named_rows: Mapping[str, float]) -> str:
    """Features that name the rows: nothing learnt of a value is ever met again."""
    if not named_rows:
        return ""
    return f"{_names(named_rows)}: nearly every training row has a value of its own; give the column the role ignore"


def repeated_columns(dataset: Dataset) -> list[str]:
    """Features whose values go one to one with another's, in a row group of the training rows.

    Raises:
        OSError: the row group cannot be read.
    """
    files = dataset.splits["train"].files
    single = [column.name for column in dataset.schema.sparse if not column.is_multi_valued]
    if not files or not single:
        return []
    with open_to_read(files[0].path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
        rows = pl.DataFrame(file.read_row_group(0, columns=single))
    num_values, found = {name: rows[name].n_unique() for name in single}, {}
    for first, second in combinations(single, 2):
        few, many = sorted((num_values[first], num_values[second]))
        if second in found or few < 2 or many > _NEARLY_ONE_TO_ONE * few:
            continue
        if rows.select(pl.struct(first, second).n_unique()).item() <= _NEARLY_ONE_TO_ONE * many:
            found[second] = first
    return [
        f"{name}: repeats {other}, value for value; give one of them the role ignore, which saves its table"
        for name, other in found.items()
    ]


def _named_rows(dataset: Dataset) -> dict[str, float]:
    """Features with nearly as many values as training rows, and which fraction of the rows has its own."""
    train = dataset.manifest.splits["train"]
    found = {}
    for column in dataset.schema.sparse:
        name, record = column.name, dataset.manifest.sparse[column.name]
        is_shared = len(dataset.schema.sharing(column.owner)) > 1  # whose values may all be another column's
        if record.vocabulary is not None and name not in train.values and not is_shared:
            fraction = max(train.unknown_rate(name), record.num_values / max(1, train.rows))
            if fraction > _NEARLY_ALL:
                found[name] = min(1.0, fraction)
    return found


def _names(fractions: Mapping[str, float]) -> str:
    most = sorted(fractions.items(), key=lambda item: -item[1])
    shown = ", ".join(f"{name} ({fraction:.1%})" for name, fraction in most[:_MAX_NAMES])
    return shown + (f" and {len(most) - _MAX_NAMES} more" if len(most) > _MAX_NAMES else "")
