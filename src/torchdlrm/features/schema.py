r"""Describes the columns of a click log: their names and roles, and how its rows are split.

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

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Annotated, Literal, Self, get_args

import polars as pl
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from torchdlrm.features.buckets import Buckets
from torchdlrm.features.kinds import KINDS, DenseKindName, SparseKindName, ValueKind
from torchdlrm.features.transforms import TransformName
from torchdlrm.toml import explain

NUM_CRITEO_DENSE = 13
NUM_CRITEO_SPARSE = 26
_BUCKET_SUFFIX = "_bucket"
_WEIGHTS_SUFFIX = "_weights"

ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _as_texts(given: object) -> object:
    """One value or a list of them, as texts: a log is text, so `1`, `"1"` and `["1"]` say the same."""
    several = given if isinstance(given, list | tuple) else [given]
    return tuple(
        str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value
        for value in several
    )


Texts = Annotated[tuple[str, ...], BeforeValidator(_as_texts)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Column(_Frozen):
    """What every column has.

    `header_name` is its name in the log, where that differs from `name`.  `null_values` are texts that stand for a
    missing value, as an empty cell does; where a column has none of its own, they are those of the file.
    """

    name: ColumnName
    header_name: str | None = None
    null_values: Texts | None = None

    @property
    def log_name(self) -> str:
        """The column's name in the log's header, or in a Parquet file."""
        return self.name if self.header_name is None else self.header_name


class LabelColumn(_Column):
    """Whether the row was clicked: 0 or 1, true or false; with `threshold`, a number that must reach it.

    With `positive`, these values are clicks; the others are none, or, with `negative`, these alone are none.
    """

    role: Literal["label"] = "label"
    threshold: float | None = None
    positive: Annotated[Texts, Field(min_length=1)] | None = None
    negative: Annotated[Texts, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.threshold is not None and self.positive is not None:
            msg = "has threshold and positive; one of them says what a click is"
            raise ValueError(msg)
        if self.negative is not None and self.positive is None:
            msg = "negative needs positive, the values that are clicks"
            raise ValueError(msg)
        if both := set(self.positive or ()) & set(self.negative or ()):
            msg = f"{', '.join(sorted(both))} stands in positive and in negative"
            raise ValueError(msg)
        return self


class WeightColumn(_Column):
    """How much the row counts, in the loss and in every metric: a finite number of at least 0."""

    role: Literal["weight"] = "weight"


class _FeatureColumn(_Column):
    """A column that the model reads."""

    if TYPE_CHECKING:
        kind: str  # not a field of this class, so that the kind stands behind the role

    @property
    def is_multi_valued(self) -> bool:
        """Whether a cell holds a list of values."""
        return False

    @property
    def value_kind(self) -> ValueKind:
        """What is true of every value of the column."""
        return KINDS[self.kind]

    @property
    def dtype(self) -> pl.DataType:
        """The type of the typed column."""
        one = self.value_kind.dtype()
        return pl.List(one) if self.is_multi_valued else one


MinCount = Annotated[int, Field(ge=1)]
# In the files of datasets and bundles it keeps its old name.
MaxEmbeddings = Annotated[
    int | None, Field(ge=2, validation_alias=AliasChoices("max_embeddings", "max_rows"), serialization_alias="max_rows")
]
HashSize = Annotated[int, Field(ge=1, lt=2**31)]


class DenseColumn(_FeatureColumn):
    """A number, `float` or `int` of 64 bits; `torchdlrm.features.transforms` says what becomes of it.

    With `buckets` it is a sparse feature as well, NAME_bucket; `min_count`, `max_embeddings` and `hash` are of that.
    """

    role: Literal["dense"] = "dense"
    kind: DenseKindName = "float"
    transform: TransformName = "log_plus_3"
    buckets: Buckets | None = None
    min_count: MinCount | None = None
    max_embeddings: MaxEmbeddings = None
    hash: HashSize | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.buckets is None:
            given = [key for key in ("min_count", "max_embeddings", "hash") if getattr(self, key) is not None]
            if given:
                msg = f"{given[0]} is for the sparse feature that `buckets` makes of a dense column, and it has none"
                raise ValueError(msg)
        _check_numbering(self)
        return self


class SparseColumn(_FeatureColumn):
    """A categorical value: `hex` is up to 8 hexadecimal digits, `int` a 64-bit integer, `string` any text.

    A column with a `value_separator` holds any number of values in a cell (in Parquet: a list), of which the first
    `max_values` count; with a `weight_separator` each may end with it and a weight, which multiplies its embedding.
    `min_count` and `max_embeddings` override the job's; `hash` numbers values by a hash into that many rows instead of
    by a vocabulary.
    """

    role: Literal["sparse"] = "sparse"
    kind: SparseKindName = "string"
    value_separator: Annotated[str, Field(min_length=1)] | None = None
    weight_separator: Annotated[str, Field(min_length=1)] | None = None
    max_values: Annotated[int, Field(ge=1)] | None = None
    min_count: MinCount | None = None
    max_embeddings: MaxEmbeddings = None
    hash: HashSize | None = None
    buckets: Buckets | None = None

    @property
    def raw_name(self) -> str:
        """The column of raw rows that it is made of."""
        return self.name

    @property
    def vocabulary_kind(self) -> SparseKindName:
        """The kind of the values that get ids: of buckets their numbers."""
        return self.kind if self.buckets is None else "int"

    @property
    def vocabulary_dtype(self) -> type[pl.DataType]:
        """The type of the values that get ids."""
        return KINDS[self.vocabulary_kind].dtype

    @property
    def needs_fit(self) -> bool:
        """Whether its buckets are quantiles of the training rows."""
        return self.buckets is not None and self.buckets.needs_fit

    def categories(self, values: pl.Series) -> pl.Series:
        """What gets ids: the column's values themselves (one a row), or which buckets they fall in."""
        if self.buckets is None:
            return values
        return self.buckets.bucketing.of_column(values.cast(pl.Float64) if self.kind == "float" else values)

    @property
    def is_multi_valued(self) -> bool:
        """Whether a cell holds a list of values."""
        return self.value_separator is not None

    @property
    def weights_name(self) -> str | None:
        """The column of the values' weights in encoded rows, next to that of their ids; None without weights."""
        return None if self.weight_separator is None else f"{self.name}{_WEIGHTS_SUFFIX}"

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """Its columns in encoded rows."""
        return (self.name,) if self.weights_name is None else (self.name, self.weights_name)

    @property
    def dtype(self) -> pl.DataType:
        """The type of the typed column."""
        if self.weight_separator is None:
            return super().dtype
        return pl.List(pl.Struct({"value": self.value_kind.dtype, "weight": pl.Float32}))

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_values is not None and self.value_separator is None:
            msg = "max_values needs value_separator, the text between two values of a cell"
            raise ValueError(msg)
        if self.weight_separator is not None and self.weight_separator == (self.value_separator or ""):
            msg = "weight_separator must be another text than value_separator"
            raise ValueError(msg)
        if self.weight_separator is not None and self.value_separator is None:
            msg = "weight_separator needs value_separator, the text between two values of a cell"
            raise ValueError(msg)
        if self.kind == "float" and self.buckets is None:
            msg = 'kind float needs buckets, such as "log_square", which make categories of numbers'
            raise ValueError(msg)
        if self.buckets is not None and self.kind not in ("int", "float"):
            msg = f"buckets are for numbers, kind int or float, and its kind is {self.kind}"
            raise ValueError(msg)
        _check_numbering(self)
        return self


