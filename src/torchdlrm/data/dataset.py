"""Describes the encoded dataset on disk: its manifest, files and checksums. See docs/dataset-format.md.

In: a folder written by `torchdlrm.preprocess`.  Out: a `Dataset`, which names the files of each split, the
columns, the fitted transforms and the vocabularies.  Opening one reads `dataset.json` and asks for the size of every
file; `verify` reads them all.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchdlrm.data.splits import SplitName
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.features.bad_rows import BadRow, BadRows
from torchdlrm.features.schema import FeatureSchema, problems
from torchdlrm.features.transforms import FittedDense
from torchdlrm.features.vocabulary import Vocabulary
from torchdlrm.files import replacing_durably, sha256_of
from torchdlrm.folders import wrong_folder
from torchdlrm.notebook import notebook_view
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import mirror, places
from torchdlrm.toml import did_you_mean

_FIRST_VERSION, _WITH_BUCKETS, _WITH_PERIOD, _WITH_VOCABULARY_OF, _WITH_NEVER_MISSING, _WITH_IDS = range(1, 7)
FORMAT_VERSION = 7  # with vectors or histories
MANIFEST_NAME = "dataset.json"
# A reader takes a row group at a time: 16,384 rows of Criteo's 40 columns are 2.5 MB, read in 2 ms.
ROW_GROUP_ROWS = 16_384
# Values of features with fewer ids than this repeat often enough in a row group for a Parquet dictionary to pay.
_DICTIONARY_MAX_IDS = 2_048
_IDS, _WEIGHTS = (pa.list_(pa.field("element", kind, nullable=False)) for kind in (pa.int32(), pa.float32()))


def oldest_version(
    schema: FeatureSchema,
    *,
    has_period: bool = False,
    has_vocabulary_of: bool = False,
    has_never_missing: bool = False,
) -> int:
    """The oldest version of the format that says what must be said: older programs read all other datasets."""
    if schema.content or schema.has_histories:
        return FORMAT_VERSION
    if schema.has_ids:
        return _WITH_IDS
    if has_never_missing:
        return _WITH_NEVER_MISSING
    if has_vocabulary_of:
        return _WITH_VOCABULARY_OF
    return _WITH_PERIOD if has_period else _WITH_BUCKETS if schema.needs_newer_formats else _FIRST_VERSION


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class FileRecord(_Frozen):
    """A file of the dataset; `path` from the dataset's folder, with `/`."""

    path: str
    rows: int
    size_bytes: int
    sha256: str


class SplitRecord(_Frozen):
    """A split: its rows, how many were clicked, its files in order, how often its values were unknown or missing.

    Where there are several labels, `clicks` is of the first, and `other_clicks` has the others by name.  Where a column
    holds several values a row, `values` is the number of all, and `unknown_rows` counts values.  `drift` is how far
    each column's distribution is from that in `train`, see `torchdlrm.preprocessing.tally`.
    """

    rows: int
    clicks: int
    files: tuple[FileRecord, ...]
    unknown_rows: dict[str, int]
    missing_rows: dict[str, int]
    values: dict[str, int] = {}
    drift: dict[str, float] = {}
    other_clicks: dict[str, int] = {}

    def clicks_of(self, label: str) -> int:
        """How many rows have the label 1."""
        return self.other_clicks.get(label, self.clicks)

    def unknown_rate(self, feature: str) -> float:
        """The fraction of a feature's values that have no id."""
        return self.unknown_rows.get(feature, 0) / max(1, self.values.get(feature, self.rows))

    def missing_rate(self, column: str) -> float:
        """The fraction of the rows that lack a value."""
        return self.missing_rows.get(column, 0) / max(1, self.rows)


class TurnoverRecord(_Frozen):
    """How a feature's vocabulary differs from the one that it extends, where values come and go.

    Attributes:
        admitted: values that got an id.
        expired: values that lost theirs, by age or for want of room.
        reset: the file of the ids that stand for another value now, if there are any; all others that have a value in
            both stand for the same.
        candidates: the file of values that are too rare for an id so far, with their counts by period.
    """

    admitted: int
    expired: int
    reset: FileRecord | None = None
    candidates: FileRecord | None = None


class SparseRecord(_Frozen):
    """A sparse feature: the rows of its table, and its vocabulary; None where values are hashed or came as ids.

    `turnover` is there where values come and go.  Then the table may have more rows than the vocabulary has values.
    A feature that shares the table of another one has the same record, with the same files.
    """

    num_embeddings: int
    vocabulary: FileRecord | None
    turnover: TurnoverRecord | None = None

    @property
    def num_values(self) -> int:
        """How many values have an id in the vocabulary."""
        return 0 if self.vocabulary is None else self.vocabulary.rows

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Its files."""
        found = [self.vocabulary]
        if self.turnover is not None:
            found += [self.turnover.reset, self.turnover.candidates]
        return tuple(file for file in found if file is not None)


class ExtendedRecord(_Frozen):
    """The dataset whose vocabularies another one extends: the checksum of its dataset.json, and its period."""

    manifest_sha256: str
    period: int | None


class VocabularyOfRecord(_Frozen):
    """The dataset whose vocabularies and dense statistics were used, and whether new values got ids behind them."""

    manifest_sha256: str
    extended: bool


class SourceRecord(_Frozen):
    """A file of the log; `rows` are its good rows, `extra_columns` what its header names and the schema does not."""

    name: str
    size_bytes: int
    rows: int
    extra_columns: tuple[str, ...] | None = None


class BadRowsRecord(_Frozen):
    """The log's bad rows by reason, with the first few positions of each."""

    total: int
    counts: dict[str, int]
    examples: dict[str, tuple[BadRow, ...]]

    @classmethod
    def of(cls, bad_rows: BadRows) -> Self:
        """Make the record of bad rows that were counted."""
        examples = {reason: tuple(rows) for reason, rows in bad_rows.examples.items()}
        return cls(total=bad_rows.total, counts=bad_rows.counts, examples=examples)


