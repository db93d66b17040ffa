"""Opens a delta over the bundle that it is to, in memory: what a server does while that bundle is in use.

In: an opened bundle and a delta to it.  Out: a bundle that predicts as the delta's result does, bit for bit.  Of the
tables it holds the rows that changed, of the vocabularies the values that have another id; all else is the base's
files, mapped as before.  Nothing is written: a server may have no folder for it.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from torchdlrm.bundle.bundle import Bundle, PlainIds, ServedVocabulary, shared_vocabularies
from torchdlrm.bundle.delta import FILES_FOLDER, Delta
from torchdlrm.bundle.delta_vocabulary import read_values
from torchdlrm.bundle.manifest import SAMPLE_NAME
from torchdlrm.bundle.patched_weights import PatchedWeights
from torchdlrm.errors import BundleError
from torchdlrm.features.columns import SparseColumn
from torchdlrm.features.patched_index import PatchedIndex


class PatchedBundle(Bundle):
    """The result of a delta.

    Args:
        before: the bundle that it is to, opened, or itself patched: then this one does not need it any more.
        delta: opened, so all of it was checked.

    Attributes:
        path: the delta's folder.
        weights: the base's, mapped, and the rows that changed.

    Raises:
        BundleError: the delta is not to that bundle, changes more than values, rows and dense weights, or is damaged.
    """

    weights: PatchedWeights

    def __init__(self, before: Bundle, delta: Delta) -> None:
        base, result = delta.manifest.base, delta.result
        if before.manifest_sha256 != base.manifest_sha256:
            msg = f"{delta.path}: a delta to the bundle of version {base.version}, and not of {before.version}"
            raise BundleError(msg)
        ours = before.manifest
        if (ours.feature_schema, ours.model, ours.model_class) != (
            result.feature_schema,
            result.model,
            result.model_class,
        ):
            msg = f"{delta.path}: its schema or its model's shape is another one, which is not applied in memory"
            raise BundleError(msg)
        weights = PatchedWeights(before.weights, delta)
        super().__init__(delta.path, result, before.verifier, before.files, before.architecture, weights)
        self.vocabularies = shared_vocabularies(self.schema, partial(_vocabulary, before, delta))
        sample = delta.manifest.files.get(SAMPLE_NAME)
        is_kept = sample is not None and sample.how == "base"
        self._sample = before.sample() if is_kept else self._read_sample(delta.path / FILES_FOLDER / SAMPLE_NAME)

    @property
    def num_values(self) -> int:
        """Values of the vocabularies that have another id than in the files."""
        return sum(index.num_changed for index in self._patched_indexes)

    @property
    def memory_bytes(self) -> int:
        """Of memory that the files alone would not need."""
        return self.weights.memory_bytes + sum(index.size_bytes for index in self._patched_indexes)

    @property
    def _patched_indexes(self) -> list[PatchedIndex]:
        indexes = {id(index): index for index in self.vocabularies.values() if isinstance(index, PatchedIndex)}
        return list(indexes.values())


def _vocabulary(before: Bundle, delta: Delta, column: SparseColumn) -> ServedVocabulary:
    """The vocabulary of a feature that is not hashed."""
    name = column.name
    old, new = before.manifest.sparse[name], delta.result.sparse[name]
    index = before.vocabularies[name]
    if (old.vocabulary, old.index) != (new.vocabulary, new.index):
        raise BundleError(f"{delta.path}: {name} has its vocabulary in another file, which is not applied in memory")
    if new.vocabulary is None or isinstance(index, PlainIds):
        return PlainIds(new.num_embeddings)
    recipe = delta.manifest.files[new.vocabulary]
    if recipe.file is None:
        return index
    path = delta.path / FILES_FOLDER / new.vocabulary
    pieces = _rows(path, column, new.num_embeddings)
    removed_ids = np.array(recipe.removed_ids, np.int32)
    if recipe.how == "whole":
        pieces = list(pieces)
        known = np.concatenate([removed_ids, *(ids for _, ids in pieces)])
        removed_ids = np.setdiff1d(np.arange(1, old.num_embeddings, dtype=np.int32), known)
    try:
        return PatchedIndex.of(index, pieces, removed_ids, column.vocabulary_kind)
    except BundleError:
        raise
    except ValueError as error:
        raise BundleError(f"{path}: {error}; copy the delta again") from error


def _rows(path: Path, column: SparseColumn, num_embeddings: int) -> Iterable[tuple[pl.Series, NDArray[np.int32]]]:
    for values, ids in read_values(path, column.vocabulary_kind):
        if len(ids) and not 0 < ids.min() <= ids.max() < num_embeddings:
            msg = f"{path}: ids from {ids.min()} to {ids.max()} of a table of {num_embeddings:,} rows; copy it again"
            raise BundleError(msg)
        yield values, ids
