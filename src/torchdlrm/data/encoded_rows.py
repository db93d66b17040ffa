"""Rows between the raw log and the part files.

In: typed chunks, later the ids of their values.  Out: encoded rows dealt out to training buckets, val and test, and
what the manifest says of each split.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import polars as pl

from torchdlrm.data import shuffle
from torchdlrm.data.dataset import FileRecord, SplitRecord
from torchdlrm.data.splits import SPLIT_NAMES, SplitName
from torchdlrm.data.vocabulary import UNKNOWN_ID, DictionaryColumn
from torchdlrm.schema import FeatureSchema


@dataclass(frozen=True)
class EncodedChunk:
    """The good rows of a chunk: label and dense columns as read, sparse columns as codes into their values."""

    label_and_dense: pl.DataFrame
    sparse: dict[str, DictionaryColumn]

    @property
    def num_rows(self) -> int:
        """Good rows."""
        return self.label_and_dense.height


@dataclass
class Tally:
    """What the manifest says of the rows of a split."""

    rows: int = 0
    clicks: int = 0
    unknown_rows: Counter[str] = field(default_factory=Counter)
    missing_rows: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        chunk: EncodedChunk,
        rows: slice,
        ids_of_values: Mapping[str, npt.NDArray[np.int32]],
        schema: FeatureSchema,
    ) -> None:
        """Count `rows` of a chunk in."""
        frame = chunk.label_and_dense[rows]
        self.rows += frame.height
        self.clicks += int(frame[schema.label.name].sum())
        for column in schema.dense:
            self.missing_rows[column.name] += frame[column.name].null_count()
        for name, codes in chunk.sparse.items():
            counts = codes.counts(rows)
            self.unknown_rows[name] += int(counts[ids_of_values[name] == UNKNOWN_ID].sum())
            self.missing_rows[name] += int(counts[codes.values.is_null().to_numpy()].sum())

    def record(self, files: tuple[FileRecord, ...]) -> SplitRecord:
        """The split as it stands in the manifest."""
        return SplitRecord(
            rows=self.rows,
            clicks=self.clicks,
            unknown_rows=dict(self.unknown_rows),
            missing_rows=dict(self.missing_rows),
            files=files,
        )


class EncodedRows:
    """All encoded rows: the training rows in buckets, val and test in the order of the log."""

    def __init__(self, num_buckets: int) -> None:
        self.buckets: list[list[tuple[pl.DataFrame, npt.NDArray[np.int64]]]] = [[] for _ in range(num_buckets)]
        self.val: list[pl.DataFrame] = []
        self.test: list[pl.DataFrame] = []
        self.tallies: dict[SplitName, Tally] = {name: Tally() for name in SPLIT_NAMES}

    def scatter(self, frame: pl.DataFrame, first_row: int, seed: int) -> None:
        """Deal training rows out to the buckets; the first has position `first_row` in the log."""
        positions = np.arange(first_row, first_row + frame.height)
        bucket_of_rows = shuffle.buckets(positions, seed, len(self.buckets))
        order = np.argsort(bucket_of_rows, kind="stable")
        ends = np.cumsum(np.bincount(bucket_of_rows, minlength=len(self.buckets)))
        by_bucket = frame[order]
        for bucket, start, end in zip(self.buckets, (0, *ends[:-1]), ends, strict=True):
            bucket.append((by_bucket[int(start) : int(end)], positions[order[start:end]]))

    def training_parts(self, seed: int) -> Iterator[pl.DataFrame]:
        """Each bucket, shuffled, and dropped once it is taken."""
        while self.buckets:
            pieces = self.buckets.pop(0)
            positions = np.concatenate([p for _, p in pieces])
            yield pl.concat([frame for frame, _ in pieces])[shuffle.order_in_bucket(positions, seed)]