def _check_numbering(column: DenseColumn | SparseColumn) -> None:
    if column.hash is not None and (column.min_count is not None or column.max_embeddings is not None):
        msg = "hash goes without min_count and max_embeddings, which are for vocabularies"
        raise ValueError(msg)


class BucketFeature(SparseColumn):
    """The sparse feature that `buckets` makes of a dense column; no column of the log by itself."""

    raw: ColumnName

    @property
    def raw_name(self) -> str:
        """The dense column."""
        return self.raw


@cache
def _bucket_feature(column: DenseColumn) -> BucketFeature:
    return BucketFeature(
        name=column.name + _BUCKET_SUFFIX,
        kind=column.kind,
        null_values=column.null_values,
        buckets=column.buckets,
        min_count=column.min_count,
        max_embeddings=column.max_embeddings,
        hash=column.hash,
        raw=column.name,
    )


Feature = DenseColumn | SparseColumn


class TimeColumn(_Column):
    """The column that orders the rows in time: a number, or `datetime`, text as ISO 8601 writes it."""

    role: Literal["time"] = "time"
    kind: Literal["int", "float", "datetime"] = "int"


class IgnoredColumn(_Column):
    """A column of the log that is not used."""

    role: Literal["ignore"] = "ignore"


_AnyColumn = LabelColumn | DenseColumn | SparseColumn | TimeColumn | WeightColumn | IgnoredColumn
Column = Annotated[_AnyColumn, Field(discriminator="role")]
ROLES: dict[str, type[_Column]] = {kind.model_fields["role"].default: kind for kind in get_args(_AnyColumn)}


