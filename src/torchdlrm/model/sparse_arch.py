"""The sparse arch of a DLRM: what the tables give for each feature becomes its vector.

In: a KJT of a key for each table that a feature looks into.  Out: a vector of dimension D for each feature, and for
interactions that want them, the embeddings of values one by one.

B rows of the batch on this rank, F sparse features, D embedding dimension, K keys of a feature, P positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, fx, nn
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from torchdlrm.features.tables import FeatureTable, table_name
from torchdlrm.model.pooling import pooled_features, pooling_of


@fx.wrap
def stack_embeddings(embeddings: KeyedTensor, feature_names: list[str], embedding_dim: int) -> Tensor:
    """[B, F, D] in the order of `feature_names`: a view where the embeddings lie in that order, else one copy.

    Sharding may group the tables by rank or kernel, and then they come back in another order.
    """
    if embeddings.keys() == feature_names:
        return embeddings.values().view(-1, len(feature_names), embedding_dim)
    by_name = embeddings.to_dict()
    return torch.stack([by_name[name] for name in feature_names], dim=1)


@fx.wrap
def embeddings_of_groups(embeddings: KeyedTensor, groups: Sequence[Sequence[FeatureTable]]) -> list[Tensor]:
    """What the keys of each group have looked up: [B, K * dim], a view where a group's K keys lie side by side.

    All are parts of one split, whose gradient is made by copying theirs once.
    """
    places = {key: place for place, key in enumerate(embeddings.keys())}
    order = sorted(groups, key=lambda group: places[group[0].key])
    if [table.key for group in order for table in group] != [*places]:
        by_key = embeddings.to_dict()
        return [torch.cat([by_key[table.key] for table in group], dim=1) for group in groups]
    parts = embeddings.values().split([len(group) * group[0].dim for group in order], dim=1)
    of_first = {group[0].key: part for group, part in zip(order, parts, strict=True)}
    return [of_first[group[0].key] for group in groups]


@dataclass
class TableOfFeatures(EmbeddingBagConfig):  # type: ignore[misc]  # TorchRec is untyped
    """The config of a table that may be smaller than others, one of two, or of several features.

    Attributes:
        keys: of all tables of the collection: what each key of the KJT is for its feature.
    """

    keys: tuple[FeatureTable, ...] = ()


def tables_of(embedding_bag_collection: EmbeddingBagCollection) -> list[FeatureTable]:
    """What each key of the KJT is for its feature; of a collection of TorchRec's own configs, the feature.

    Raises:
        ValueError: the collection has no tables.
    """
    configs = embedding_bag_collection.embedding_bag_configs()
    if not configs:
        msg = "the collection of tables is empty: at least one sparse feature is needed"
        raise ValueError(msg)
    if isinstance(configs[0], TableOfFeatures):
        return [*configs[0].keys]
    return [
        FeatureTable.whole(key, config.num_embeddings, config.embedding_dim)
        for config in configs
        for key in config.feature_names
    ]


def _projection(table: FeatureTable) -> nn.Linear:
    """What maps rows of a smaller table to D, without bias.

    Its weights have the variance 1 / dim, so that a vector starts with the scale of an ordinary row, whatever its
    table's dimension: Xavier's would make that of a table of 8 a third as long at D = 128.
    """
    layer = nn.Linear(table.dim, table.vector_dim, bias=False)
    bound = (3 / table.dim) ** 0.5
    nn.init.uniform_(layer.weight, -bound, bound)
    return layer


class SparseArch(nn.Module):
    """Looks up and pools the embeddings of each feature; rows of smaller tables become vectors of dimension D.

    Args:
        embedding_bag_collection: the tables.
        dense_device: where to create what projects smaller ones.

    Raises:
        ValueError: there are no tables, or the vectors differ in dimension.
    """

    def __init__(
        self, embedding_bag_collection: EmbeddingBagCollection, dense_device: torch.device | None = None
    ) -> None:
        super().__init__()
        self._tables = tables_of(embedding_bag_collection)
        dims = sorted({table.vector_dim for table in self._tables if table.asked is None})
        if len(dims) != 1:
            msg = f"the tables must have one dimension, and have {dims}"
            raise ValueError(msg)
        self.embedding_bag_collection = embedding_bag_collection
        self.D: int = dims[0]
        self.sparse_feature_names: list[str] = [*dict.fromkeys(table.feature for table in self._tables)]
        self.F: int = len(self.sparse_feature_names)
        self._are_plain = all(table.is_plain for table in self._tables)
        # Drawn on the CPU, like all weights. By the name of the table: a feature may be called as an attribute is.
        self.projections = nn.ModuleDict(
            {table.name: _projection(table) for table in self._tables if table.dim < table.vector_dim}
        ).to(dense_device)
        # The keys of a sequence are one group; every other key is one by itself.
        groups = groupby(self._tables, lambda table: table.key if table.position is None else table.feature)
        self._groups = [[*group] for _, group in groups]
        self._pooled = {table_name(name): keys for name, keys in pooled_features(self._tables).items()}
        self.poolings = nn.ModuleDict({name: pooling_of(keys) for name, keys in self._pooled.items()})
        self.poolings.to(dense_device)

    def forward(self, features: KeyedJaggedTensor) -> Tensor:
        """Maps a KJT of a key for each table and stride B to [B, F, D]."""
        return self.with_sequences(features)[0]

    def with_sequences(self, features: KeyedJaggedTensor) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
        """What `forward` gives, and what was looked up of the features whose values are looked up one by one.

        Returns:
            [B, F, D]; and of such a feature by its name the embeddings [B, P, D], the newest value's first and zeros
            behind a row's last, and where there is a value, bool [B, P].
        """
        embeddings, sequences = self.embedding_bag_collection(features), dict[str, tuple[Tensor, Tensor]]()
        if self._are_plain:
            return stack_embeddings(embeddings, self.sparse_feature_names, self.D), sequences
        vectors = self._vectors(embeddings)
        for name, pool in self.poolings.items():
            key = self._pooled[name][0]
            own_BKD, target = vectors[key.feature], getattr(key.pooling, "target", None) or key.feature
            first = features.keys().index(key.key)
            lengths_KB = features.lengths().view(len(self._tables), -1)[first : first + own_BKD.shape[1]]
            vectors[key.feature] = pool(own_BKD, lengths_KB.sum(dim=0), vectors[target])
            if key.position is not None:
                sequences[key.feature] = own_BKD, lengths_KB.t() > 0
        return torch.stack([*vectors.values()], dim=1), sequences

    def _vectors(self, embeddings: KeyedTensor) -> dict[str, Tensor]:
        """The vector of each feature, [B, D]; of one that is pooled what its keys have looked up, [B, K, D]."""
        vectors: dict[str, Tensor] = {}
        for (table, *_), found in zip(self._groups, embeddings_of_groups(embeddings, self._groups), strict=True):
            vector = found if table.pooling is None else found.unflatten(1, (-1, table.dim))
            if table.is_remainder:
                quotient = vectors[table.feature]
                vector = quotient * vector if table.combination == "mult" else quotient + vector
            elif table.dim < table.vector_dim:
                vector = self.projections[table.name](vector)
            if table.asked is None:
                vectors[table.feature] = vector
        return vectors

    def group(self, name: str, features: KeyedJaggedTensor) -> Tensor:
        """The rows of a group of tables that a model class asks for: [B, F, dim] of F features, in schema order."""
        found = embeddings_of_groups(self.embedding_bag_collection(features), self._groups)
        tables = zip((group[0].asked for group in self._groups), found, strict=True)
        asked_for = [rows[:, : asked.dim] for asked, rows in tables if asked and asked.group == name]
        if not asked_for:
            raise ValueError(f"no feature here has a table of a group {name!r}")
        return torch.stack(asked_for, dim=1)
