"""Opens and checks a bundle on disk.

    bundle/
      bundle.json           what it holds, checksums of all files, schema, transforms, model, precision
      weights.safetensors   the tables as served, memory-mapped; the dense and over arch in float32
      vocabulary/           value, count, id of each sparse feature, and indexes for looking values up
      sample.parquet        raw rows and the predictions that they must give

Opening a bundle executes nothing in it: JSON, safetensors and Parquet hold only data.
"""

import hashlib
from collections.abc import Callable, Mapping
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.manifest import SAMPLE_NAME, WEIGHTS_NAME, BundleManifest
from torchdlrm.bundle.patched_weights import PatchedWeights
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.bundle.sample import PREDICTION_COLUMN, read_sample, sample_types
from torchdlrm.bundle.verification import BlockVerifier
from torchdlrm.bundle.weights_file import BLOCK_BYTES, PADDING_BYTES, PADDING_NAME, MappedWeights, blocks_of
from torchdlrm.errors import BundleError, DatasetError
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.patched_index import PatchedIndex
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import DenseTransform
from torchdlrm.features.value_index import ValueIndex
from torchdlrm.features.vocabulary import UNKNOWN_ID
from torchdlrm.files import OpenFiles
from torchdlrm.model import table_weight
from torchdlrm.model.architecture import Architecture, ModelShape
from torchdlrm.model.model_class import ModelClass, architecture_of, difference_from
from torchdlrm.notebook import notebook_view
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.storage import mirror

Verify = Literal["full", "lazy"]


class PlainIds:
    """The vocabulary of a feature whose values came as ids: those of the table's rows stand for themselves.

    All other values are unknown.
    """

    def __init__(self, num_embeddings: int) -> None:
        self._num_embeddings = num_embeddings

    def lookup(self, values: pl.Series) -> pl.Series:
        """Int64 values, nullable -> Int32 ids."""
        is_row = values.is_between(0, self._num_embeddings - 1).fill_null(value=False)
        return values.zip_with(is_row, pl.Series([UNKNOWN_ID], dtype=values.dtype)).cast(pl.Int32)

    def ids_of_numbers(
        self, numbers: NDArray[np.integer], is_missing: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int32]:
        """As `ValueIndex.ids_of_numbers`."""
        is_row = (numbers >= 0) & (numbers < self._num_embeddings)
        if is_missing is not None:
            is_row &= ~is_missing
        return np.where(is_row, numbers, UNKNOWN_ID).astype(np.int32)

    def id_of(self, value: int | str | None) -> int:
        """As `ValueIndex.id_of`."""
        return value if isinstance(value, int) and 0 <= value < self._num_embeddings else UNKNOWN_ID


ServedVocabulary = ValueIndex | PatchedIndex | PlainIds


def shared_vocabularies(
    schema: FeatureSchema, vocabulary_of: Callable[[SparseColumn], ServedVocabulary]
) -> dict[str, ServedVocabulary]:
    """The vocabulary of each feature that is not hashed; those that share a table have one."""
    columns = [column for column in schema.sparse if column.hash is None]
    own = {column.name: vocabulary_of(column) for column in columns if column.table is None}
    return {column.name: own[column.owner] for column in columns}


