r"""DeepFM (arXiv:1703.04247): a number of each value, the products of all pairs of vectors, and an over arch, added up.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/deepfm.py:DeepFM \
        --model.table-init-scale 0.1 --table-optimizer.learning-rate 0.02

B rows, F sparse features, D embedding dimension.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, Feature, Table


class DeepFM(DLRM):
    """The first order is a table of one number for each id, beside that of the vectors."""

    @classmethod
    def tables(cls, features: Sequence[Feature]) -> list[Table]:
        """A number of each value, which begins with 0."""
        return [Table(feature.name, 1, "first_order") for feature in features]

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        pairs = (vectors.sum(dim=1).square() - vectors.square().sum(dim=1)).sum(dim=1, keepdim=True) / 2
        first_order = self.sparse_arch.group("first_order", sparse_features).sum(dim=1)
        return self.over_arch(vectors.flatten(1)) + pairs + first_order
