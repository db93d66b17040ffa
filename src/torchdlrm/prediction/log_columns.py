"""Finds the columns of a log to predict: those of the model's schema, with or without label, in the file's order.

In: the first lines of a text, or the names of the columns.  Out: a schema by which the reader of logs
reads it: features as they were trained on, label and weight if they are there, and passthrough columns as text.

A text with a header, and a log that names its columns, are read by name: the order is free, and what is no feature may
be missing or more.  A text without one has the columns of the schema, or these without label and weight.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchdlrm.bundle.sample import PREDICTION_COLUMN
from torchdlrm.errors import LogError
from torchdlrm.features.columns import (
    Column,
    DenseColumn,
    IgnoredColumn,
    LabelColumn,
    SparseColumn,
    TimeColumn,
    WeightColumn,
)
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.format import OpenLog, found_by_name, ignored

Writing = Literal["log", "csv", "tsv"]  # as the schema says, or in the usual way
# Which columns of the log are wanted besides those that are asked for: none; those that name a row; all.
Kept = Literal["none", "keys", "all"]
_ID_NAME = re.compile(r"(?i:(^|[\W_])(id|uuid|key)$)|[a-z]I[dD]$")


@dataclass(frozen=True)
class LogColumns:
    """How a log is read.

    Attributes:
        schema: its columns; with `header` where the first line names them.
        passthrough: names of the columns that are wanted.
    """

    schema: FeatureSchema
    passthrough: Sequence[str]

    @property
    def has_label(self) -> bool:
        """Whether the log has the label."""
        return any(isinstance(column, LabelColumn) for column in self.schema.columns)


def schema_for_writing(schema: FeatureSchema, writing: Writing) -> FeatureSchema:
    """The schema of a log that is written as the schema says (`log`), or as `csv` or `tsv` in the usual way."""
    if writing == "log":
        return schema
    written = {"separator": ",", "quote": '"'} if writing == "csv" else {"separator": "\t", "quote": None}
    return schema.model_copy(update=written)


def find_columns(
    log: OpenLog, path: Path, schema: FeatureSchema, passthrough: Sequence[str], kept: Kept = "none"
) -> LogColumns:
    """Look at the names or the first rows of a log.

    Args:
        log: it.
        path: for messages.
        schema: the model's columns, and how a text is written.
        passthrough: names of other columns that are wanted.
        kept: which are wanted besides.

    Raises:
        LogError: a feature, or a column that is wanted, is not there.
    """
    if log.names is not None:
        return _by_name(log.names, str(path), schema, passthrough, kept, header=False)
    first = log.first_rows[0] if log.first_rows else []
    if schema.header or {column.log_name for column in schema.features} <= set(first):
        return _by_name(first, f"{path}, line 1 (header)", schema, passthrough, kept, header=True)
    without_label = [column for column in schema.columns if not isinstance(column, LabelColumn | WeightColumn)]
    # A bad line may have any number of columns: most lines are good.
    num_unlabelled = sum(len(row) == len(without_label) for row in log.first_rows)
    num_labelled = sum(len(row) == len(schema.columns) for row in log.first_rows)
    columns = without_label if num_unlabelled > num_labelled else list(schema.columns)
    missing = [name for name in passthrough if name not in {column.name for column in columns}]
    if missing:
        raise LogError(_not_there(missing, str(path), [column.name for column in columns]))
    wanted = [*passthrough, *_kept({column.name: column for column in columns}, passthrough, kept)]
    read = schema.with_columns([_as_read(column, column.name, wanted, schema) for column in columns])
    return LogColumns(read, passthrough=wanted)


def _by_name(
    names: Sequence[str], where: str, schema: FeatureSchema, passthrough: Sequence[str], kept: Kept, *, header: bool
) -> LogColumns:
    found = found_by_name(names, where, schema, schema.features, "the model")
    by_name = {names[i] if column is None else column.name: column for i, column in enumerate(found)}
    wanted = [*passthrough, *_kept(by_name, passthrough, kept)]
    columns = [_as_read(column, names[i], wanted, schema, at=i) for i, column in enumerate(found)]
    missing = set(wanted) - {column.name for column in columns}
    if missing:
        raise LogError(_not_there([name for name in wanted if name in missing], where, names))
    read = schema.with_columns(columns).model_copy(update={"header": header})
    return LogColumns(read, passthrough=wanted)


def _kept(columns: Mapping[str, Column | None], passthrough: Sequence[str], kept: Kept) -> list[str]:
    """The columns that are wanted besides `passthrough`, in the order of the log; None is one of the log alone."""
    if kept == "none":
        return []
    others = {name: column for name, column in columns.items() if name not in {*passthrough, PREDICTION_COLUMN, ""}}
    return [name for name, column in others.items() if kept == "all" or _names_a_row(name, column)]


def _names_a_row(name: str, column: Column | None) -> bool:
    """Whether a column says which row it is, and not only what is in it: times, ids, and what is no feature."""
    if isinstance(column, TimeColumn | IgnoredColumn):
        return True
    is_one_value = column is None or (isinstance(column, SparseColumn) and not column.is_multi_valued)
    return is_one_value and any(_ID_NAME.search(text) for text in (name, column.log_name if column else name))


def _as_read(
    column: Column | None, log_name: str, passthrough: Sequence[str], schema: FeatureSchema, *, at: int = 0
) -> Column:
    """A column of the log as it is to be read; `column` is that of the schema, None where it is of the log alone."""
    others = {label.name for label in schema.labels} - {schema.label.name}
    if isinstance(column, DenseColumn | SparseColumn | LabelColumn | WeightColumn) and column.name not in others:
        return column
    name = log_name if column is None else column.name
    if name in passthrough:
        # Any text may name a column of a log, not only what a schema allows.
        return SparseColumn.model_construct(name=name, header_name=log_name, kind="string", role="sparse")
    if column is None:
        return ignored(at, log_name)
    return IgnoredColumn.model_construct(name=name, header_name=log_name, role="ignore")


def _not_there(missing: Sequence[str], where: str, names: Sequence[str]) -> str:
    return f"`columns`: {where} has no column {', '.join(missing)}; it has {', '.join(names)}"