class Bundle:
    """An exported model; `Bundle.open` makes one.

    Attributes:
        path: its folder.
        manifest: what it holds.
        verifier: of its weights.
        files: those that are mapped.
        architecture: of the model.
        weights: mapped.

    Raises:
        BundleError: the weights are not those of the manifest.
    """

    def __init__(
        self,
        path: Path,
        manifest: BundleManifest,
        verifier: BlockVerifier,
        files: OpenFiles,
        architecture: Architecture,
        weights: MappedWeights | PatchedWeights,
    ) -> None:
        self.path, self.manifest, self.verifier, self.files = path, manifest, verifier, files
        self.architecture = architecture
        self.weights = weights
        for table in manifest.tables:
            dtype, width = TABLE_PRECISIONS[manifest.sparse[table.feature].precision].stored_rows(table.dim)
            self.weights.require(table_weight(table.table_key), dtype, (table.rows, width), bytes_behind=PADDING_BYTES)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        model_class: ModelClass | None = None,
        allow_changed_model_class: bool = False,
        verify: Verify = "full",
        progress: ProgressListener = SILENT,
    ) -> Self:
        """Read a bundle's manifest and check its files.

        Args:
            path: the bundle's folder; what is at a URL is fetched.
            model_class: that the model was trained with, where it was one of the user's: a bundle holds no code.  Only
                what predicts needs it.
            allow_changed_model_class: take it though its file has changed since.
            verify: `full` checks every byte now; `lazy` leaves the weights to a thread, and checks each block of them
                also before rows of it are used first.
            progress: receives the bytes checked.

        Raises:
            BundleError: there is no bundle, a file of it is missing or damaged, or its format is newer.
            ConfigError: there is no such model class.
        """
        manifest = BundleManifest.read(path)
        architecture = architecture_of(manifest.model, model_class, may_have_changed=allow_changed_model_class)
        if manifest.block_bytes != BLOCK_BYTES or WEIGHTS_NAME not in manifest.files:
            msg = f"{path}: block_bytes is {manifest.block_bytes:,}, not {BLOCK_BYTES:,}, or {WEIGHTS_NAME} is missing"
            raise BundleError(msg)
        manifest.check_names(path)
        path = mirror.fetch(path, map(escape, manifest.files), progress)
        for name, record in manifest.files.items():
            record.check_size(path, name, "bundle")
        weights_bytes = manifest.files[WEIGHTS_NAME].size_bytes
        if not weights_bytes or len(manifest.block_sha256) != -(-weights_bytes // BLOCK_BYTES):
            msg = f"{path}: {len(manifest.block_sha256)} checksums are not those of {weights_bytes:,} bytes"
            raise BundleError(msg)
        files = OpenFiles(
            [path / name for name in (WEIGHTS_NAME, *(r.index for r in manifest.sparse.values())) if name]
        )
        small = [name for name in manifest.files if name != WEIGHTS_NAME]
        total = sum(manifest.files[name].size_bytes for name in small)
        progress.start_phase("verify", total + (weights_bytes if verify == "full" else 0), unit="bytes")
        for name in small:
            manifest.files[name].check_content(path, name, "bundle")
            progress.advance(manifest.files[name].size_bytes)
        verifier = BlockVerifier(path / WEIGHTS_NAME, manifest.block_sha256, in_pages=verify == "lazy")
        if verify == "full":
            verifier.check_all(progress)
        else:
            verifier.require(blocks_of(np.zeros(1, np.int64), 1, verifier.num_blocks))
        bundle = cls(path, manifest, verifier, files, architecture, MappedWeights(path / WEIGHTS_NAME))
        if verify == "lazy":
            bundle._require_all_but_tables()
        damage = bundle.find_damage()  # since before the first byte was checked
        if damage is not None:
            raise damage
        if verify == "lazy":
            verifier.check_all_in_background()
        return bundle

    def _repr_html_(self) -> str:
        """What a notebook shows: what it needs, and its files."""
        manifest = self.manifest
        facts = {"version": self.version, "period": self.period, "columns": len(self.schema.features)}
        rows = [{"file": name, "bytes": file.size_bytes} for name, file in manifest.files.items()]
        return notebook_view(f"bundle {self.name}", facts | {"dense parts": manifest.dense_precision}, rows)

    @property
    def name(self) -> str:
        """The model's name."""
        return self.manifest.name

    @property
    def version(self) -> str:
        """Changes with any byte of the bundle."""
        return self.manifest.version

    @property
    def period(self) -> int | None:
        """Number of the last period that was learnt from; None where logs have no periods."""
        return self.manifest.period

    @cached_property
    def manifest_sha256(self) -> str:
        """Of `bundle.json`, by which deltas know the bundle."""
        return hashlib.sha256(self.manifest.to_json().encode()).hexdigest()

    @property
    def memory_bytes(self) -> int:
        """Of memory for what deltas have changed; see `PatchedBundle`."""
        return 0

    @property
    def schema(self) -> FeatureSchema:
        """The columns of a raw row."""
        return self.manifest.feature_schema

    @cached_property
    def shape(self) -> ModelShape:
        """Architecture and sizes of the model.

        Raises:
            BundleError: the bundle is of a model class, and was not opened with it.
        """
        difference = difference_from(self.manifest.model_class, self.architecture, "bundle")
        if difference is not None:
            msg = f"{self.path}: {difference}"
            raise BundleError(msg)
        return ModelShape(
            self.manifest.model,
            len(self.schema.dense),
            len(self.manifest.sparse) + len(self.schema.content),
            self.architecture,
            is_weighted=self.schema.has_value_weights,
            known_features=self.manifest.features,
            content=self.schema.content,
            labels=tuple(label.name for label in self.schema.learnt),
        )

    @property
    def dense(self) -> Mapping[str, DenseTransform]:
        """The fitted transform of each dense column."""
        return self.manifest.dense

    @cached_property
    def vocabularies(self) -> dict[str, ServedVocabulary]:
        """What maps values to ids, of each sparse feature that is not hashed: what `features.encode.encode` takes."""
        return shared_vocabularies(self.schema, self._vocabulary)

    def _vocabulary(self, column: SparseColumn) -> ServedVocabulary:
        record = self.manifest.sparse[column.name]
        if record.index is None:
            return PlainIds(record.num_embeddings)
        try:
            return ValueIndex.open(self.path / record.index, kind=column.vocabulary_kind, num_ids=record.num_embeddings)
        except DatasetError as error:
            raise BundleError(str(error)) from error

    def sample(self) -> tuple[pl.DataFrame, NDArray[np.float32]]:
        """Raw typed rows of the held-out rows, and the probabilities that this bundle must give for them, by label.

        No rows where the sample has no checksum: only what was checked is read.

        Raises:
            BundleError: the sample is not what was written.
        """
        return self._sample

    @cached_property
    def _sample(self) -> tuple[pl.DataFrame, NDArray[np.float32]]:
        """Kept in memory: the file may be removed, and be another one's."""
        return self._read_sample(self.path / SAMPLE_NAME)

    def _read_sample(self, path: Path) -> tuple[pl.DataFrame, NDArray[np.float32]]:
        record = self.manifest.files.get(SAMPLE_NAME)
        if record is None:
            return pl.DataFrame(schema=sample_types(self.schema)), np.empty(0, np.float32)
        frame = read_sample(path, self.schema, sha256=record.sha256)
        predictions = frame.select(own := self.schema.label_columns(PREDICTION_COLUMN)).to_numpy()
        return frame.drop(own), predictions if len(own) > 1 else predictions[:, 0]

    def find_damage(self) -> BundleError | None:
        """What is wrong with files that are in use: they are mapped, so what is written to one changes predictions.

        Costs some microseconds: nothing is read.  Files that are removed, or that others take the place of, remain as
        they were for programs that have them open.
        """
        changed = self.files.changed()
        if changed is None:
            return self.verifier.damage
        msg = (
            f"{changed}: written to while it is in use, so predictions mean nothing; write a bundle to a folder of its "
            "own, never over another, and load that"
        )
        return BundleError(msg)

    def _require_all_but_tables(self) -> None:
        """Check the blocks of the header and of the small tensors."""
        tables = {PADDING_NAME, *(table_weight(table.table_key) for table in self.manifest.tables)}
        header_end = min((self.weights.span(name)[0] for name in self.weights.shapes), default=0)
        spans = [(0, header_end)] + [self.weights.span(name) for name in self.weights.shapes if name not in tables]
        touched = np.zeros(self.verifier.num_blocks, np.bool_)
        for start, end in spans:
            touched[start // BLOCK_BYTES : -(-end // BLOCK_BYTES)] = True
        self.verifier.require(touched)
