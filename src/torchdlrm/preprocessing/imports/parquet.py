"""Reads Parquet that NVTabular, Spark or others have encoded, in blocks.

In: a folder with `train`, `val` (or `validation`, `valid`) and `test` in it, or one folder or file; which column is the
label, and which are dense: by default floats are dense, integers and lists of them sparse.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from torchdlrm.data.splits import SplitName
from torchdlrm.errors import LogError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.imports.blocks import BLOCK_ROWS, Blocks, as_dense, as_ids, as_labels, encoded_schema

_FOLDERS: Mapping[str, SplitName] = {
    "train": "train",
    "validation": "val",
    "valid": "val",
    "val": "val",
    "test": "test",
}
_LABEL_NAMES = ("label", "click", "clicked", "target")


@dataclass(frozen=True)
class _Columns:
    label: str
    dense: tuple[str, ...]
    sparse: tuple[str, ...]
    lists: tuple[str, ...]


def find_parquet(source: Path, label: str | None, table_sizes: Mapping[str, int]) -> tuple[FeatureSchema, list[Blocks]]:
    """The rows of encoded Parquet files, and a schema of their columns.

    Raises:
        LogError: there are no files, no label, or columns that are neither numbers nor lists of them.
    """
    parts = [(source / name, split) for name, split in _FOLDERS.items() if (source / name).is_dir()]
    found: list[tuple[Path, SplitName | None]] = list(parts) or [(source, None)]
    files = [(_files_of(path), split) for path, split in found]
    columns = _columns_of(files[0][0][0], label)
    schema = encoded_schema("imported", columns.dense, columns.sparse, columns.lists)
    return schema, [
        _part(path.name, paths, split, columns, table_sizes)
        for (path, _), (paths, split) in zip(found, files, strict=True)
    ]


def _files_of(source: Path) -> list[Path]:
    files = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    if not files:
        msg = f"{source}: holds no .parquet file"
        raise LogError(msg)
    return files


def _columns_of(path: Path, label: str | None) -> _Columns:
    schema = _open(path).schema_arrow
    label = label or next((name for name in schema.names if name.lower() in _LABEL_NAMES), None)
    if label is None or label not in schema.names:
        msg = f"{path}: no column {label or ' or '.join(_LABEL_NAMES)}; name the label with `label`"
        raise LogError(msg)
    dense, sparse, lists = [], [], []
    for field in schema:
        if field.name == label:
            continue
        value_type = field.type.value_type if _is_list(field.type) else field.type
        if pa.types.is_floating(value_type) and not _is_list(field.type):
            dense.append(field.name)
        elif pa.types.is_integer(value_type):
            sparse.append(field.name)
            if _is_list(field.type):
                lists.append(field.name)
        else:
            msg = (
                f"{path}, column {field.name}: is {field.type}, neither a float nor an id nor a list of ids; raw "
                "values are for `dlrm preprocess`"
            )
            raise LogError(msg)
    return _Columns(label, tuple(dense), tuple(sparse), tuple(lists))


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _open(path: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except (OSError, pa.ArrowException) as error:
        msg = f"{path}: the Parquet file cannot be read ({error})"
        raise LogError(msg) from error


def _part(
    name: str, paths: Sequence[Path], split: SplitName | None, columns: _Columns, table_sizes: Mapping[str, int]
) -> Blocks:
    for path in paths:
        if _columns_of(path, columns.label) != columns:
            msg = f"{path}: has other columns than {paths[0]}"
            raise LogError(msg)

    def read() -> Iterator[pl.DataFrame]:
        for path in paths:
            first_row = 0
            for batch in _open(path).iter_batches(BLOCK_ROWS):
                frame = pl.DataFrame(batch)
                yield pl.DataFrame(
                    [
                        as_labels(_present(frame[columns.label], path, first_row).to_numpy(), str(path), first_row),
                        *(
                            as_dense(_present(frame[n], path, first_row).to_numpy(), n, str(path), first_row)
                            for n in columns.dense
                        ),
                        *(_sparse(frame[n], path, first_row, table_sizes.get(n)) for n in columns.sparse),
                    ]
                )
                first_row += frame.height

    return Blocks(name, sum(_open(path).metadata.num_rows for path in paths), tuple(paths), split, read)


def _present(column: pl.Series, path: Path, first_row: int) -> pl.Series:
    if column.null_count():
        row = column.is_null().arg_max() or 0
        msg = f"{path}, row {first_row + row + 1:,}, column {column.name}: missing; encoded data has no missing values"
        raise LogError(msg)
    return column


def _sparse(column: pl.Series, path: Path, first_row: int, limit: int | None) -> pl.Series:
    name = column.name
    if not isinstance(column.dtype, pl.List | pl.Array):
        ids = as_ids(_present(column, path, first_row).to_numpy(), name, str(path), first_row, limit)
        return pl.Series(name, ids)
    lists = column.cast(pl.List(pl.Int64)).fill_null([])
    flat = lists.explode(empty_as_null=False)
    as_ids(flat.to_numpy(), name, str(path), first_row, limit)
    return lists.cast(pl.List(pl.Int32))
