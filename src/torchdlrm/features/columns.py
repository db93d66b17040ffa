"""Defines the columns of a click log: one class for each role, with all that a schema says of such a column.

Out: the columns that a `torchdlrm.features.schema.FeatureSchema` is made of; docs/preprocessing.md describes every key.
"""

from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import polars as pl
from pydantic import AfterValidator, AliasChoices, BeforeValidator, ConfigDict, Field, model_validator

from torchdlrm.features.buckets import Buckets
from torchdlrm.features.kinds import KINDS, DenseKindName, SparseKindName, ValueKind
from torchdlrm.features.transforms import TRANSFORMS, VECTOR_TRANSFORMS, TransformName
from torchdlrm.records import Record

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


class Frozen(Record):
    """A part of a schema: no other keys, no guesses at types, no changes."""

    model_config = ConfigDict(strict=True)


class _Column(Frozen):
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

    def _contradictions(self) -> Iterator[str]:
        if self.threshold is not None and self.positive is not None:
            yield "has threshold and positive; one of them says what a click is"
        if self.negative is not None and self.positive is None:
            yield "negative needs positive, the values that are clicks"
        if both := set(self.positive or ()) & set(self.negative or ()):
            yield f"{', '.join(sorted(both))} stands in positive and in negative"


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
        return self.kind == "vector"

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
# "first" is what an older schema means by saying nothing, and is written as that.
Keep = Annotated[Literal["first", "last"] | None, AfterValidator(lambda keep: None if keep == "first" else keep)]


class DenseColumn(_FeatureColumn):
    """A number, `float` or `int` of 64 bits; `torchdlrm.features.transforms` says what becomes of it.

    With `buckets` it is a sparse feature as well, NAME_bucket; `min_count`, `max_embeddings` and `hash` are of that.
    Of kind `vector` it holds `size` numbers, which a dataset has as `stored` (`torchdlrm.features.vectors`).
    """

    role: Literal["dense"] = "dense"
    kind: DenseKindName = "float"
    transform: TransformName = "log_plus_3"
    size: Annotated[int, Field(ge=1, le=2**14)] | None = None
    stored: Literal["float16", "float32"] | None = None
    buckets: Buckets | None = None
    min_count: MinCount | None = None
    max_embeddings: MaxEmbeddings = None
    hash: HashSize | None = None
    weight_separator: ClassVar[None] = None

    @model_validator(mode="before")
    @classmethod
    def _of_a_vector(cls, given: Any) -> Any:
        is_vector = isinstance(given, dict) and given.get("kind") == "vector"
        return {"transform": "unit", "stored": "float16", **given} if is_vector else given

    def _contradictions(self) -> Iterator[str]:
        if self.is_multi_valued == (self.size is None):
            yield "kind vector and size, how many numbers each cell has, go together"
        allowed, other = (VECTOR_TRANSFORMS, "buckets") if self.is_multi_valued else (TRANSFORMS, "stored")
        if self.transform not in allowed or getattr(self, other) is not None:
            yield f"kind {self.kind} goes without {other}, and with the transform {' or '.join(allowed)}"
        if self.buckets is None:
            given = [key for key in ("min_count", "max_embeddings", "hash") if getattr(self, key) is not None]
            if given:
                yield f"{given[0]} is for the sparse feature that `buckets` makes of a dense column, and it has none"
        yield from _of_numbering(self)


class SparseColumn(_FeatureColumn):
    """A categorical value: `hex` is up to 8 hexadecimal digits, `int` a 64-bit integer, `string` any text.

    A value of kind `id` is a row of the table itself, which has `num_embeddings` rows, or else one more than the
    largest id of the log.

    A column with a `value_separator` holds any number of values in a cell (in Parquet: a list), of which the first
    `max_values` count, or with `keep` "last" the last ones, which are the newest where a cell is a history; with a
    `weight_separator` each may end with it and a weight, which multiplies its embedding.
    `table` names another sparse column: this one's values are counted with that one's, and have the same ids and
    embeddings.
    `min_count` and `max_embeddings` override the job's; `hash` numbers values by a hash into that many rows instead of
    by a vocabulary.
    """

    role: Literal["sparse"] = "sparse"
    kind: SparseKindName = "string"
    value_separator: Annotated[str, Field(min_length=1)] | None = None
    weight_separator: Annotated[str, Field(min_length=1)] | None = None
    max_values: Annotated[int, Field(ge=1)] | None = None
    keep: Keep = None
    table: ColumnName | None = None
    min_count: MinCount | None = None
    max_embeddings: MaxEmbeddings = None
    hash: HashSize | None = None
    num_embeddings: HashSize | None = None
    buckets: Buckets | None = None

    @property
    def owner(self) -> str:
        """The column whose vocabulary and table it has: the one that `table` names, or itself."""
        return self.table or self.name

    @property
    def has_vocabulary(self) -> bool:
        """Whether values are counted to get ids: they are neither hashed nor ids already."""
        return self.hash is None and self.kind != "id"

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

    def _contradictions(self) -> Iterator[str]:
        if self.max_values is not None and self.value_separator is None:
            yield "max_values needs value_separator, the text between two values of a cell"
        if self.keep is not None and self.max_values is None:
            yield "keep needs max_values, the number of values that are kept"
        if self.weight_separator is not None and self.weight_separator == (self.value_separator or ""):
            yield "weight_separator must be another text than value_separator"
        if self.weight_separator is not None and self.value_separator is None:
            yield "weight_separator needs value_separator, the text between two values of a cell"
        if self.kind == "float" and self.buckets is None:
            yield 'kind float needs buckets, such as "log_square", which make categories of numbers'
        if self.buckets is not None and self.kind not in ("int", "float"):
            yield f"buckets are for numbers, kind int or float, and its kind is {self.kind}"
        if self.num_embeddings is not None and self.kind != "id":
            yield "num_embeddings is for kind id; other kinds have max_embeddings, or hash"
        given = [key for key in ("min_count", "max_embeddings", "buckets") if getattr(self, key) is not None]
        if given and self.table is not None:
            yield f"{given[0]} is not for a column with table = {self.table!r}, whose ids are that column's"
        given = [key for key in ("min_count", "max_embeddings", "hash") if getattr(self, key) is not None]
        if given and self.kind == "id":
            yield f"{given[0]} is not for kind id, whose values are the ids; num_embeddings is the size of the table"
        yield from _of_numbering(self)


def _of_numbering(column: DenseColumn | SparseColumn) -> Iterator[str]:
    if column.hash is not None and (column.min_count is not None or column.max_embeddings is not None):
        yield "hash goes without min_count and max_embeddings, which are for vocabularies"


class BucketFeature(SparseColumn):
    """The sparse feature that `buckets` makes of a dense column; no column of the log by itself."""

    raw: ColumnName

    @property
    def raw_name(self) -> str:
        """The dense column."""
        return self.raw


@cache
def bucket_feature(column: DenseColumn) -> BucketFeature:
    """The sparse feature that the buckets of a dense column are."""
    assert column.kind != "vector", "a vector has none"
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
