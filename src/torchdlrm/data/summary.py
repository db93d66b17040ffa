"""What a dataset holds, for people and programs to look at; read from its manifest and vocabularies, not from its rows.

In: a `Dataset`.  Out: a `DatasetSummary`.  Cost: reads the vocabularies, none of the parts.
"""

from dataclasses import dataclass

from torchdlrm.data.dataset import Dataset
from torchdlrm.data.splits import SplitName


@dataclass(frozen=True)
class FrequentValue:
    """A value (None: missing), the share of the training rows that have it, and its id."""

    value: str | int | None
    share: float
    id: int


@dataclass(frozen=True)
class SplitSummary:
    """Size and click rate of a split."""

    rows: int
    clicks: int
    click_rate: float
    files: int


@dataclass(frozen=True)
class DenseSummary:
    """A dense column; shares are of the rows of each split."""

    transform: str
    missing_share: dict[SplitName, float]


@dataclass(frozen=True)
class SparseSummary:
    """A sparse feature; shares are of the rows of each split.  A missing value without an id is unknown as well."""

    num_embeddings: int
    unknown_share: dict[SplitName, float]
    missing_share: dict[SplitName, float]
    most_frequent: tuple[FrequentValue, ...]


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
    train_rows = splits["train"].rows

    def missing_share(name: str) -> dict[SplitName, float]:
        return {split_name: split.missing_rows[name] / split.rows for split_name, split in splits.items()}

    sparse = {}
    for name, num_embeddings in dataset.num_embeddings.items():
        vocabulary = dataset.vocabulary(name)
        values, table = vocabulary.text_values().head(num_values), vocabulary.table.head(num_values)
        sparse[name] = SparseSummary(
            num_embeddings=num_embeddings,
            unknown_share={split_name: split.unknown_rows[name] / split.rows for split_name, split in splits.items()},
            missing_share=missing_share(name),
            most_frequent=tuple(
                FrequentValue(value, count / train_rows, value_id)
                for value, count, value_id in zip(values, table["count"], table["id"], strict=True)
            ),
        )
    return DatasetSummary(
        splits={
            name: SplitSummary(split.rows, split.clicks, split.clicks / split.rows, len(split.files))
            for name, split in splits.items()
        },
        dense={
            name: DenseSummary(dataset.manifest.dense[name].transform, missing_share(name))
            for name in dataset.dense_names
        },
        sparse=sparse,
    )