class SplitRule(_Frozen):
    """How rows are split; `torchdlrm.data.splits` has the rules.  `val` and `test` are shares of all rows."""

    rule: Literal["criteo", "order", "random", "time"] = "criteo"
    val: Annotated[float, Field(ge=0, lt=1)] = 0.1
    test: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.val + self.test >= 1:
            msg = f"val and test must leave rows for training, but {self.val} + {self.test} is not below 1"
            raise ValueError(msg)
        return self


class FeatureSchema(_Frozen):
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

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.null_values is not None:
            # Each column has its own from here on: whatever reads cells knows the column alone.
            object.__setattr__(self, "columns", tuple(map(self._with_null_values, self.columns)))
        names = [column.name for column in self.columns]
        for i, name in enumerate(names):
            if name in names[:i]:
                msg = f"columns {names.index(name) + 1} and {i + 1} are both named {name!r}; a name is for one column"
                raise ValueError(msg)
        for column in self.sparse_columns:
            if column.weights_name in names:
                msg = f"column {names.index(column.weights_name) + 1} has the name of the weights of {column.name}; "
                msg += "give one of them another"
                raise ValueError(msg)
        for feature in self.sparse:
            if feature.raw_name != feature.name and feature.name in names:
                msg = f"column {names.index(feature.name) + 1} has the name of the buckets of {feature.raw_name}; "
                msg += "give one of them another"
                raise ValueError(msg)
        if not self.separator.isascii() or self.separator in '\r\n\0"':
            msg = f"separator must be one ASCII character, no line end and no quote, not {self.separator!r}"
            raise ValueError(msg)
        num_time = sum(isinstance(column, TimeColumn) for column in self.columns)
        if num_time > 1 or (self.split.rule == "time" and num_time == 0):
            msg = f"{num_time} columns have the role 'time'; a split by time needs one, and no log has more"
            raise ValueError(msg)
        if sum(isinstance(column, WeightColumn) for column in self.columns) > 1:
            raise ValueError("at most one column has the role 'weight': a row has one weight")
        if not self.labels:
            raise ValueError("at least one column must have the role 'label'")
        if not self.sparse:
            raise ValueError("at least one column must have the role 'sparse': a DLRM is built of embedding tables")
        return self

    def _with_null_values(self, column: Column) -> Column:
        if column.null_values is not None or isinstance(column, IgnoredColumn):
            return column
        return column.model_copy(update={"null_values": self.null_values})

    @property
    def used(self) -> tuple[LabelColumn | DenseColumn | SparseColumn | TimeColumn | WeightColumn, ...]:
        """The columns that are read, in the order of the file."""
        return tuple(column for column in self.columns if not isinstance(column, IgnoredColumn))

    @property
    def labels(self) -> tuple[LabelColumn, ...]:
        """The columns of labels, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, LabelColumn))

    @property
    def label(self) -> LabelColumn:
        """The label that is learnt and judged by: the first where none was chosen."""
        labels = self.labels
        return next((column for column in labels if column.name == self.run_label), labels[0])

    @property
    def weight(self) -> WeightColumn | None:
        """The column of the rows' weights, if there is one."""
        return next((column for column in self.columns if isinstance(column, WeightColumn)), None)

    @property
    def target_names(self) -> tuple[str, ...]:
        """What training needs of a row besides its features: the label, and the weight if there is one."""
        return tuple(column.name for column in (self.label, self.weight) if column is not None)

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
        """The dense columns, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, DenseColumn))

    @property
    def sparse_columns(self) -> tuple[SparseColumn, ...]:
        """The sparse columns, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, SparseColumn))

    @property
    def sparse(self) -> tuple[SparseColumn, ...]:
        """The sparse features in the order of the KJT's keys: the sparse columns, then the buckets of dense ones."""
        buckets = (_bucket_feature(column) for column in self.dense if column.buckets is not None)
        return (*self.sparse_columns, *buckets)

    @property
    def features(self) -> tuple[Feature, ...]:
        """The columns of a raw row that a model reads: the dense ones, then the sparse ones."""
        return (*self.dense, *self.sparse_columns)

    @property
    def encoded_names(self) -> tuple[str, ...]:
        """The columns of encoded rows: the dense ones, then those of each sparse feature."""
        sparse = (name for feature in self.sparse for name in feature.encoded_names)
        return (*(column.name for column in self.dense), *sparse)

    @property
    def has_value_weights(self) -> bool:
        """Whether values of a multi-valued column have weights."""
        return any(column.weight_separator is not None for column in self.sparse_columns)

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


def problems(error: ValidationError) -> Sequence[str]:
    """One line for each problem that pydantic found: key, what is wrong, the value."""
    items = [(".".join(map(str, item["loc"])), explain(item)) for item in error.errors(include_url=False)]
    return [f"  {key}: {text}" if key else f"  {text}" for key, text in items]
