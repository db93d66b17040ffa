"""`bundle.json`: what a bundle holds, and checksums by which every bit of it is known.  See docs/bundle-format.md."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, field_validator

from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.config import ModelConfig
from torchdlrm.config.model import in_one_list, in_sections
from torchdlrm.errors import BundleError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.tables import Feature, FeatureTable, Table, check_features, feature_tables, sparse_features
from torchdlrm.features.transforms import FittedDense
from torchdlrm.files import regular_file, sha256_of
from torchdlrm.folders import KindName, wrong_folder
from torchdlrm.judging import RecalibrationMethod
from torchdlrm.judging.recalibration import Recalibration
from torchdlrm.model.model_class import ModelClassRecord
from torchdlrm.records import Record, problems
from torchdlrm.storage import mirror

_WITHOUT_MODEL_CLASS, _WITH_MODEL_CLASS, _WITHOUT_PERIOD, _WITH_PERIOD = range(2, 6)
_WITH_NEVER_MISSING, _WITH_IDS, WITH_RECALIBRATION, _WITH_SETTINGS = range(6, 10)
FORMAT_VERSION = 10  # with vectors, histories, their pooling, or several labels
MANIFEST_NAME, WEIGHTS_NAME, SAMPLE_NAME = "bundle.json", "weights.safetensors", "sample.parquet"
_VERSION_DIGITS = 12
# Of 1 TB of weights it has 5 MB.
_MAX_BYTES = 64 * 2**20
# Numbers that a row may be on its way through the model: the paper's has 3,500.
_MAX_ROW_NUMBERS = 2**20
_MAX_PROBLEMS, _MAX_PROBLEM_LENGTH = 5, 300

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def oldest_version(
    schema: FeatureSchema,
    model: ModelConfig,
    model_class: ModelClassRecord | None,
    period: int | None = None,
    *,
    has_groups: bool = False,
    has_never_missing: bool = False,
) -> int:
    """The oldest version of the format that says what must be said: older programs read all other bundles."""
    has_poolings = any(feature.pooling != "sum" for feature in model.features.values())
    needed = {
        FORMAT_VERSION: has_groups or has_poolings or schema.content or schema.has_histories or len(schema.learnt) > 1,
        _WITH_SETTINGS: model.settings,
        _WITH_IDS: schema.has_ids,
        _WITH_NEVER_MISSING: has_never_missing,
        _WITH_PERIOD: period is not None,
        _WITHOUT_PERIOD: model.interaction != "dot" or model.features or schema.needs_newer_formats,
        _WITH_MODEL_CLASS: model_class is not None,
    }
    return next((version for version, is_needed in needed.items() if is_needed), _WITHOUT_MODEL_CLASS)


class SealedJson(Record):
    """A JSON file with a checksum of its own content.

    Attributes:
        format: what the file is.
        format_version: of that; newer ones are refused.
        content_sha256: of this JSON without this key.
    """

    _file_name: ClassVar[str]
    _newest_version: ClassVar[int]
    _kind: ClassVar[KindName]

    format: str
    format_version: int
    content_sha256: str = ""

    def sealed(self) -> Self:
        """The same with its `content_sha256`."""
        text = json.dumps(self._content() | {"content_sha256": ""}, ensure_ascii=False)
        return self.model_copy(update={"content_sha256": hashlib.sha256(text.encode()).hexdigest()})

    def to_json(self) -> str:
        """The text of the file; the same content gives the same text."""
        return json.dumps(self._content(), indent=1, ensure_ascii=False) + "\n"

    def write(self, folder: Path) -> None:
        """Write the file to its folder, sealed."""
        (folder / self._file_name).write_text(self.sealed().to_json(), encoding="utf-8")

    def _content(self) -> dict[str, Any]:
        return self.model_dump(mode="json", by_alias=True)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """What is in a folder, with every bit of its JSON file checked.

        Raises:
            BundleError: there is no such file, it is damaged, or its format is newer than this program.
        """
        path = mirror.fetch(folder, [cls._file_name]) / cls._file_name
        try:
            size_bytes = regular_file(folder, cls._file_name).stat().st_size
            if size_bytes > _MAX_BYTES:
                raise BundleError(_damaged(path, f"{size_bytes:,} bytes long"))
            text = path.read_bytes().decode("utf-8")
            content = json.loads(text)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise wrong_folder(folder, cls._kind) from error
        except OSError as error:
            raise BundleError(f"{path}: cannot be read: {error}") from error
        except BundleError:
            raise
        except (ValueError, RecursionError) as error:
            raise BundleError(_damaged(path, f"not JSON ({error})")) from error
        version = content.get("format_version") if isinstance(content, dict) else None
        if isinstance(version, int) and version > cls._newest_version:
            raise BundleError(
                f"{path}: format_version is {version}, and this version of torchdlrm reads up to "
                f"{cls._newest_version}; use the version that wrote it, or export the run again with this one"
            )
        try:
            manifest = cls.model_validate(content)
        except ValidationError as error:
            lines = [line[:_MAX_PROBLEM_LENGTH] for line in problems(error)[:_MAX_PROBLEMS]]
            raise BundleError("\n".join([_damaged(path, "not what was written"), *lines])) from error
        # Whatever bit is flipped, either the text is no longer what this content gives, or the content has another sum.
        if manifest.to_json() != text or manifest.sealed().content_sha256 != manifest.content_sha256:
            raise BundleError(_damaged(path, "its checksum is not that of its content"))
        return manifest


class StoredFile(Record):
    """A file of the bundle."""

    size_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256

    @classmethod
    def of(cls, path: Path) -> Self:
        """A file that has been written."""
        return cls(size_bytes=path.stat().st_size, sha256=sha256_of(path))

    def check_size(self, folder: Path, name: str, kind: KindName) -> None:
        """See that the file is there, a regular one, as long as it was written.

        Raises:
            BundleError: it is not.
        """
        try:
            size_bytes = regular_file(folder, name).stat().st_size
        except FileNotFoundError:
            size_bytes = None
        except (OSError, ValueError) as error:
            raise BundleError(f"{error}; a {kind} is made of files of its own") from error
        if size_bytes != self.size_bytes:
            found = "missing" if size_bytes is None else f"{size_bytes:,} bytes long"
            msg = f"{folder / name}: {found}, but it was written with {self.size_bytes:,} bytes; copy the {kind} again"
            raise BundleError(msg)

    def check_content(self, folder: Path, name: str, kind: KindName) -> None:
        """See that the file holds what was written.

        Raises:
            BundleError: it does not.
        """
        found = sha256_of(folder / name)
        if found != self.sha256:
            msg = f"{folder / name}: damaged: sha256 is {found}, written was {self.sha256}; copy the {kind} again"
            raise BundleError(msg)


class ServedFeature(Record):
    """A sparse feature; one that shares another's table has the same record.

    Attributes:
        num_embeddings: its ids: rows of its table, where it has one.
        precision: of its table or its two.
        vocabulary: its vocabulary's file; None where values are hashed or are ids already.
        index: the same vocabulary's file made for looking up, memory-mapped; None where there is no vocabulary.
    """

    num_embeddings: Annotated[int, Field(ge=1, lt=2**31)]  # ids are int32
    precision: TablePrecision
    vocabulary: str | None
    index: str | None = None


class Origin(Record):
    """Where the weights came from.

    Attributes:
        run: its folder's name.
        step: after which the checkpoint was saved.
        checkpoint: what it was chosen for: the best of the val split, the last, or the step itself; None in a bundle of
            format version 1, which does not say.
        dataset_sha256: of the dataset's manifest.
        versions: of the libraries that trained.
    """

    run: str
    step: int
    checkpoint: Literal["best", "last", "step"] | None = None
    dataset_sha256: str
    versions: dict[str, str]


class PredictionRecord(Record):
    """How good predictions are on the rows of the check."""

    auc: float | None
    logloss: float


class CheckRecord(Record):
    """The check at the end of the export: the same rows by the checkpoint and by the bundle.

    Attributes:
        split: which rows were predicted.
        rows: how many.
        largest_difference: between the two probabilities of a row.
        largest_allowed: what rounding the embeddings did on these rows, and what the arithmetic may do.
        checkpoint: by the eager float32 model.
        bundle: as served.
        labels: the same of every label but the first, by its name.
    """

    split: str
    rows: int
    largest_difference: float
    largest_allowed: float
    checkpoint: PredictionRecord
    bundle: PredictionRecord
    labels: dict[str, "CheckRecord"] = Field({}, exclude_if=lambda labels: not labels)


class BundleManifest(SealedJson):
    """What `bundle.json` holds.

    Attributes:
        content_sha256: of this JSON without this key; the bundle's version is its beginning.
        name: the model's name.
        feature_schema: the columns of a raw row.
        dense: the fitted transform of each dense column.
        sparse: each sparse feature, in the order of the schema.
        model: the model's shape.
        model_class: what identifies the user's model class, where there is one; none of its code is in here.
        groups: tables that it asks for besides those of the vectors.
        dense_precision: what the dense, interaction and over arch may compute in.
        period: number of the last period that was learnt from; None where logs have no periods.
        recalibration: what logits become before they are predicted; of several labels by label.
        source: where it came from.
        check: the check at the export's end.
        block_bytes: of the weights' file.
        block_sha256: of its blocks, in order.
        files: every file but this one, by its path within the bundle.
    """

    _file_name: ClassVar[str] = MANIFEST_NAME
    _newest_version: ClassVar[int] = FORMAT_VERSION
    _kind: ClassVar[KindName] = "bundle"

    format: Literal["torchdlrm-bundle"] = "torchdlrm-bundle"
    format_version: int = _WITHOUT_MODEL_CLASS
    name: str
    feature_schema: FeatureSchema = Field(alias="schema")
    dense: dict[str, FittedDense]
    sparse: dict[str, ServedFeature]
    model: ModelConfig
    model_class: ModelClassRecord | None = None
    groups: tuple[Table, ...] = ()
    dense_precision: DensePrecision
    period: Annotated[int, Field(ge=0)] | None = None
    recalibration: Recalibration | dict[str, Recalibration] | None = None
    source: Origin
    check: CheckRecord | None
    files: dict[str, StoredFile]
    block_bytes: int
    block_sha256: tuple[Sha256, ...]

    @field_validator("model", mode="before")
    @classmethod
    def _with_sections(cls, model: Any) -> Any:
        return in_sections(model) if isinstance(model, dict) else model

    def _contradictions(self) -> Iterator[str]:
        """What the parts say of each other, so that whatever predicts by them may rely on it."""
        schema, model = self.feature_schema, self.model
        for key, records, columns in (("dense", self.dense, schema.dense), ("sparse", self.sparse, schema.sparse)):
            if list(records) != [column.name for column in columns]:
                yield f"{key} does not have the {key} columns of the schema in their order"
        yield from self._sparse_contradictions()
        dim, num_vectors = model.embedding_dim, len(self.sparse) + 2
        if dim % 4 or model.dense_arch_layer_sizes[-1] != dim or model.over_arch_layer_sizes[-1] != 1:
            yield f"model: embedding_dim {dim} is no multiple of 4, or the arches do not end with it and with 1"
        yield from model.interaction_problems()
        of_interaction = model.interaction_config.layer_sizes
        layers = (*model.dense_arch_layer_sizes, *of_interaction, *model.over_arch_layer_sizes)
        if max(dim * num_vectors, *layers) > _MAX_ROW_NUMBERS:
            yield f"model: a row would be more than {_MAX_ROW_NUMBERS:,} numbers"
        yield from model.feature_problems()
        check_features(model, self.features, self.groups)
        single = {None, *(feature.name for feature in self.features if not feature.is_multi_valued)}
        for label, of in self.recalibrations.items():
            if of.by not in single or label not in {column.name for column in schema.learnt}:
                yield f"recalibration: {label} is not predicted, or it is by {of.by}, which is no sparse feature"

    def _sparse_contradictions(self) -> Iterator[str]:
        for column in self.feature_schema.sparse:
            record = self.sparse[column.name]
            if (record.vocabulary is None) != (record.index is None) or (column.hash is not None and record.index):
                yield f"sparse.{column.name}: has one of vocabulary and index, or is hashed and has both"
            if record != self.sparse[column.owner]:
                yield f"sparse.{column.name}: has another table or vocabulary than {column.owner}, which it shares"
            if column.buckets is not None and not column.buckets.is_fitted:
                yield f"sparse.{column.name}: its buckets are quantiles without boundaries"
            if column.hash is None and record.index is None and column.value_kind.is_text:
                yield f"sparse.{column.name}: texts are not ids, and it has no vocabulary"
            if column.hash is not None and column.hash > record.num_embeddings:
                yield f"sparse.{column.name}: hashed into {column.hash:,} rows, its table has {record.num_embeddings:,}"

    def check_names(self, folder: Path) -> None:
        """See that files which are named have checksums, and lie in the folder.

        Raises:
            BundleError: one has none, or does not.
        """
        used = [path for record in self.sparse.values() for path in (record.vocabulary, record.index) if path]
        wrong = sorted({*used} - self.files.keys())
        wrong += [name for name in self.files if Path(name).is_absolute() or ".." in Path(name).parts]
        if wrong:
            msg = f"{folder}: bundle.json names {', '.join(wrong)[:200]}, without a checksum or outside of the folder"
            raise BundleError(msg)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The sparse features."""
        return sparse_features(self.feature_schema, {name: of.num_embeddings for name, of in self.sparse.items()})

    @property
    def tables(self) -> list[FeatureTable]:
        """What is looked up for the features, key by key."""
        return feature_tables(self.model, self.features, self.groups)

    @property
    def recalibrations(self) -> Mapping[str, Recalibration]:
        """What logits become, by label; those of labels that are not named stay as they are."""
        found = self.recalibration
        return {self.feature_schema.label.name: found} if isinstance(found, Recalibration) else found or {}

    @property
    def recalibrated(self) -> tuple[RecalibrationMethod | None, str | None]:
        """By which method, and by which feature."""
        return next(((of.method, of.by) for of in self.recalibrations.values()), (None, None))

    @property
    def version(self) -> str:
        """Changes with any byte of the bundle."""
        return self.content_sha256[:_VERSION_DIGITS]

    def _content(self) -> dict[str, Any]:
        content = super()._content()
        if self.source.checkpoint is None:
            del content["source"]["checkpoint"]
        content["groups"] = [{key: of[key] for key in ("feature", "dim", "group")} for of in content["groups"]]
        for name in ("model_class", "period", "recalibration", "groups"):
            if content[name] in (None, []):
                del content[name]
        content["model"] = in_one_list(content["model"])  # as older versions read it
        if self.model.interaction == "dot":  # which older versions do not say
            del content["model"]["interaction"]
        content["schema"] = self.feature_schema.model_dump(mode="json", by_alias=True, exclude_none=True)
        return content


def _damaged(path: Path, why: str) -> str:
    return f"{path}: damaged, {why}; copy or export the bundle again"
