"""Says which tables a model has for each sparse feature, and which of their rows stand for an id.

In: the model's config and the sparse features.  Out: `FeatureTable`s, one for each key of the KJT, in the order of the
features.

Most features have one table of dimension D.  `model.features` of the config makes some smaller, so that a dataset need
not be preprocessed again to try it (docs/decisions/the-config-says-which-tables-are-smaller.md):

- A table of a smaller dimension, whose rows a matrix projects to D (arXiv:1909.11810).
- Two tables of dimension D in place of one of n rows: one for the quotients of ids by c, of ceil(n / c) rows, and one
  of c rows for the remainders (arXiv:1909.02107). No two ids have both in common, and an id's vector is the product, or
  the sum, of the two rows. Ids are divided as integers, where batches are made; from then on the two are keys of their
  own.

Several keys may look into one table: those of features that share it, and those of a sequence, of which each key has
the id at one place from the end.  So one collection of pooled embeddings also gives those of single ids, whatever the
sharding.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from torchdlrm.config import ModelConfig
from torchdlrm.config.model import FeatureConfig
from torchdlrm.errors import ConfigError
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.toml import did_you_mean

Combination = Literal["mult", "add"]
_MAX_DIM = 8192  # of FBGEMM's kernels


def table_name(key: str) -> str:
    """The name of the table that is called after a key of the KJT."""
    return f"t_{key}"


@dataclass(frozen=True)
class Feature:
    """A sparse feature, as its tables see it, and as a model class is given it.

    Attributes:
        name: of the feature.
        num_ids: how many ids it has.
        is_multi_valued: whether a row may have several.
        max_values: how many at most; None: any number.
        table: the feature whose vocabulary and table it shares; None: it has its own.
    """

    name: str
    num_ids: int
    is_multi_valued: bool = False
    max_values: int | None = None
    table: str | None = None


def sparse_features(schema: FeatureSchema, num_ids: Mapping[str, int]) -> tuple[Feature, ...]:
    """The sparse features of a schema, in its order; `num_ids` of each by name."""
    return tuple(
        Feature(
            column.name,
            num_ids[column.name],
            is_multi_valued=column.is_multi_valued,
            max_values=column.max_values,
            table=column.table,
        )
        for column in schema.sparse
    )


def features_of_sizes(num_ids: Mapping[str, int], multi_valued: Collection[str] = ()) -> tuple[Feature, ...]:
    """Features of which no schema is known: how many ids each has, and the names of those with several a row."""
    return tuple(Feature(name, count, is_multi_valued=name in multi_valued) for name, count in num_ids.items())


@dataclass(frozen=True)
class Table:
    """A table that a model class asks for besides the one of the vectors: one or several numbers for each id.

    Attributes:
        feature: whose ids they are of; of several ids in a row the numbers are added up.
        dim: how many numbers.
        group: the name by which `SparseArch.group` gives those of all features that have it, [B, F, dim].
        init: initial rows are drawn from U(-init, init).
        frozen: whether training leaves it as it is.
    """

    feature: str
    dim: int
    group: str
    init: float = 0.0
    frozen: bool = False


@dataclass(frozen=True)
class FeatureTable:
    """What a key of the KJT looks up for its feature.

    Attributes:
        feature: whose ids the key has.
        key: the feature itself, or its name with `_q` for quotients, `_r` for remainders, `@0` for the last id of each
            row, `@1` for the one before it; or with the name of a group.
        table_key: the key that the table is called after: `key`, unless another feature has lent its table.
        rows: of the table.
        dim: of its rows.
        vector_dim: of the feature's vector, D; where rows are smaller, they are projected to it.
        combination: of the rows of quotient and remainder; None where the feature has one table.
        num_collisions: by what ids are divided.
        num_ids: of the feature: the rows of its table if it were one.
        position: of a sequence, which ids these are, from the end of each row's; None: they are all.
        asked: where a model class has asked for it, as it has; `dim` is a multiple of 4 then, and zeros fill its rows.
        pooling: the config of the feature, where it says that its vector is no sum of rows.
    """

    feature: str
    key: str
    table_key: str
    rows: int
    dim: int
    vector_dim: int
    combination: Combination | None
    num_collisions: int
    num_ids: int
    position: int | None = None
    asked: Table | None = None
    pooling: FeatureConfig | None = None

    @classmethod
    def whole(cls, feature: str, rows: int, dim: int, owner: str | None = None) -> Self:
        """The only table of a feature, of dimension D, which is `owner`'s where there is one."""
        return cls(feature, feature, owner or feature, rows, dim, dim, None, 1, rows)

    @property
    def name(self) -> str:
        """The name of the table."""
        return table_name(self.table_key)

    @property
    def is_plain(self) -> bool:
        """Whether its sums of rows are the feature's vectors."""
        is_sum = self.pooling is None and self.combination is None
        return self.is_vector and is_sum and self.dim == self.vector_dim

    @property
    def is_vector(self) -> bool:
        """Whether the feature's vector begins with what it looks up: there is one such key a feature, at most."""
        return self.position is None and self.asked is None and not self.is_remainder

    @property
    def is_remainder(self) -> bool:
        """Whether it is the second of two."""
        return self.combination is not None and self.key.endswith("_r")

    def parts(self) -> tuple[Self, ...]:
        """Itself, or quotients and remainders; it is of a whole feature."""
        if self.combination is None:
            return (self,)
        quotients = -(-self.num_ids // self.num_collisions)
        return tuple(
            replace(self, key=f"{self.feature}_{part}", table_key=f"{self.table_key}_{part}", rows=rows)
            for part, rows in (("q", quotients), ("r", self.num_collisions))
        )

    def ids(self, ids: NDArray[Any]) -> NDArray[Any]:
        """Rows of the table that stand for these ids of the feature: exact integers."""
        if self.combination is None:
            return ids
        divisor = ids.dtype.type(self.num_collisions)
        return ids % divisor if self.is_remainder else ids // divisor


def feature_tables(model: ModelConfig, features: Sequence[Feature], extra: Sequence[Table] = ()) -> list[FeatureTable]:
    """What is looked up for all features, key by key.

    Args:
        model: its `features` may be of others, too.
        features: in the order of the schema.
        extra: what a model class asks for besides.
    """
    found: list[FeatureTable] = []
    for feature in features:
        whole = FeatureTable.whole(feature.name, feature.num_ids, model.embedding_dim, feature.table)
        chosen = model.features.get(whole.table_key)
        if chosen is not None:
            dim, combination = chosen.embedding_dim or whole.dim, chosen.quotient_remainder
            whole = replace(whole, dim=dim, combination=combination, num_collisions=chosen.num_collisions)
        own, keys = model.features.get(feature.name), whole.parts()
        if own is not None and own.pooling != "sum":
            num_positions = {"last": 1, "attention": feature.max_values}.get(own.pooling)
            parts = [replace(whole, key=f"{feature.name}@{k}", position=k) for k in range(num_positions or 0)]
            keys = tuple(replace(key, pooling=own) for key in parts or keys)
        found += keys
        for asked in (table for table in extra if table.feature == feature.name):
            name, owner = (f"{of}@{asked.group}" for of in (feature.name, whole.table_key))
            table = FeatureTable.whole(name, feature.num_ids, -(-asked.dim // 4) * 4, owner)
            found.append(replace(table, feature=feature.name, asked=asked))
    return found


def sources(tables: Sequence[FeatureTable], features: Sequence[str]) -> list[tuple[int, FeatureTable]] | None:
    """Of each key, which feature's ids it has, by place, and the key; None where they are the features' own."""
    if [table.key for table in tables] == list(features):
        return None
    return [(features.index(table.feature), table) for table in tables]


def from_the_end(offsets: NDArray[Any], position: int) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """The id at a place from the end of each row's, in rows that have so many.

    Args:
        offsets: where the ids of each row begin, [B + 1].
        position: 0 for the last.

    Returns:
        Where these ids are, and the offsets of rows that have them alone: [B + 1].
    """
    places = offsets[1:] - (1 + position)
    is_there = places >= offsets[:-1]
    return places[is_there], np.concatenate([np.zeros(1, offsets.dtype), np.cumsum(is_there, dtype=offsets.dtype)])


def check_features(model: ModelConfig, features: Sequence[Feature], extra: Sequence[Table] = ()) -> None:
    """See that `model.features`, and what a model class asks for besides, suit the features that there are.

    Raises:
        ConfigError: a feature is not there, or cannot be divided, or a group is none; every problem in one message.
    """
    problems, by_name = [], {feature.name: feature for feature in features}
    dims, places = {table.group: table.dim for table in extra}, [(table.feature, table.group) for table in extra]
    lent: dict[object, Table] = {}
    for table in extra:
        owner = by_name[table.feature].table if table.feature in by_name else None
        first = lent.setdefault((owner or table.feature, table.group), table)
        if (first.init, first.frozen) != (table.init, table.frozen):
            problems.append(f"{table}: is also that of {first.feature}, with the same init and frozen")
        if table.feature not in by_name or places.count((table.feature, table.group)) > 1:
            problems.append(f"{table}: there is no such feature, or it has two tables in the group")
        if not table.group.isidentifier() or table.dim not in range(1, _MAX_DIM + 1) or table.dim != dims[table.group]:
            problems.append(f"{table}: the group is no name, or dim not one for all of it, from 1 to {_MAX_DIM:,}")
    for name, feature in model.features.items():
        key = f"model.features.{name}"
        if name not in by_name:
            hint = did_you_mean(name, by_name) or f"; they are {', '.join(list(by_name)[:5])}, ..."
            problems.append(f"{key}: there is no sparse feature {name}{hint}")
            continue
        problems += [f"{key}.{problem}" for problem in _pooling_problems(model, by_name, by_name[name])]
        of_table = (feature.embedding_dim, feature.quotient_remainder)
        if (owner := by_name[name].table) is not None and of_table != (None, None):
            problems.append(f"{key}: {name} shares the table of {owner}, which model.features.{owner} is about")
            continue
        sharing = [other.name for other in features if name in (other.name, other.table)]
        if feature.quotient_remainder is None:
            continue
        rows = by_name[name].num_ids
        if feature.num_collisions >= rows:
            problems.append(
                f"{key}.num_collisions: must be below the feature's {rows:,} ids, got {feature.num_collisions}"
            )
        if feature.quotient_remainder == "mult" and any(by_name[other].is_multi_valued for other in sharing):
            problems.append(
                f"{key}.quotient_remainder: {' or '.join(sharing)} may have several values a cell, for which products "
                "of sums are no sums of products; use add"
            )
        problems += [
            f"{key}.quotient_remainder: makes a table {table_name(part)}, which the feature {part} has already"
            for part in (f"{other}_{half}" for other in sharing for half in "qr")
            if part in by_name
        ]
    if problems:
        raise ConfigError("\n  ".join(["the config does not suit the dataset:", *problems]))


def _pooling_problems(model: ModelConfig, by_name: Mapping[str, Feature], feature: Feature) -> Iterator[str]:
    """Why the values of a feature that the config has cannot be pooled as it says."""
    chosen, owner = model.features[feature.name], model.features.get(feature.table or feature.name)
    if chosen.pooling != "sum" and not feature.is_multi_valued:
        yield f"pooling: {feature.name} has one value a row, and {chosen.pooling} is for lists"
    if chosen.pooling == "attention" and feature.max_values is None:
        yield f"pooling: attention needs max_values of {feature.name} in the schema"
    if chosen.pooling in {"last", "attention"} and owner is not None and owner.quotient_remainder is not None:
        yield f"pooling: {chosen.pooling} does not go with quotient_remainder of {feature.table or feature.name}"
    if chosen.target is not None and (chosen.target not in by_name or by_name[chosen.target].is_multi_valued):
        single = [other.name for other in by_name.values() if not other.is_multi_valued]
        hint = did_you_mean(chosen.target, single) or f"; such are {', '.join(single[:5])}"
        yield f"target: {chosen.target} is no sparse feature of one value a row{hint}"
