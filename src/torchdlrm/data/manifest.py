"""What `dataset.json` says of a dataset: its schema, transforms, vocabularies, files and checksums, as records.

See docs/dataset-format.md.
"""

import json
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from torchdlrm.data.splits import SplitName
from torchdlrm.errors import DatasetError
from torchdlrm.features.bad_rows import BadRow, BadRows
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import FittedDense
from torchdlrm.files import sha256_of
from torchdlrm.records import Record, problems

_FIRST_VERSION, _WITH_BUCKETS, _WITH_PERIOD, _WITH_VOCABULARY_OF, _WITH_NEVER_MISSING, _WITH_IDS = range(1, 7)
FORMAT_VERSION = 7  # with vectors or histories
MANIFEST_NAME = "dataset.json"


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


class FileRecord(Record):
    """A file of the dataset; `path` from the dataset's folder, with `/`."""

    path: str
    rows: int
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, folder: Path, path: str, rows: int) -> Self:
        """A file that has been written to the dataset's folder."""
        return cls(path=path, rows=rows, size_bytes=(folder / path).stat().st_size, sha256=sha256_of(folder / path))


class SplitRecord(Record):
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
    values: dict[str, int] = Field({})
    drift: dict[str, float] = Field({})
    other_clicks: dict[str, int] = Field({})

    def clicks_of(self, label: str) -> int:
        """How many rows have the label 1."""
        return self.other_clicks.get(label, self.clicks)

    def unknown_rate(self, feature: str) -> float:
        """The fraction of a feature's values that have no id."""
        return self.unknown_rows.get(feature, 0) / max(1, self.values.get(feature, self.rows))

    def missing_rate(self, column: str) -> float:
        """The fraction of the rows that lack a value."""
        return self.missing_rows.get(column, 0) / max(1, self.rows)


class TurnoverRecord(Record):
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


class SparseRecord(Record):
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


class ExtendedRecord(Record):
    """The dataset whose vocabularies another one extends: the checksum of its dataset.json, and its period."""

    manifest_sha256: str
    period: int | None


class VocabularyOfRecord(Record):
    """The dataset whose vocabularies and dense statistics were used, and whether new values got ids behind them."""

    manifest_sha256: str
    extended: bool


class SourceRecord(Record):
    """A file of the log; `rows` are its good rows, `extra_columns` what its header names and the schema does not."""

    name: str
    size_bytes: int
    rows: int
    extra_columns: tuple[str, ...] | None = None


class BadRowsRecord(Record):
    """The log's bad rows by reason, with the first few positions of each."""

    total: int
    counts: dict[str, int]
    examples: dict[str, tuple[BadRow, ...]]

    @classmethod
    def of(cls, bad_rows: BadRows) -> Self:
        """Make the record of bad rows that were counted."""
        examples = {reason: tuple(rows) for reason, rows in bad_rows.examples.items()}
        return cls(total=bad_rows.total, counts=bad_rows.counts, examples=examples)


class Manifest(Record):
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

    @classmethod
    def of_json(cls, text: str, path: Path) -> Self:
        """What the text of `dataset.json` says; messages name its path.

        Raises:
            DatasetError: it is damaged, or of another format version.
        """
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise DatasetError(f"{path}: not JSON ({error}); copy or preprocess the dataset again") from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if version not in range(_FIRST_VERSION, FORMAT_VERSION + 1):
            raise DatasetError(
                f"{path}: format_version is {version!r}, and this version of torchdlrm reads up to {FORMAT_VERSION}; "
                "preprocess the log again, or use the version that wrote it"
            )
        try:
            return cls.model_validate(content)
        except ValidationError as error:
            raise DatasetError("\n".join([f"{path}: damaged manifest", *problems(error)])) from error

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
