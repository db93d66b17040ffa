r"""Wide & Deep (arXiv:1606.07792): a linear model of the values, which remembers, and an over arch, which generalises.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/wide_and_deep.py:WideAndDeep

Dense features are in the deep part alone. B rows, F sparse features, D embedding dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, Feature, Table


class WideAndDeep(DLRM):
    """The wide part is a table of one number for each id."""

    @classmethod
    def tables(cls, features: Sequence[Feature]) -> list[Table]:
        """A number of each value, which begins with 0."""
        return [Table(feature.name, 1, "wide") for feature in features]

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        deep = self.over_arch(torch.cat([dense, sparse.flatten(1)], dim=1))
        return deep + self.sparse_arch.group("wide", sparse_features).sum(dim=1)
