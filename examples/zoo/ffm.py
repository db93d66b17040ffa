r"""FFM (Juan et al., RecSys 2016): a vector of each value for each other feature, whose products are added up.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/ffm.py:FFM --model.settings.size 8

The dense features have no such vectors: an over arch of them and of ordinary embeddings is added, as in DeepFFM. B
rows, F sparse features, D embedding dimension, K size of a field-aware vector.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, Feature, Table


class FFM(DLRM):
    """The vectors of a value for all F features are one row of a table of F K numbers."""

    settings: ClassVar = {"size": 4}

    @classmethod
    def tables(cls, features: Sequence[Feature], size: int) -> list[Table]:
        """A number of each value, and its vectors for all features."""
        linear = [Table(feature.name, 1, "linear") for feature in features]
        return linear + [Table(feature.name, len(features) * size, "fields", init=0.05) for feature in features]

    def __init__(self, size: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.size = size
        first, second = torch.triu_indices(self.sparse_arch.F, self.sparse_arch.F, offset=1)
        self.register_buffer("first", first.to(arguments["dense_device"]), persistent=False)
        self.register_buffer("second", second.to(arguments["dense_device"]), persistent=False)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        deep = self.over_arch(torch.cat([dense, sparse.flatten(1)], dim=1))
        fields = self.sparse_arch.group("fields", sparse_features).unflatten(2, (-1, self.size))  # [B, F, F, K]
        products = fields[:, self.first, self.second] * fields[:, self.second, self.first]
        linear = self.sparse_arch.group("linear", sparse_features)
        return deep + linear.sum(dim=1) + products.sum(dim=(1, 2)).unsqueeze(1)
