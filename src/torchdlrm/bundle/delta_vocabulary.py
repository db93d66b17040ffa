"""Writes the rows of a vocabulary's file that are new or changed, and makes the file of another one by them.

A vocabulary is rebuilt by writing its rows again, its index by building it again: the same program gives the same
bytes.  Of both, `dlrm export` sees that it does before it relies on it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from torchdlrm.bundle.sample import UNREADABLE
from torchdlrm.errors import BundleError
from torchdlrm.features.kinds import SparseKindName
from torchdlrm.features.value_index import write_index
from torchdlrm.features.vocabulary import Vocabulary, typed_values, write_rows

# Of a file: values take at least half of what they do unpacked, ids and counts may take nearly nothing.
_MOST_UNPACKED = 100
_BATCH_ROWS = 1 << 16
_TYPES = {pa.string(), pa.int32(), pa.int64()}


def write_changed_rows(base: Path, result: Path, path: Path) -> tuple[int, ...] | None:
    """Write the rows of a vocabulary that another one has not.

    Args:
        base: the other vocabulary's file.
        result: the vocabulary's file.
        path: the file to write.

    Returns:
        The ids of the base that are not the result's.  None, and no file, where that would not make it of the base.
    """
    try:
        before, after = _read(base), _read(result)
        if before.schema != after.schema or "id" not in after.schema.names:
            return None
        ours, theirs = pl.DataFrame(before), pl.DataFrame(after)
        write_rows(path, _as(theirs.join(ours, on=theirs.columns, how="anti", nulls_equal=True), after.schema))
        removed = tuple(ours["id"].filter(~ours["id"].is_in(theirs["id"].implode())).sort().to_list())
        again = path.with_name(f"{path.name}.again")
        try:
            rebuild_vocabulary(base, path, removed, again)
            if again.read_bytes() == result.read_bytes() and path.stat().st_size < result.stat().st_size:
                return removed
        finally:
            again.unlink(missing_ok=True)
    except UNREADABLE:
        pass  # another program's file: it is copied as it is
    path.unlink(missing_ok=True)
    return None


def rebuild_vocabulary(base: Path, changed: Path, removed_ids: Sequence[int], path: Path) -> None:
    """Write a vocabulary: another one's rows, some of them removed or replaced, and more.

    Raises:
        BundleError: a file is not what it must be.
    """
    try:
        table = _read(changed)
        rows = pl.DataFrame(table)
        others = pl.concat([rows["id"], pl.Series(removed_ids, dtype=rows["id"].dtype)])
        kept = pl.DataFrame(_read(base)).filter(~pl.col("id").is_in(others.implode()))
        write_rows(path, _as(pl.concat([kept, rows]).sort("id"), table.schema))
    except UNREADABLE as error:
        msg = f"{base} and {changed}: not a vocabulary and rows of it: {str(error)[:200]}; copy bundle and delta again"
        raise BundleError(msg) from error


def read_values(path: Path, kind: SparseKindName) -> Iterator[tuple[pl.Series, NDArray[np.int32]]]:
    """The values and ids of a vocabulary's file, or of the rows that were written by `write_changed_rows`, in pieces.

    Raises:
        BundleError: it is no such file.
    """
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check(file, path)
            for batch in file.iter_batches(_BATCH_ROWS, columns=["value", "id"], use_threads=False):
                batch.validate(full=True)
                rows = typed_values(pl.DataFrame(batch), kind)
                if rows.schema["id"] != pl.Int32 or rows["id"].null_count():
                    raise ValueError(f"ids are {rows.schema['id']}, or missing")
                yield rows["value"], rows["id"].to_numpy()
    except UNREADABLE as error:
        raise BundleError(f"{path}: not rows of a vocabulary: {str(error)[:200]}; copy the delta again") from error


def rebuild_index(vocabulary: Path, name: str, kind: SparseKindName, path: Path) -> None:
    """Write the index of a vocabulary.

    Raises:
        BundleError: the vocabulary cannot be read.
    """
    try:
        _check(pq.ParquetFile(vocabulary), vocabulary)
        write_index(Vocabulary.read(vocabulary, name, kind), path)
    except UNREADABLE as error:
        raise BundleError(f"{vocabulary}: not a vocabulary: {str(error)[:200]}; copy the delta again") from error


def _read(path: Path) -> pa.Table:
    file = pq.ParquetFile(path, page_checksum_verification=True)
    _check(file, path)
    table = file.read(use_threads=False)
    table.validate(full=True)
    return table


def _check(file: pq.ParquetFile, path: Path) -> None:
    """See that a file's content gets no larger than its size explains."""
    about, most = file.metadata, _MOST_UNPACKED * path.stat().st_size
    groups = [about.row_group(group) for group in range(min(about.num_row_groups, most))]
    encodings = {name for group in groups for i in range(group.num_columns) for name in group.column(i).encodings}
    unpacked_bytes = sum(group.total_byte_size for group in groups)
    if (
        max(about.num_rows, unpacked_bytes) > most
        or {*file.schema_arrow.types} - _TYPES
        or "DICTIONARY" in str(encodings)
    ):
        msg = f"{about.num_rows:,} rows of {unpacked_bytes:,} bytes, as {file.schema_arrow.types} with {encodings}"
        raise pa.ArrowInvalid(msg)


def _as(rows: pl.DataFrame, schema: pa.Schema) -> pa.Table:
    return rows.rechunk().to_arrow().cast(schema)
