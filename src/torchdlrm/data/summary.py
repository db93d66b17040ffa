"""Summarises a dataset for people and programs, from its manifest and vocabularies without reading its rows.

In: a `Dataset`.  Out: a `DatasetSummary`.  Cost: reads the vocabularies, none of the parts.
"""

from dataclasses import dataclass

from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import TurnoverRecord
from torchdlrm.data.splits import SplitName


@dataclass(frozen=True)
class FrequentValue:
    """A value (None: missing), the share of the training rows that have it, and its id.

    Where values come and go, the share is of the rows of all periods that were counted for a value with an id.
    """

    value: str | int | None
    share: float
    id: int


@dataclass(frozen=True)
class SplitSummary:
    """Size and click rate of a split; where there are several labels, of the first, and by name of the others."""

    rows: int
    clicks: int
    click_rate: float
    files: int
    other_clicks: dict[str, int]


@dataclass(frozen=True)
class DenseSummary:
    """A dense column; shares are of the rows of each split. Of vectors no drift is known."""

    transform: str
    missing_share: dict[SplitName, float]
    drift: dict[SplitName, float]


@dataclass(frozen=True)
class Turnover:
    """How many values got an id in a period, and lost theirs; how many ids were given again; how many are too rare."""

    admitted: int
    expired: int
    reset: int
    candidates: int


@dataclass(frozen=True)
class SparseSummary:
    """A sparse feature; shares are of the rows of each split.  A missing value without an id is unknown as well.

    Where `table` is the name of another feature, it shares that one's vocabulary and table.
    Where a row has several values, the unknown share is of the values.  `drift` is how far the distribution in a split
    is from that in train (`torchdlrm.preprocessing.tally`).  `num_values` have an id by the vocabulary.  Without one,
    there are no most frequent values.  `coverage` is the share of the training values that have one of the most
    frequent 1, 10, 100, ... ids, and in the end of all.
    """

    num_embeddings: int
    num_values: int
    turnover: Turnover | None
    unknown_share: dict[SplitName, float]
    missing_share: dict[SplitName, float]
    drift: dict[SplitName, float]
    most_frequent: tuple[FrequentValue, ...]
    coverage: dict[int, float]
    table: str | None = None

    @property
    def table_size(self) -> str:
        """The rows of its table, or whose table it shares, for people."""
        return f"{self.num_embeddings:,}" if self.table is None else f"as {self.table}"


@dataclass(frozen=True)
class DatasetSummary:
    """What `dlrm inspect` shows of a dataset."""

    splits: dict[SplitName, SplitSummary]
    dense: dict[str, DenseSummary]
    sparse: dict[str, SparseSummary]


def summarize(dataset: Dataset, num_values: int) -> DatasetSummary:
    """Look at a dataset; of each sparse feature the `num_values` most frequent values.

    Raises:
        DatasetError: a vocabulary is damaged.
    """
    splits = dataset.manifest.splits
    sparse = {}
    for column in dataset.schema.sparse:
        name, num_embeddings = column.name, dataset.num_embeddings[column.name]
        most_frequent, coverage = _frequencies(dataset, name, num_values)
        sparse[name] = SparseSummary(
            num_embeddings=num_embeddings,
            num_values=dataset.manifest.sparse[name].num_values,
            turnover=_turnover(dataset.manifest.sparse[name].turnover),
            unknown_share={split_name: split.unknown_rate(name) for split_name, split in splits.items()},
            missing_share={split_name: split.missing_rate(name) for split_name, split in splits.items()},
            drift={split_name: split.drift.get(name, 0.0) for split_name, split in splits.items()},
            most_frequent=most_frequent,
            coverage=coverage,
            table=column.table,
        )
    return DatasetSummary(
        splits={
            name: SplitSummary(
                split.rows, split.clicks, split.clicks / max(1, split.rows), len(split.files), split.other_clicks
            )
            for name, split in splits.items()
        },
        dense={
            column.name: DenseSummary(
                f"{column.transform}, {column.size} numbers" if column.size else column.transform,
                {split_name: split.missing_rate(column.name) for split_name, split in splits.items()},
                {name: split.drift.get(column.name, 0.0) for name, split in splits.items() if column.size is None},
            )
            for column in (*dataset.schema.dense, *dataset.schema.content)
        },
        sparse=sparse,
    )


def _frequencies(dataset: Dataset, name: str, num_values: int) -> tuple[tuple[FrequentValue, ...], dict[int, float]]:
    if dataset.manifest.sparse[name].vocabulary is None:
        return (), {}
    train = dataset.manifest.splits["train"]
    vocabulary = dataset.vocabulary(name)
    table = vocabulary.table.with_columns(vocabulary.text_values().alias("value"))
    owner = next(column.owner for column in dataset.schema.sparse if column.name == name)
    counted = sum(train.values.get(column.name, train.rows) for column in dataset.schema.sharing(owner))
    if dataset.period is not None:
        table, counted = table.sort("count", descending=True, maintain_order=True), int(table["count"].sum())
    rows = table.head(num_values).select("value", "count", "id").iter_rows()
    covered = table["count"].cum_sum()
    sizes = [*(10**power for power in range(10) if 10**power < table.height), *[table.height] * (table.height > 0)]
    return (
        tuple(FrequentValue(value, count / max(1, counted), value_id) for value, count, value_id in rows),
        {size: covered[size - 1] / max(1, counted) for size in sizes},
    )


def _turnover(record: TurnoverRecord | None) -> Turnover | None:
    if record is None:
        return None
    reset, candidates = (0 if file is None else file.rows for file in (record.reset, record.candidates))
    return Turnover(record.admitted, record.expired, reset, candidates)
