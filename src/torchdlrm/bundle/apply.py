"""Makes a delta of two bundles, and a bundle of another one and a delta: the very bytes of what was exported.

Needs nothing that trains, so that a server's host can do it.
"""

import errno
import shutil
from pathlib import Path

import polars as pl
import pyarrow as pa

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import (
    CHANGES_NAME,
    DELTA_NAME,
    FILES_FOLDER,
    BundleIdentity,
    Delta,
    DeltaManifest,
    FileRecipe,
)
from torchdlrm.bundle.delta_vocabulary import rebuild_index, rebuild_vocabulary, write_changed_rows
from torchdlrm.bundle.delta_weights import apply_changes, write_changes
from torchdlrm.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, BundleManifest, StoredFile
from torchdlrm.bundle.write import complete_folder, require_space
from torchdlrm.errors import BundleError
from torchdlrm.files import regular_file, sha256_of
from torchdlrm.progress import SILENT, ProgressListener, watched
from torchdlrm.storage import mirror
from torchdlrm.storage.places import located

FULL_NAME = "full"  # of the bundle that a delta is made of, while it is made
DELTA_NAMES = (DELTA_NAME, CHANGES_NAME, FILES_FOLDER, FULL_NAME)
_VERSIONS = {"pyarrow": pa.__version__, "polars": pl.__version__}
# The machine's condition, which no other delta would change.
_NOT_THE_INPUT = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EROFS}


def write_delta(base: Path, result: Path, out: Path, progress: ProgressListener = SILENT) -> None:
    """Write how one bundle is made of another to a folder that is there.

    Args:
        base: the folder of a bundle.
        result: the folder of the other; both were checked.
        out: where to write.
        progress: receives the bytes compared.
    """
    ours, theirs = BundleManifest.read(base), BundleManifest.read(result)
    weights = write_changes(base, result, theirs, out / CHANGES_NAME, progress)
    recipes = {}
    for name in theirs.files:
        if name != WEIGHTS_NAME:
            recipes[name] = _recipe(base, ours, result, theirs, name, out / FILES_FOLDER / name)
    _copy(result / MANIFEST_NAME, out / FILES_FOLDER / MANIFEST_NAME)
    manifest = DeltaManifest(
        name=theirs.name,
        base=BundleIdentity.of(base, ours),
        result=BundleIdentity.of(result, theirs),
        versions=_VERSIONS,
        weights=weights,
        files=recipes,
    )
    manifest.write(out)


def _recipe(
    base: Path, ours: BundleManifest, result: Path, theirs: BundleManifest, name: str, path: Path
) -> FileRecipe:
    """How a file is made, in as few bytes as it takes; what the delta holds of it is written to `path`."""
    stored = theirs.files[name]
    if ours.files.get(name) == stored:
        return FileRecipe(how="base")
    path.parent.mkdir(parents=True, exist_ok=True)
    if any(record.index == name for record in theirs.sparse.values()):
        try:
            _build_index(theirs, name, result, path)
            is_same = sha256_of(path) == stored.sha256
        finally:
            path.unlink(missing_ok=True)
        if is_same:
            return FileRecipe(how="index")
    if name in ours.files and any(record.vocabulary == name for record in theirs.sparse.values()):
        removed = write_changed_rows(base / name, result / name, path)
        if removed is not None:
            return FileRecipe(how="rows", file=StoredFile.of(path), removed_ids=removed)
    _copy(result / name, path)
    return FileRecipe(how="whole", file=stored)


def apply_delta(
    bundle: str | Path, delta: str | Path, out: str | Path, *, progress: ProgressListener | bool = True
) -> Bundle:
    """Make the bundle that a delta leads to: byte for byte the one that the delta was made of.

    Args:
        bundle: the folder of the bundle that it is a delta to; read, and left as it is.
        delta: the folder of the delta.
        out: the folder of the new bundle; nothing may be there.
        progress: receives the bytes done; True and False as for `train`.

    Raises:
        BundleError: one of both is damaged, they do not belong together, or `out` cannot be written; nothing is there.
    """
    base, out = located(bundle), located(out)
    change = Delta.open(located(delta))
    found, wanted = BundleIdentity.of(base, BundleManifest.read(base)), change.manifest.base
    if found.manifest_sha256 != wanted.manifest_sha256:
        msg = (
            f"{change.path}: a delta to the bundle of version {wanted.version}, and {base} is of version "
            f"{found.version} (sha256 of its {MANIFEST_NAME}: {found.manifest_sha256}, not {wanted.manifest_sha256}); "
            "give that bundle, or the delta that was exported to this one"
        )
        raise BundleError(msg)
    with watched(progress) as listener, complete_folder(out) as folder:
        mirror.fetch(base, progress=listener)
        require_space(folder, sum(record.size_bytes for record in change.result.files.values()))
        try:
            # Indexes are built from vocabularies.
            for name, recipe in sorted(change.manifest.files.items(), key=lambda item: item[1].how == "index"):
                _make(base, change, name, recipe, folder)
            apply_changes(base, change, folder / WEIGHTS_NAME, listener)
            _copy(change.path / FILES_FOLDER / MANIFEST_NAME, folder / MANIFEST_NAME)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_THE_INPUT:
                raise
            msg = f"{change.path}: cannot be applied to {base} ({error}); copy both again"
            raise BundleError(msg) from error
        try:
            Bundle.open(folder, progress=listener)  # every byte is read, and compared with the result's checksums
        except BundleError as error:
            msg = f"{base}: damaged, since {change.path}, which is not, gives no bundle with it: {error}"
            raise BundleError(msg) from error
    return Bundle.open(out, verify="lazy")


def _make(base: Path, delta: Delta, name: str, recipe: FileRecipe, folder: Path) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    held = delta.path / FILES_FOLDER / name
    if recipe.how == "base":
        _copy(regular_file(base, name), path)
    elif recipe.how == "whole":
        _copy(held, path)
    elif recipe.how == "rows":
        rebuild_vocabulary(regular_file(base, name), held, recipe.removed_ids, path)
    else:
        _build_index(delta.result, name, folder, path)
    if sha256_of(path) != delta.result.files[name].sha256:
        built = recipe.how in {"rows", "index"} and delta.manifest.versions != _VERSIONS
        why = f"built with {_VERSIONS} and not {delta.manifest.versions}" if built else f"{base} is damaged"
        msg = f"{delta.path}: {name} comes out other than it was exported: {why}; copy the whole bundle"
        raise BundleError(msg)


def _build_index(manifest: BundleManifest, name: str, folder: Path, path: Path) -> None:
    """Write the index of that name, of a vocabulary in `folder`."""
    for column in manifest.feature_schema.sparse:
        record = manifest.sparse[column.name]
        if record.index == name and record.vocabulary is not None:
            rebuild_index(folder / record.vocabulary, column.name, column.vocabulary_kind, path)
            return
    msg = f"{name} is no index of a vocabulary"
    raise ValueError(msg)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
