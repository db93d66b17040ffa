"""Opens the encoded dataset on disk, and reads and verifies its files. See docs/dataset-format.md.

In: a folder written by `torchdlrm.preprocess`.  Out: a `Dataset`, which names the files of each split, the
columns, the fitted transforms and the vocabularies.  Opening one reads `dataset.json` and asks for the size of every
file; `verify` reads them all.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.manifest import MANIFEST_NAME, FileRecord, Manifest
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vocabulary import Vocabulary
from torchdlrm.files import sha256_of
from torchdlrm.folders import wrong_folder
from torchdlrm.notebook import notebook_view
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import mirror, places
from torchdlrm.toml import did_you_mean


@dataclass(frozen=True)
class File:
    """A Parquet file of a split."""

    path: Path
    rows: int
    sha256: str


@dataclass(frozen=True)
class Split:
    """The files of a split, in order, and the sum of their rows."""

    rows: int
    files: tuple[File, ...]


@dataclass(frozen=True)
class Dataset:
    """A complete dataset; of one at a URL, the manifest alone is here from the start: see `file`."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Read the manifest, and see that every file is there with its size.

        Raises:
            DatasetError: there is no dataset, it is not complete, or its format version is another.
            StorageError: the bucket that it is in cannot be read.
        """
        path = mirror.fetch(places.located(path), [MANIFEST_NAME])
        manifest_path = path / MANIFEST_NAME
        try:
            text = manifest_path.read_text(encoding="utf-8")
        except OSError as error:
            raise wrong_folder(path, "dataset") from error
        dataset = cls(path, Manifest.of_json(text, manifest_path))
        dataset._check_sizes()
        return dataset

    def with_labels(self, chosen: Sequence[str] = ()) -> Self:
        """The same dataset, to learn some of its labels and be judged by the first; without any, the first it has.

        Raises:
            ConfigError: it has no such label.
        """
        schema, key = self.schema, "train.labels" if len(chosen) > 1 else "train.label"
        names = [column.name for column in schema.labels]
        for name in chosen:
            if name not in names:
                msg = f"`{key}`: {self.path} has no label {name!r}; it has {', '.join(names)}"
                several = ",".join(re.split(r"[\s,;]+", name))  # as people write a list
                hint = f"; several are `train.labels` = {several}" if "," in several else did_you_mean(name, names)
                raise ConfigError(msg + hint)
        if len(names) == 1:
            return self
        one = next(iter(chosen), names[0]) if len(chosen) < 2 else None
        schema = schema.model_copy(update={"run_label": one, "run_labels": None if one else (*chosen,)})
        return replace(self, manifest=self.manifest.model_copy(update={"feature_schema": schema}))

    @property
    def schema(self) -> FeatureSchema:
        """The columns of the log that the dataset was made of."""
        return self.manifest.feature_schema

    @property
    def num_embeddings(self) -> dict[str, int]:
        """Rows of each sparse feature's table, in the order of the schema."""
        return {column.name: self.manifest.sparse[column.name].num_embeddings for column in self.schema.sparse}

    @property
    def table_rows(self) -> dict[str, int]:
        """Rows of each table, by the feature that owns it; others may share it."""
        return {column.owner: self.manifest.sparse[column.owner].num_embeddings for column in self.schema.sparse}

    @property
    def period(self) -> int | None:
        """The number of the period that its vocabularies are of; None where values do not come and go."""
        return self.manifest.period

    @property
    def label_name(self) -> str:
        """The name of the column of the label that is learnt and judged by, which is int8: 0 or 1."""
        return self.schema.label.name

    @property
    def weight_name(self) -> str | None:
        """The name of the column of the rows' weights, which is float32 and not negative, if there is one."""
        return None if self.schema.weight is None else self.schema.weight.name

    @property
    def dense_names(self) -> tuple[str, ...]:
        """The names of the dense columns, which are float32."""
        return tuple(column.name for column in self.schema.dense)

    @property
    def sparse_names(self) -> tuple[str, ...]:
        """The sparse columns: int32, from 0 to `num_embeddings` - 1."""
        return tuple(column.name for column in self.schema.sparse)

    @property
    def splits(self) -> dict[str, Split]:
        """The files of `train`, `val` and `test`."""
        return {
            name: Split(split.rows, tuple(File(self.path / file.path, file.rows, file.sha256) for file in split.files))
            for name, split in self.manifest.splits.items()
        }

    def _repr_html_(self) -> str:
        """What a notebook shows: its splits."""
        label = self.label_name
        rows = [
            {
                "split": name,
                "rows": split.rows,
                "click rate": split.clicks_of(label) / split.rows if split.rows else None,
            }
            for name, split in self.manifest.splits.items()
        ]
        facts = {"label": label, "dense": len(self.dense_names), "sparse": len(self.sparse_names)}
        return notebook_view(f"dataset {self.path}", facts | {"rows of tables": sum(self.table_rows.values())}, rows)

    def vocabulary(self, name: str) -> Vocabulary:
        """The vocabulary of a sparse feature.

        Raises:
            DatasetError: its file is damaged, or the feature has none.
        """
        kind = next(column.vocabulary_kind for column in self.schema.sparse if column.name == name)
        record = self.manifest.sparse[name].vocabulary
        if record is None:
            msg = f"{self.path}: feature {name} has no vocabulary: its values are hashed, or were ids already"
            raise DatasetError(msg)
        return Vocabulary.read(self.file(record), name, kind)

    def file(self, record: FileRecord) -> Path:
        """One of its files, once it is on this host."""
        return mirror.fetch_missing(self.path / record.path)

    def reset_ids(self, name: str) -> npt.NDArray[np.int32]:
        """The ids of a sparse feature that stand for another value than in the dataset whose vocabularies it extends.

        Returns:
            Ascending, int32 [R]; those that the other dataset has no row for are left out.

        Raises:
            DatasetError: their file is damaged.
        """
        turnover = self.manifest.sparse[name].turnover
        if turnover is None or turnover.reset is None:
            return np.zeros(0, np.int32)
        path = self.file(turnover.reset)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise DatasetError(f"{path}: cannot be read ({error}); copy or preprocess the dataset again") from error
        return table["id"].to_numpy()

    def verify(self, progress: ProgressListener = SILENT) -> None:
        """Read every file and compare its checksum.

        Args:
            progress: shows the bytes read.

        Raises:
            DatasetError: a file is not what was written.
        """
        progress.start_phase("verify", sum(record.size_bytes for record in self.manifest.files), unit="bytes")
        self._check_sizes()
        for record in self.manifest.files:
            found = sha256_of(self.file(record))
            if found != record.sha256:
                raise DatasetError(
                    f"{self.path / record.path}: damaged: sha256 is {found}, written was {record.sha256}; copy it again"
                )
            progress.advance(record.size_bytes)

    def _check_sizes(self) -> None:
        sizes = mirror.sizes_of(self.path, [record.path for record in self.manifest.files])
        for record, size_bytes in zip(self.manifest.files, sizes.values(), strict=True):
            if size_bytes != record.size_bytes:
                found = "missing" if size_bytes is None else f"{size_bytes:,} bytes long"
                msg = f"{self.path / record.path}: {found}, but {MANIFEST_NAME} says {record.size_bytes:,} bytes; "
                msg += "copy the dataset again"
                raise DatasetError(msg)


def rows_of_split(
    dataset: Dataset, split: str, max_rows: int | None = None, columns: Sequence[str] | None = None
) -> Iterator[pl.DataFrame]:
    """The first rows of a split, or all, a row group at a time, with all columns of the dataset or some.

    Raises:
        DatasetError: a row group is damaged.
    """
    left = dataset.splits[split].rows if max_rows is None else max_rows
    for file in dataset.splits[split].files:
        parquet = pq.ParquetFile(mirror.fetch_missing(file.path), page_checksum_verification=True)
        for group in range(parquet.num_row_groups):
            if not left:
                return
            try:
                frame = pl.DataFrame(parquet.read_row_group(group, columns=columns))
            except OSError as error:
                raise DatasetError(f"{file.path}: row group {group} is damaged: {error}") from error
            frame = frame.head(left)
            left -= frame.height
            yield frame