class Manifest(_Frozen):
    """What `dataset.json` holds.  It depends on the log, the schema and the seed alone."""

    format: Literal["torchdlrm-dataset"] = "torchdlrm-dataset"
    format_version: int = _FIRST_VERSION
    feature_schema: FeatureSchema = Field(alias="schema")
    split_rule: str
    seed: int
    min_count: int
    max_embeddings: int | None = Field(alias="max_rows")
    row_group_rows: int
    part_rows: int
    dense: dict[str, FittedDense]
    sparse: dict[str, SparseRecord]
    splits: dict[SplitName, SplitRecord]
    source: tuple[SourceRecord, ...]
    bad_rows: BadRowsRecord
    # Where values come and go: of which period the vocabularies are, and by what rules.
    period: int | None = None
    expire_after: int | None = None
    admit_over: int = 1
    extends: ExtendedRecord | None = None
    # Where `extends` does not say it.
    vocabulary_of: VocabularyOfRecord | None = None

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the dataset but the manifest."""
        vocabularies = dict.fromkeys(file for record in self.sparse.values() for file in record.files)
        return (*vocabularies, *(file for split in self.splits.values() for file in split.files))

    def to_json(self) -> str:
        """Return the text of `dataset.json`."""
        content = self.model_dump(mode="json", by_alias=True)
        content["schema"] = self.feature_schema.model_dump(mode="json", by_alias=True, exclude_none=True)
        for split in content["splits"].values():
            if not split["other_clicks"]:  # a key that older readers do not know
                del split["other_clicks"]
        if self.period is None:  # likewise
            for key in ("period", "expire_after", "admit_over", "extends"):
                del content[key]
            for record in content["sparse"].values():
                del record["turnover"]
        if self.vocabulary_of is None:
            del content["vocabulary_of"]
        content["source"] = [record.model_dump(mode="json", exclude_none=True) for record in self.source]
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


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
        dataset = cls(path, _parse_manifest(text, manifest_path))
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
                raise ConfigError(msg + did_you_mean(name, names))
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
            msg = f"{path}: cannot be read ({error}); copy or preprocess the dataset again"
            raise DatasetError(msg) from error
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
                msg = (
                    f"{self.path / record.path}: damaged: sha256 is {found}, written was {record.sha256}; copy it again"
                )
                raise DatasetError(msg)
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
                msg = f"{file.path}: row group {group} is damaged: {error}"
                raise DatasetError(msg) from error
            frame = frame.head(left)
            left -= frame.height
            yield frame


def _parse_manifest(text: str, path: Path) -> Manifest:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        msg = f"{path}: not JSON ({error}); copy or preprocess the dataset again"
        raise DatasetError(msg) from error
    version = content.get("format_version") if isinstance(content, dict) else None
    if version not in range(_FIRST_VERSION, FORMAT_VERSION + 1):
        msg = (
            f"{path}: format_version is {version!r}, and this version of torchdlrm reads up to {FORMAT_VERSION}; "
            "preprocess the log again, or use the version that wrote it"
        )
        raise DatasetError(msg)
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        raise DatasetError("\n".join([f"{path}: damaged manifest", *problems(error)])) from error


def write_part(
    rows: pl.DataFrame, schema: FeatureSchema, num_embeddings: Mapping[str, int], folder: Path, name: str
) -> FileRecord:
    """Write encoded rows as one Parquet file `folder/name`; the same rows give the same bytes.

    No column has nulls, which spares readers the definition levels.  There are no statistics: rows are shuffled, so the
    range of a row group says nothing.
    """
    fields = [pa.field(column.name, pa.int8(), nullable=False) for column in schema.labels]
    floats = [column.name for column in (schema.weight, *schema.dense) if column is not None]
    fields += [pa.field(name, pa.float32(), nullable=False) for name in floats]
    kinds = {column.name: getattr(pa, column.stored or "")() for column in schema.content}
    vectors = {name: pa.list_(pa.field("element", kind, nullable=False)) for name, kind in kinds.items()}
    fields += [pa.field(name, kind, nullable=False) for name, kind in vectors.items()]
    for column in schema.sparse:
        fields.append(pa.field(column.name, _IDS if column.is_multi_valued else pa.int32(), nullable=False))
        if column.weights_name is not None:
            fields.append(pa.field(column.weights_name, _WEIGHTS, nullable=False))
    arrow_schema = pa.schema(fields)
    # One chunk a column: the writer starts a new page wherever a chunk ends.
    arrays = [rows[field.name].rechunk().to_arrow().cast(field.type) for field in fields]
    small = [field.name for field in fields if num_embeddings.get(field.name, 0) <= _DICTIONARY_MAX_IDS]
    lists = [name for column in schema.sparse if column.is_multi_valued for name in column.encoded_names]
    with replacing_durably(folder / name) as temporary:
        pq.write_table(
            pa.Table.from_arrays(arrays, schema=arrow_schema),
            temporary,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=1,
            use_dictionary=[f"{name}.list.element" if name in lists else name for name in small],
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        )
    return file_record(folder, name, rows.height)


def file_record(folder: Path, name: str, rows: int) -> FileRecord:
    """What the manifest says of the file `name` in the dataset's folder."""
    path = folder / name
    return FileRecord(path=name, rows=rows, size_bytes=path.stat().st_size, sha256=sha256_of(path))
