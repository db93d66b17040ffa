r"""Describes a click log: its columns (`torchdlrm.features.columns`), how it is written, and how its rows are split.

Out: a `FeatureSchema`, which every later stage shares; `torchdlrm.features.schema_file` reads one from a TOML file:

    name = "criteo"
    separator = "\t"
    header = false
    columns = [
        { role = "label", name = "label" },
        { role = "dense", name = "int_0", kind = "int", transform = "log_plus_3" },
        { role = "sparse", name = "cat_0", kind = "hex" },
    ]

The columns are in the order of the file (in Parquet, and where a header names them, they are found by name).
docs/preprocessing.md describes every key.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from torchdlrm.features.buckets import Buckets
from torchdlrm.features.columns import (
    Column,
    DenseColumn,
    Feature,
    Frozen,
    IgnoredColumn,
    LabelColumn,
    SparseColumn,
    Texts,
    TimeColumn,
    WeightColumn,
    bucket_feature,
)
from torchdlrm.toml import did_you_mean

NUM_CRITEO_DENSE = 13
NUM_CRITEO_SPARSE = 26


class SplitRule(Frozen):
    """How rows are split; `torchdlrm.data.splits` has the rules.  `val` and `test` are fractions of all rows."""

    rule: Literal["criteo", "order", "random", "time", "folder"] = "criteo"
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.1

    def _contradictions(self) -> Iterator[str]:
        if self.val + self.test >= 1:
            yield f"val and test must leave rows for training, but {self.val} + {self.test} is not below 1"


class FeatureSchema(Frozen):
    """The columns of a log in the order of the file, and how the file is written."""

    name: str
    separator: Annotated[str, Field(min_length=1, max_length=1)] = "\t"
    quote: Literal['"'] | None = None
    header: bool = False
    null_values: Texts | None = None
    split: SplitRule = SplitRule()
    columns: tuple[Column, ...] = Field(strict=False)
    # Of several labels the one that a run learns; no setting of a schema's file, but of the run's config.
    run_label: str | None = None
    # Where it learns several, all of them, the one that it is judged by first.
    run_labels: Annotated[tuple[str, ...], Field(strict=False)] | None = None

    def _contradictions(self) -> Iterator[str]:
        names = [column.name for column in self.columns]
        for i, name in enumerate(names):
            if name in names[:i]:
                yield f"columns {names.index(name) + 1} and {i + 1} are both named {name!r}; a name is for one column"
        for column in self.sparse_columns:
            if column.weights_name in names:
                yield (
                    f"column {names.index(column.weights_name) + 1} has the name of the weights of {column.name}; "
                    "give one of them another"
                )
        for feature in self.sparse:
            if feature.raw_name != feature.name and feature.name in names:
                yield (
                    f"column {names.index(feature.name) + 1} has the name of the buckets of {feature.raw_name}; "
                    "give one of them another"
                )
        yield from self._of_shared_tables()
        if not self.separator.isascii() or self.separator in '\r\n\0"':
            yield f"separator must be one ASCII character, no line end and no quote, not {self.separator!r}"
        num_time = sum(isinstance(column, TimeColumn) for column in self.columns)
        if num_time > 1 or (self.split.rule == "time" and num_time == 0):
            yield f"{num_time} columns have the role 'time'; a split by time needs one, and no log has more"
        if sum(isinstance(column, WeightColumn) for column in self.columns) > 1:
            yield "at most one column has the role 'weight': a row has one weight"
        if not self.labels:
            yield "at least one column must have the role 'label'"
        if not self.sparse:
            yield "at least one column must have the role 'sparse': a DLRM is built of embedding tables"

    def _of_shared_tables(self) -> Iterator[str]:
        """Why columns with a `table` cannot share that one's."""
        sparse = {column.name: column for column in self.sparse_columns}
        for name, column in sparse.items():
            if column.table is None:
                continue
            owner, what = sparse.get(column.table), f"column {name}: table = {column.table!r}"
            if owner is None:
                yield f"{what}: there is no such sparse column{did_you_mean(column.table, sparse)}"
                continue
            if owner.table is not None:
                hint = "leave it out" if owner.table == name else f"write table = {owner.table!r}"
                yield f"{what}: shares a table itself; {hint}"
            if owner.buckets is not None:
                yield f"{what}: has buckets; a table is shared by columns whose values themselves get ids"
            for key in ("kind", "hash", "num_embeddings"):
                ours, theirs = getattr(column, key), getattr(owner, key)
                if ours not in (theirs, None):
                    yield f"{what}: has {key} {theirs}, this one {ours}; values of one table are of one {key}"

    @model_validator(mode="after")
    def _settle(self) -> Self:
        """Give each column its `null_values`, and the size of a table that it shares: readers know the column alone."""
        sparse = {column.name: column for column in self.sparse_columns}

        def settled(column: Column) -> Column:
            changed: dict[str, Any] = {}
            if self.null_values is not None and column.null_values is None and not isinstance(column, IgnoredColumn):
                changed["null_values"] = self.null_values
            if isinstance(column, SparseColumn) and column.table is not None:
                owner = sparse[column.table]
                changed |= {"hash": owner.hash, "num_embeddings": owner.num_embeddings}
            return column.model_copy(update=changed) if changed else column

        object.__setattr__(self, "columns", tuple(map(settled, self.columns)))
        return self

    @property
    def used(self) -> tuple[LabelColumn | DenseColumn | SparseColumn | TimeColumn | WeightColumn, ...]:
        """The columns that are read, in the order of the file."""
        return tuple(column for column in self.columns if not isinstance(column, IgnoredColumn))

    @property
    def labels(self) -> tuple[LabelColumn, ...]:
        """The columns of labels, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, LabelColumn))

    @property
    def learnt(self) -> tuple[LabelColumn, ...]:
        """The labels that are learnt, in the order of a model's outputs: the first of all where none was chosen."""
        labels = {column.name: column for column in self.labels}
        chosen = [labels[name] for name in self.run_labels or (self.run_label,) if name in labels]
        return tuple(chosen) or self.labels[:1]

    @property
    def label(self) -> LabelColumn:
        """The label that is judged by: the first of those that are learnt."""
        return self.learnt[0]

    @property
    def first_of_several(self) -> str:
        """The name of `label` where several are learnt, so that what is shown of it names it; empty where one is."""
        return self.label.name if len(self.learnt) > 1 else ""

    def label_columns(self, name: str) -> tuple[str, ...]:
        """What columns of values are called: `name` of the first label that is learnt, `name_LABEL` of each other."""
        # A server asks for each request: most models have one label, and need not look for it.
        return (name, *(() if self.run_labels is None else (f"{name}_{label.name}" for label in self.learnt[1:])))

    def by_label(self, values: NDArray[Any], name: str | None = None) -> dict[str, NDArray[Any]]:
        """Values of rows, [B] or of several labels [B, L], as those of each label [B].

        By the labels that are learnt; where there is a `name`, by those of columns.
        """
        keys = [label.name for label in self.learnt] if name is None else self.label_columns(name)
        return dict(zip(keys, np.ascontiguousarray(values.reshape(-1, len(keys)).T), strict=True))

    @property
    def weight(self) -> WeightColumn | None:
        """The column of the rows' weights, if there is one."""
        return next((column for column in self.columns if isinstance(column, WeightColumn)), None)

    @property
    def target_names(self) -> tuple[str, ...]:
        """What training needs of a row besides its features: the labels it learns, and the weight if there is one."""
        return tuple(column.name for column in (*self.learnt, self.weight) if column is not None)

    @property
    def stored_targets(self) -> tuple[str, ...]:
        """What a dataset holds of a row besides its features: all labels, and the weight if there is one."""
        return tuple(column.name for column in (*self.labels, self.weight) if column is not None)

    @property
    def time(self) -> TimeColumn | None:
        """The column that orders the rows, if there is one."""
        return next((column for column in self.columns if isinstance(column, TimeColumn)), None)

    @property
    def dense(self) -> tuple[DenseColumn, ...]:
        """The dense columns that hold a number, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, DenseColumn) and column.size is None)

    @property
    def content(self) -> tuple[DenseColumn, ...]:
        """The dense columns that hold a vector, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, DenseColumn) and column.size is not None)

    @property
    def sparse_columns(self) -> tuple[SparseColumn, ...]:
        """The sparse columns, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, SparseColumn))

    @property
    def sparse(self) -> tuple[SparseColumn, ...]:
        """The sparse features in the order of the KJT's keys: the sparse columns, then the buckets of dense ones."""
        buckets = (bucket_feature(column) for column in self.dense if column.buckets is not None)
        return (*self.sparse_columns, *buckets)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns of a raw row that a model reads: the dense ones, numbers first, then the sparse ones."""
        return (*self.dense, *self.content, *self.sparse_columns)

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """The columns of encoded rows: the dense ones, then those of each sparse feature."""
        sparse = (name for feature in self.sparse for name in feature.encoded_names)
        return (*(column.name for column in (*self.dense, *self.content)), *sparse)

    @property
    def has_value_weights(self) -> bool:
        """Whether values of a multi-valued column have weights."""
        return any(column.weight_separator is not None for column in self.sparse_columns)

    @property
    def has_ids(self) -> bool:
        """Whether a column's values are ids already."""
        return any(column.kind == "id" for column in self.sparse_columns)

    @property
    def has_histories(self) -> bool:
        """Whether columns share a table, or keep the last of their values."""
        return any(column.table is not None or column.keep is not None for column in self.sparse_columns)

    def sharing(self, owner: str) -> tuple[SparseColumn, ...]:
        """The columns that have the vocabulary and the table of one: itself first, then those that share them."""
        found = [column for column in self.sparse if column.owner == owner]
        return tuple(sorted(found, key=lambda column: column.name != owner))

    @property
    def needs_newer_formats(self) -> bool:
        """Whether it says what the first formats of datasets and bundles could not."""
        if self.has_value_weights:
            return True
        return (
            len(self.labels) > 1 or self.weight is not None or any(column.buckets is not None for column in self.sparse)
        )

    def with_boundaries(self, boundaries: Mapping[str, Sequence[float]]) -> Self:
        """The schema with the boundaries of its quantiles, by the name of the sparse feature."""
        fitted = {
            feature.raw_name: feature.buckets.fitted(boundaries[feature.name])
            for feature in self.sparse
            if feature.buckets is not None and feature.needs_fit
        }
        changed = {name: {"buckets": buckets} for name, buckets in fitted.items()}
        return self.with_columns([column.model_copy(update=changed.get(column.name)) for column in self.columns])

    def named_as_in(self, names: Collection[str]) -> Self:
        """The layout of a log with columns of these names: one that is there by its `name` alone is read by that."""
        left = set(names) - {column.log_name for column in self.columns}
        by_name = {column.name for column in self.columns if column.log_name not in names and column.name in left}
        changed = {name: {"header_name": None} for name in by_name}
        return self.with_columns([column.model_copy(update=changed.get(column.name)) for column in self.columns])

    def with_columns(self, columns: Sequence[Column]) -> Self:
        """The layout of a log to predict: its features are those of this schema, and what else it has may differ.

        Such a log need not have a label: without one, the property `label` is not there either.
        """
        return self.model_copy(update={"columns": tuple(columns)})


def criteo_schema() -> FeatureSchema:
    """The layout of Criteo's public logs; column names are those of `torchrec.datasets.criteo`."""
    columns: list[LabelColumn | DenseColumn | SparseColumn | TimeColumn | IgnoredColumn] = [LabelColumn(name="label")]
    columns += [DenseColumn(name=f"int_{i}", kind="int") for i in range(NUM_CRITEO_DENSE)]
    columns += [SparseColumn(name=f"cat_{i}", kind="hex") for i in range(NUM_CRITEO_SPARSE)]
    return FeatureSchema(name="criteo", columns=tuple(columns))


def bucketed_criteo_schema() -> FeatureSchema:
    """Criteo's layout with its 13 counts as categories too, by floor(ln(x)^2) as BARS has them: 39 sparse features."""
    schema = criteo_schema()
    columns = [
        DenseColumn(name=column.name, kind="int", buckets=Buckets.model_validate("log_square"))
        if isinstance(column, DenseColumn)
        else column
        for column in schema.columns
    ]
    return FeatureSchema(name="criteo-bucketed", columns=tuple(columns))


PRESETS = {"criteo": criteo_schema, "criteo-bucketed": bucketed_criteo_schema}
