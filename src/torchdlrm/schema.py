r"""Which columns a click log has, and what each is: label, dense or sparse feature.

In: the name of a preset (`criteo`) or a TOML file.  Out: a `FeatureSchema`, which every later stage shares.

    name = "criteo"
    separator = "\t"
    header = false
    columns = [
        { role = "label", name = "label" },
        { role = "dense", name = "int_0", kind = "int", transform = "log_plus_3" },
        { role = "sparse", name = "cat_0", kind = "hex" },
    ]

The columns stand in the order of the file.
"""

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from torchdlrm.errors import SchemaError

NUM_CRITEO_DENSE = 13
NUM_CRITEO_SPARSE = 26

ColumnName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
DenseTransform = Literal["log_plus_3", "log1p", "standardize", "none"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class LabelColumn(_Frozen):
    """The column that says whether the row was clicked: 0 or 1."""

    role: Literal["label"] = "label"
    name: ColumnName


class DenseColumn(_Frozen):
    """A number, `float` or `int` of 64 bits; `torchdlrm.data.transforms` says what becomes of it."""

    role: Literal["dense"] = "dense"
    name: ColumnName
    kind: Literal["int", "float"] = "float"
    transform: DenseTransform = "log_plus_3"


class SparseColumn(_Frozen):
    """A categorical value: `hex` is up to 8 hexadecimal digits, `int` a 64-bit integer, `string` any text."""

    role: Literal["sparse"] = "sparse"
    name: ColumnName
    kind: Literal["string", "int", "hex"] = "string"


Column = Annotated[LabelColumn | DenseColumn | SparseColumn, Field(discriminator="role")]


class FeatureSchema(_Frozen):
    """The columns of a log in the order of the file, and how the file is written."""

    name: str
    separator: Annotated[str, Field(min_length=1, max_length=1)] = "\t"
    header: bool = False
    columns: tuple[Column, ...] = Field(strict=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        names = [column.name for column in self.columns]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            msg = f"column names must be unique, but {', '.join(twice)} stands more than once"
            raise ValueError(msg)
        if not self.separator.isascii() or self.separator in "\r\n\0":
            msg = f"separator must be one ASCII character and no line end, not {self.separator!r}"
            raise ValueError(msg)
        if sum(isinstance(column, LabelColumn) for column in self.columns) != 1:
            raise ValueError("exactly one column must have the role 'label'")
        if not self.dense or not self.sparse:
            raise ValueError("DLRM needs at least one dense and one sparse column")
        return self

    @property
    def label(self) -> LabelColumn:
        """The label's column."""
        return next(column for column in self.columns if isinstance(column, LabelColumn))

    @property
    def dense(self) -> tuple[DenseColumn, ...]:
        """The dense columns, in the order of the file."""
        return tuple(column for column in self.columns if isinstance(column, DenseColumn))

    @property
    def sparse(self) -> tuple[SparseColumn, ...]:
        """The sparse columns, in the order of the file: the order of the KJT's keys."""
        return tuple(column for column in self.columns if isinstance(column, SparseColumn))


def criteo_schema() -> FeatureSchema:
    """The layout of Criteo's public logs; column names are those of `torchrec.datasets.criteo`."""
    columns: list[LabelColumn | DenseColumn | SparseColumn] = [LabelColumn(name="label")]
    columns += [DenseColumn(name=f"int_{i}", kind="int") for i in range(NUM_CRITEO_DENSE)]
    columns += [SparseColumn(name=f"cat_{i}", kind="hex") for i in range(NUM_CRITEO_SPARSE)]
    return FeatureSchema(name="criteo", columns=tuple(columns))


PRESETS = {"criteo": criteo_schema}


def load_schema(name_or_path: str) -> FeatureSchema:
    """The preset of that name, or the schema in that TOML file.

    Raises:
        SchemaError: there is neither, or the file is not a valid schema; all problems in one message.
    """
    if name_or_path in PRESETS:
        return PRESETS[name_or_path]()
    path = Path(name_or_path)
    if not path.is_file():
        msg = f"--schema: {name_or_path!r} is neither a preset ({', '.join(PRESETS)}) nor a file"
        raise SchemaError(msg)
    try:
        with path.open("rb") as file:
            return FeatureSchema.model_validate(tomllib.load(file))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        msg = f"{path}: not a TOML file: {error}"
        raise SchemaError(msg) from error
    except ValidationError as error:
        raise SchemaError("\n".join([f"{path}: not a valid schema", *problems(error)])) from error


def problems(error: ValidationError) -> Sequence[str]:
    """One line for each problem that pydantic found: key, what is wrong, the value."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "(whole)"
        value = "" if item["type"] in {"missing", "value_error"} else f" (got {item['input']!r})"
        lines.append(f"  {key}: {item['msg'].removeprefix('Value error, ')}{value}")
    return lines
