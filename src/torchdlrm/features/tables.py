"""Says which tables a model has for each sparse feature, and which of their rows stand for an id.

In: the model's config and the rows of each feature.  Out: `FeatureTable`s, in the order of the features.

Most features have one table of dimension D.  `model.features` of the config makes some smaller, so that a dataset need
not be preprocessed again to try it (docs/decisions/the-config-says-which-tables-are-smaller.md):

- A table of a smaller dimension, whose rows a matrix projects to D (arXiv:1909.11810).
- Two tables of dimension D in place of one of n rows: one for the quotients of ids by c, of ceil(n / c) rows, and one
  of c rows for the remainders (arXiv:1909.02107). No two ids have both in common, and an id's vector is the product, or
  the sum, of the two rows. Ids are divided as integers, where batches are made; from then on the two are keys of their
  own.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from torchdlrm.config import ModelConfig
from torchdlrm.errors import ConfigError
from torchdlrm.toml import did_you_mean

Combination = Literal["mult", "add"]


def table_name(key: str) -> str:
    """The name of the table that a key of the KJT looks into."""
    return f"t_{key}"


@dataclass(frozen=True)
class FeatureTable:
    """A table of a sparse feature: its only one, or one of two.

    Attributes:
        feature: whose it is.
        key: of the KJT: the feature itself, or its name with `_q` for quotients, `_r` for remainders.
        rows: of the table.
        dim: of its rows.
        vector_dim: of the feature's vector, D; where rows are smaller, they are projected to it.
        combination: of the rows of quotient and remainder; None where the feature has one table.
        num_collisions: by what ids are divided.
        num_ids: of the feature: the rows of its table if it were one.
    """

    feature: str
    key: str
    rows: int
    dim: int
    vector_dim: int
    combination: Combination | None
    num_collisions: int
    num_ids: int

    @classmethod
    def whole(cls, feature: str, rows: int, dim: int) -> Self:
        """The only table of a feature, of dimension D."""
        return cls(feature, feature, rows, dim, dim, None, 1, rows)

    @property
    def name(self) -> str:
        """The name of the table."""
        return table_name(self.key)

    @property
    def is_plain(self) -> bool:
        """Whether its rows are the feature's vectors."""
        return self.combination is None and self.dim == self.vector_dim

    @property
    def is_remainder(self) -> bool:
        """Whether it is the second of two."""
        return self.combination is not None and self.key.endswith("_r")

    def parts(self) -> tuple[Self, ...]:
        """Itself, or quotients and remainders; it is of a whole feature."""
        if self.combination is None:
            return (self,)
        quotients = -(-self.num_ids // self.num_collisions)
        return (
            replace(self, key=f"{self.feature}_q", rows=quotients),
            replace(self, key=f"{self.feature}_r", rows=self.num_collisions),
        )


def feature_tables(model: ModelConfig, num_embeddings: Mapping[str, int]) -> list[FeatureTable]:
    """The tables of all features.

    Args:
        model: its `features` may be of others, too.
        num_embeddings: ids of each sparse feature, in the order of the schema.
    """
    found: list[FeatureTable] = []
    for name, rows in num_embeddings.items():
        whole, chosen = FeatureTable.whole(name, rows, model.embedding_dim), model.features.get(name)
        if chosen is not None:
            dim, combination = chosen.embedding_dim or whole.dim, chosen.quotient_remainder
            whole = replace(whole, dim=dim, combination=combination, num_collisions=chosen.num_collisions)
        found += whole.parts()
    return found


def divisors(model: ModelConfig, features: Sequence[str]) -> list[int | None]:
    """By what the ids of each feature are divided; None where they are not."""
    chosen = (model.features.get(name) for name in features)
    return [None if one is None or one.quotient_remainder is None else one.num_collisions for one in chosen]


def split_ids(ids: NDArray[Any], divisor: int | None) -> tuple[NDArray[Any], ...]:
    """The ids for each table of a feature: these, or the quotients and the remainders of these; exact integers."""
    return (ids,) if divisor is None else np.divmod(ids, ids.dtype.type(divisor))


def check_features(model: ModelConfig, num_embeddings: Mapping[str, int], multi_valued: Collection[str]) -> None:
    """See that `model.features` suits the features that there are.

    Args:
        model: the config.
        num_embeddings: ids of each sparse feature.
        multi_valued: those of which a row may have several ids.

    Raises:
        ConfigError: a feature is not there, or cannot be divided; every problem in one message.
    """
    problems = []
    for name, feature in model.features.items():
        key = f"model.features.{name}"
        if name not in num_embeddings:
            hint = did_you_mean(name, num_embeddings) or f"; they are {', '.join(list(num_embeddings)[:5])}, ..."
            problems.append(f"{key}: there is no sparse feature {name}{hint}")
            continue
        if feature.quotient_remainder is None:
            continue
        rows = num_embeddings[name]
        if feature.num_collisions >= rows:
            problems.append(
                f"{key}.num_collisions: must be below the feature's {rows:,} ids, got {feature.num_collisions}"
            )
        if feature.quotient_remainder == "mult" and name in multi_valued:
            problems.append(
                f"{key}.quotient_remainder: {name} may have several values a cell, for which products of sums are no "
                "sums of products; use add"
            )
        problems += [
            f"{key}.quotient_remainder: makes a table {table_name(part)}, which the feature {part} has already"
            for part in (f"{name}_q", f"{name}_r")
            if part in num_embeddings
        ]
    if problems:
        raise ConfigError("\n  ".join(["the config does not suit the dataset:", *problems]))
