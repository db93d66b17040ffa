"""Writes the rows of tables that differ between two bundles, and makes the weights of one of the other's by them.

In memory is a block of rows of both, 16 MiB each, whatever the size of the tables.  `weights.delta` has, in the order
of the result's weights, what is no table as it is, and for each block of a table the numbers of the rows that are
replaced (uint16, ascending, from 0 within the block; left out where all are) and the rows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from torchdlrm.bundle.delta import BLOCK_BYTES, CHANGES_NAME, MAX_BLOCK_ROWS, Delta, TableRecipe, WeightsRecipe
from torchdlrm.bundle.manifest import WEIGHTS_NAME, BundleManifest, StoredFile
from torchdlrm.bundle.weights_file import MappedWeights, WeightsLayout, write_in_pieces
from torchdlrm.errors import BundleError
from torchdlrm.model import table_weight
from torchdlrm.progress import ProgressListener


@dataclass(frozen=True)
class ChangedRows:
    """Rows of a table that are replaced, of one block.

    Attributes:
        recipe: of the table.
        start: the block's first row.
        stop: the row behind its last.
        ids: which rows of the table, int64 [K], ascending.
        rows: what they are from now on, uint8 [K, row_bytes].
    """

    recipe: TableRecipe
    start: int
    stop: int
    ids: NDArray[np.int64]
    rows: NDArray[np.uint8]


def write_changes(
    base: Path, result: Path, manifest: BundleManifest, path: Path, progress: ProgressListener
) -> WeightsRecipe:
    """Compare the weights of two bundles, and write the rows that differ as the second has them.

    Args:
        base: folder of a bundle.
        result: folder of the other.
        manifest: of the other.
        path: the file to write.
        progress: receives the bytes compared.
    """
    ours, theirs = MappedWeights(base / WEIGHTS_NAME), MappedWeights(result / WEIGHTS_NAME)
    tables = {table_weight(table.table_key) for table in manifest.tables}
    pieces: list[int | TableRecipe] = []
    progress.start_phase("compare", len(theirs.data), unit="bytes")
    # Read as files: of mappings, which are for lookups here and there, the pages would become resident.
    with (base / WEIGHTS_NAME).open("rb") as old, (result / WEIGHTS_NAME).open("rb") as new, path.open("wb") as out:
        for name in sorted(tables, key=theirs.span):
            start, end = theirs.span(name)
            _copy(new, out, start - new.tell(), pieces)
            num_rows = theirs.shapes[name][0]
            row_bytes = (end - start) // num_rows
            base_rows = 0
            if name in ours.shapes and ours.tensor(name).dtype == theirs.tensor(name).dtype:
                old_start, old_end = ours.span(name)
                if ours.shapes[name][1:] == theirs.shapes[name][1:]:
                    base_rows = min(num_rows, (old_end - old_start) // row_bytes)
                    old.seek(old_start)
            block_rows = min(MAX_BLOCK_ROWS, max(1, BLOCK_BYTES // row_bytes))
            changed_rows = []
            for first in range(0, num_rows, block_rows):
                count = min(block_rows, num_rows - first)
                rows, before = (
                    _rows(new, count, row_bytes),
                    _rows(old, min(count, max(0, base_rows - first)), row_bytes),
                )
                is_changed = np.ones(count, np.bool_)
                is_changed[: len(before)] = (rows[: len(before)] != before).any(axis=1)
                ids = np.flatnonzero(is_changed)
                if len(ids) < count:
                    out.write(ids.astype("<u2").data)
                out.write(rows[ids].data)
                changed_rows.append(len(ids))
                progress.advance(rows.nbytes)
            pieces.append(
                TableRecipe(
                    table=name,
                    row_bytes=row_bytes,
                    num_rows=num_rows,
                    base_rows=base_rows,
                    block_rows=block_rows,
                    changed_rows=tuple(changed_rows),
                )
            )
        _copy(new, out, len(theirs.data) - new.tell(), pieces)
    return WeightsRecipe(file=StoredFile.of(path), pieces=tuple(pieces))


def changes(delta: Delta) -> Iterator[bytes | ChangedRows]:
    """What a delta says of the weights, in their order: bytes as they are, or rows of a table.

    Raises:
        BundleError: numbers of rows are not what they must be.
    """
    with (delta.path / CHANGES_NAME).open("rb") as file:
        for piece in delta.manifest.weights.pieces:
            if isinstance(piece, int):
                for start in range(0, piece, BLOCK_BYTES):
                    yield _read(file, min(BLOCK_BYTES, piece - start)).tobytes()
                continue
            for start, stop, changed in piece.blocks():
                if changed == stop - start:
                    ids = np.arange(start, stop)
                else:
                    ids = start + _read(file, 2 * changed).view("<u2").astype(np.int64)
                # Ascending and below the end, those that are not the base's have their places at the end of it.
                num_new = stop - max(start, min(stop, piece.base_rows))
                if changed and (
                    (np.diff(ids) <= 0).any() or ids[-1] >= stop or (num_new and ids[-num_new] != stop - num_new)
                ):
                    raise BundleError(
                        f"{file.name}: rows of {piece.table} from {start:,} to {stop:,} have not the numbers they must"
                    )
                yield ChangedRows(piece, start, stop, ids, _rows(file, changed, piece.row_bytes))


def check_tables(base: WeightsLayout, delta: Delta) -> None:
    """See that a bundle's weights have the tables that a delta is to.

    Raises:
        BundleError: they have not.
    """
    for recipe in delta.manifest.weights.tables:
        if recipe.base_rows:
            shape = base.shapes.get(recipe.table)
            span = base.span(recipe.table) if shape else (0, 0)
            if not shape or recipe.base_rows > shape[0] or span[1] - span[0] != shape[0] * recipe.row_bytes:
                msg = f"{base.path}: its {recipe.table} is {shape}, not what {delta.path} says; the delta is damaged"
                raise BundleError(msg)


def apply_changes(base: Path, delta: Delta, path: Path, progress: ProgressListener) -> None:
    """Write the weights of the result.

    Args:
        base: folder of the bundle that it is a delta to.
        delta: what to apply.
        path: the file to write.
        progress: receives the bytes written.

    Raises:
        BundleError: the base's weights are others than the delta says, or the delta's rows.
    """
    weights = MappedWeights(base / WEIGHTS_NAME)
    check_tables(weights, delta)
    progress.start_phase("apply", delta.manifest.weights.result_bytes, unit="bytes")
    with (base / WEIGHTS_NAME).open("rb") as old, path.open("xb") as out:
        for change in changes(delta):
            if isinstance(change, bytes):
                write_in_pieces(out, memoryview(change))
                progress.advance(len(change))
                continue
            recipe = change.recipe
            rows = np.empty((change.stop - change.start, recipe.row_bytes), np.uint8)
            kept = max(0, min(change.stop, recipe.base_rows) - change.start)
            if kept:
                old.seek(weights.span(recipe.table)[0] + change.start * recipe.row_bytes)
                rows[:kept] = _rows(old, kept, recipe.row_bytes)
            rows[change.ids - change.start] = change.rows
            write_in_pieces(out, rows.reshape(-1).data)
            progress.advance(rows.nbytes)


def _copy(source: BinaryIO, target: BinaryIO, num_bytes: int, pieces: list[int | TableRecipe]) -> None:
    """What lies between tables."""
    for start in range(0, num_bytes, BLOCK_BYTES):
        target.write(_read(source, min(BLOCK_BYTES, num_bytes - start)).data)
    if num_bytes:
        pieces.append(num_bytes)


def _rows(file: BinaryIO, num_rows: int, row_bytes: int) -> NDArray[np.uint8]:
    return _read(file, num_rows * row_bytes).reshape(num_rows, row_bytes)


def _read(file: BinaryIO, num_bytes: int) -> NDArray[np.uint8]:
    data = np.empty(num_bytes, np.uint8)
    if file.readinto(data.data) != num_bytes:  # type: ignore[attr-defined]  # of every buffered file
        raise BundleError(f"{file.name}: ends too early; copy it again")
    return data
