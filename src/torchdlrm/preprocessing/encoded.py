"""Finds the files of data that upstream's scripts, NVTabular or Spark have encoded, and the schema to read it by.

In: a folder, or for Parquet a file.  Out: the files of a log, and a schema of their columns: ids stay ids, floats as
they are.  Where the folder has folders named as splits are, these are the splits.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from torchdlrm.data.splits import SPLIT_NAMES, split_of_folder
from torchdlrm.errors import LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, SplitRule
from torchdlrm.logs.files import LogFile
from torchdlrm.logs.find import find_files
from torchdlrm.logs.formats.arrays import DENSE_NAMES, SPARSE_NAMES, MultiHotFormat, NpyFormat
from torchdlrm.records import problems
from torchdlrm.storage.mirror import sizes_of
from torchdlrm.storage.places import located
from torchdlrm.storage.reading import open_to_read

EncodedFormat = Literal["npy", "multi-hot", "nvt", "parquet"]
_LABEL_NAMES = ("label", "click", "clicked", "target")
_LABELS = "_labels.npy"


def encoded_log(
    source: Path, written_as: EncodedFormat, label: str | None = None
) -> tuple[tuple[LogFile, ...], FeatureSchema]:
    """The files of encoded data, and the schema of their columns.

    Args:
        source: their folder, or its URL; or a file of Parquet.
        written_as: what wrote them.
        label: the label's column in Parquet; by default one of the usual names.

    Raises:
        LogError: there are no such files, or columns that are no label, floats, ids or lists of ids.
    """
    source = located(source)
    names = sorted(sizes_of(source))
    is_folder = bool(names) or source.is_dir()
    if written_as != "parquet" and not is_folder:
        raise LogError(f"{source}: is not a folder; give the folder that holds the files")
    if written_as in ("npy", "multi-hot"):
        ending = NpyFormat.ending if written_as == "npy" else MultiHotFormat.ending
        stems = [name.removesuffix(_LABELS) for name in names if name.endswith(_LABELS) and "/" not in name]
        stems.sort(key=_day_order)
        paths = [source / f"{stem}{ending}" for stem in stems]
        found = _found(paths, f"{source}: holds no *{_LABELS}; give the folder that upstream's preprocessing wrote")
        # The last one is held out, whatever the names.
        days = tuple(replace(file, day=day if len(found) > 1 else None) for day, file in enumerate(found))
        lists = SPARSE_NAMES if written_as == "multi-hot" else ()
        return days, _schema(written_as, "label", DENSE_NAMES, SPARSE_NAMES, lists)
    if written_as == "nvt":
        named = (
            ["label.bin"] if "label.bin" in names else [name for name in names if re.fullmatch("[^/]+/label.bin", name)]
        )
        paths = [source / name for name in named]
        lacking = f"{source}: holds no label.bin, nor do train, validation or test in it"
    else:
        paths = [source / name for name in names if name.endswith(".parquet")] if is_folder else [source]
        lacking = f"{source}: holds no .parquet file"
    splits = [None if path == source else split_of_folder(path.relative_to(source)) for path in paths]
    if any(splits):
        placed = [(SPLIT_NAMES.index(split), path) for path, split in zip(paths, splits, strict=True) if split]
        paths = [path for _, path in sorted(placed)]
    files = tuple(replace(file, day=None) for file in _found(paths, lacking))
    if written_as == "nvt":
        schema = _schema(written_as, "label", DENSE_NAMES, SPARSE_NAMES)
    else:
        schema = _schema_of_parquet([file.path for file in files], label)
    return files, schema.model_copy(update={"split": SplitRule(rule="folder")}) if any(splits) else schema


def with_table_sizes(schema: FeatureSchema, sizes: Mapping[str, int]) -> FeatureSchema:
    """The schema with the rows of the tables of these columns."""
    changes = {name: {"num_embeddings": size} for name, size in sizes.items()}
    return schema.with_columns([column.model_copy(update=changes.get(column.name)) for column in schema.columns])


def _found(paths: Sequence[Path], lacking: str) -> list[LogFile]:
    if not paths:
        raise LogError(lacking)
    return [file for path in paths for file in find_files([path])]


def _day_order(stem: str) -> tuple[int, str]:
    number = re.search(r"(\d+)$", stem)
    return (int(number[1]) if number else -1), stem


def _schema(
    name: str, label: str, dense: Sequence[str], sparse: Sequence[str], lists: Sequence[str] = ()
) -> FeatureSchema:
    """Floats as they are, and ids."""
    columns = (
        LabelColumn(name="label", header_name=None if label == "label" else label),
        *(DenseColumn(name=column, transform="none") for column in dense),
        *(SparseColumn(name=column, kind="id", value_separator="," if column in lists else None) for column in sparse),
    )
    return FeatureSchema(name=name, columns=columns)


def _read_schema(path: Path) -> pa.Schema:
    try:
        with open_to_read(path) as raw:
            return pq.read_schema(raw)
    except (OSError, pa.ArrowException) as error:
        raise LogError(f"{path}: the Parquet file cannot be read ({error})") from error


def _schema_of_parquet(paths: Sequence[Path], label: str | None) -> FeatureSchema:
    """The schema of encoded Parquet files, all of the same columns: floats are dense, integers and lists sparse."""
    first, *others = map(_read_schema, paths)
    for path, other in zip(paths[1:], others, strict=True):
        if other.names != first.names:
            raise LogError(f"{path}: has other columns than {paths[0]}")
    label = label or next((name for name in first.names if name.lower() in _LABEL_NAMES), None)
    if label is None or label not in first.names:
        raise LogError(f"{paths[0]}: no column {label or ' or '.join(_LABEL_NAMES)}; name the label with `label`")
    dense, sparse, lists = [], [], []
    for field in first:
        is_list = any(is_kind(field.type) for is_kind in (pa.types.is_list, pa.types.is_large_list))
        is_list = is_list or pa.types.is_fixed_size_list(field.type)
        if field.name == label:
            continue
        if pa.types.is_floating(field.type):
            dense.append(field.name)
        elif pa.types.is_integer(field.type.value_type if is_list else field.type):
            sparse.append(field.name)
            lists += [field.name] if is_list else []
        else:
            raise LogError(
                f"{paths[0]}, column {field.name}: is {field.type}, neither a float nor an id nor a list of ids; raw "
                "values are for `dlrm preprocess`"
            )
    try:
        return _schema("imported", label, dense, sparse, lists)
    except ValidationError as error:
        raise LogError("\n".join([f"{paths[0]}: its columns make no schema:", *problems(error)])) from error
