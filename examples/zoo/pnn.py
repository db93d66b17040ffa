"""PNN (arXiv:1611.00144): the over arch reads the inner products of all pairs of vectors, and the vectors themselves.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/pnn.py:PNN

B rows, F sparse features, D embedding dimension, N = F + 1 vectors, P = N (N - 1) / 2 pairs.
"""

import torch
from torch import Tensor, nn

from torchdlrm import InteractionArch


class PNN(nn.Module):
    """The dense vector counts as one of the vectors, as in the DLRM; this is the IPNN of the paper."""

    def __init__(self, num_sparse_features: int, embedding_dim: int) -> None:
        super().__init__()
        num_vectors = num_sparse_features + 1
        self.products = InteractionArch(num_sparse_features)
        self.output_size = num_vectors * embedding_dim + num_vectors * (num_vectors - 1) // 2

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Map [B, D] and [B, F, D] to [B, N D + P]."""
        return torch.cat([self.products(dense_features, sparse_features), sparse_features.flatten(1)], dim=1)
