"""`delta.json`: how a bundle is made of another one, and checksums of what that takes.  See docs/bundle-format.md.

    delta/
      delta.json      base, result, and how each file of the result is made
      weights.delta   the header and the float32 parts, and the rows of each table that changed
      files/          whole files and changed rows of vocabularies, by the names of the result's files

A delta is as untrusted as a bundle.  Reading one executes nothing in it, and nothing in it leads out of its folder.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field

from torchdlrm.bundle.manifest import MANIFEST_NAME, WEIGHTS_NAME, BundleManifest, SealedJson, Sha256, StoredFile
from torchdlrm.errors import BundleError
from torchdlrm.files import sha256_of
from torchdlrm.folders import KindName
from torchdlrm.records import Record
from torchdlrm.storage import mirror

DELTA_NAME, CHANGES_NAME, FILES_FOLDER = "delta.json", "weights.delta", "files"
FORMAT_VERSION = 1
# Rows of a block are numbered in 16 bits.
MAX_BLOCK_ROWS, BLOCK_BYTES = 2**16, 16 * 2**20


class BundleIdentity(Record):
    """What identifies a bundle.

    Attributes:
        manifest_sha256: of its `bundle.json`, which has the checksums of all its files.
        version: of the bundle.
        size_bytes: of all its files.
    """

    manifest_sha256: Sha256
    version: str
    size_bytes: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, folder: Path, manifest: BundleManifest) -> Self:
        """A bundle on disk."""
        sizes = [record.size_bytes for record in manifest.files.values()]
        path = folder / MANIFEST_NAME
        return cls(
            manifest_sha256=sha256_of(path),
            version=manifest.version,
            size_bytes=sum(sizes) + path.stat().st_size,
        )


class FileRecipe(Record):
    """How a file of the result is made.

    Attributes:
        how: `base`: it is the base's; `whole`: it is in the delta; `rows`: a vocabulary, the base's with other rows;
            `index`: built from the result's vocabulary.
        file: what the delta holds of it; None for `base` and `index`.
        removed_ids: of a vocabulary, ids of the base that no row of the result has.
    """

    how: Literal["base", "whole", "rows", "index"]
    file: StoredFile | None = None
    removed_ids: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...] = ()

    def _contradictions(self) -> Iterator[str]:
        if (self.file is None) != (self.how in {"base", "index"}) or (self.removed_ids and self.how != "rows"):
            yield f"{self.how!r} with a file that it does not read, or without the one that it does"


class TableRecipe(Record):
    """How a table of the result is made: by blocks of rows, each the base's with some rows replaced.

    Attributes:
        table: the tensor's name in the weights of both bundles.
        row_bytes: of a row.
        num_rows: of the result.
        base_rows: how many of them the base has, too.
        block_rows: of each block; the last one may be shorter.
        changed_rows: of each block, how many are replaced.  All rows that the base has not are among them.
    """

    table: str
    row_bytes: Annotated[int, Field(ge=1, le=BLOCK_BYTES)]
    num_rows: Annotated[int, Field(ge=0, lt=2**31)]
    base_rows: Annotated[int, Field(ge=0)]
    block_rows: Annotated[int, Field(ge=1, le=MAX_BLOCK_ROWS)]
    changed_rows: tuple[Annotated[int, Field(ge=0)], ...]

    def _contradictions(self) -> Iterator[str]:
        if self.base_rows > self.num_rows or self.block_rows > max(1, BLOCK_BYTES // self.row_bytes):
            yield f"{self.table}: more rows in the base than there are, or blocks above {BLOCK_BYTES:,} bytes"
        if len(self.changed_rows) != -(-self.num_rows // self.block_rows):
            yield f"{self.table}: {len(self.changed_rows):,} blocks are not those of {self.num_rows:,} rows"
        for start, stop, changed in self.blocks():
            if not stop - max(start, min(stop, self.base_rows)) <= changed <= stop - start:
                yield f"{self.table}: {changed:,} changed rows among those from {start:,} to {stop:,}"

    def blocks(self) -> Iterator[tuple[int, int, int]]:
        """First row, the row behind the last, and how many are replaced."""
        for block, changed in enumerate(self.changed_rows):
            start = block * self.block_rows
            yield start, min(start + self.block_rows, self.num_rows), changed

    @property
    def size_bytes(self) -> int:
        """In the delta: the rows, and two bytes for the number of each within its block unless all are replaced."""
        return sum(
            changed * (self.row_bytes + (2 if changed < stop - start else 0)) for start, stop, changed in self.blocks()
        )


class WeightsRecipe(Record):
    """How the weights are made.

    Attributes:
        file: `weights.delta`.
        pieces: of the result's weights in their order: a number of bytes, which the delta has as they are, or a table.
    """

    file: StoredFile
    pieces: tuple[Annotated[int, Field(ge=0)] | TableRecipe, ...]

    @property
    def tables(self) -> list[TableRecipe]:
        """The tables among the pieces."""
        return [piece for piece in self.pieces if isinstance(piece, TableRecipe)]

    @property
    def result_bytes(self) -> int:
        """Of the weights that it makes."""
        return sum(piece if isinstance(piece, int) else piece.num_rows * piece.row_bytes for piece in self.pieces)

    def _contradictions(self) -> Iterator[str]:
        held = sum(piece if isinstance(piece, int) else piece.size_bytes for piece in self.pieces)
        if held != self.file.size_bytes:
            yield f"{self.file.size_bytes:,} bytes of {CHANGES_NAME}, and pieces of {held:,}"


class DeltaManifest(SealedJson):
    """What `delta.json` holds.

    Attributes:
        name: the model's name.
        base: what it can be applied to.
        result: what that gives.
        versions: of the libraries that built the result's vocabularies and indexes; others may write other bytes.
        weights: how the weights are made.
        files: how each of the other files is made, but `bundle.json`, which is in the delta.
    """

    _file_name: ClassVar[str] = DELTA_NAME
    _newest_version: ClassVar[int] = FORMAT_VERSION
    _kind: ClassVar[KindName] = "delta"

    format: Literal["torchdlrm-delta"] = "torchdlrm-delta"
    format_version: int = FORMAT_VERSION
    name: str
    base: BundleIdentity
    result: BundleIdentity
    versions: dict[str, str]
    weights: WeightsRecipe
    files: dict[str, FileRecipe]


class Delta:
    """A delta on disk, all of it checked; `Delta.open` makes one.

    Attributes:
        path: its folder.
        manifest: how the result is made.
        result: the manifest of the result.
    """

    def __init__(self, path: Path, manifest: DeltaManifest, result: BundleManifest) -> None:
        self.path, self.manifest, self.result = path, manifest, result

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read a delta's manifest and check its files.

        Raises:
            BundleError: there is no delta, a file of it is missing or damaged, or its format is newer.
        """
        manifest = DeltaManifest.read(path)
        path = mirror.fetch(path)
        if not (path / FILES_FOLDER / MANIFEST_NAME).exists():
            raise BundleError(f"{path / FILES_FOLDER / MANIFEST_NAME}: missing; copy the delta again")
        result = BundleManifest.read(path / FILES_FOLDER)
        result.check_names(path / FILES_FOLDER)
        if sha256_of(path / FILES_FOLDER / MANIFEST_NAME) != manifest.result.manifest_sha256:
            raise BundleError(f"{path}: damaged, its {MANIFEST_NAME} is not the result's; copy the delta again")
        weights = result.files.get(WEIGHTS_NAME)
        if weights is None or manifest.files.keys() != result.files.keys() - {WEIGHTS_NAME}:
            raise BundleError(f"{path}: damaged, it makes other files than the result has; copy the delta again")
        if manifest.weights.result_bytes != weights.size_bytes:
            msg = f"{path}: damaged, its pieces are not the {weights.size_bytes:,} bytes of weights; copy it again"
            raise BundleError(msg)
        delta = cls(path, manifest, result)
        for name, stored in delta._stored_files():
            stored.check_size(path, name, "delta")
            stored.check_content(path, name, "delta")
        return delta

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        own = [self.path / DELTA_NAME, self.path / FILES_FOLDER / MANIFEST_NAME]
        return sum(path.stat().st_size for path in own) + sum(file.size_bytes for _, file in self._stored_files())

    def _stored_files(self) -> Iterator[tuple[str, StoredFile]]:
        yield CHANGES_NAME, self.manifest.weights.file
        for name, recipe in self.manifest.files.items():
            if recipe.file is not None:
                yield f"{FILES_FOLDER}/{name}", recipe.file
