"""FiBiNET (arXiv:1905.09433): vectors weighed by how much they matter in the row, and bilinear products of all pairs.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/fibinet.py:FiBiNET

B rows, F sparse features, D embedding dimension, N = F + 1 vectors, P = N (N - 1) / 2 pairs.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class Weighed(nn.Module):
    """SENET: each vector times a weight that is made of the means of all, [B, N, D] -> [B, N, D]."""

    def __init__(self, num_vectors: int, reduction: int) -> None:
        super().__init__()
        hidden = max(1, num_vectors // reduction)
        self.weights = nn.Sequential(
            nn.Linear(num_vectors, hidden), nn.ReLU(), nn.Linear(hidden, num_vectors), nn.ReLU()
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the rows."""
        return vectors * self.weights(vectors.mean(dim=2)).unsqueeze(2)


class BilinearProducts(nn.Module):
    """(v_i W_i) * v_j of all pairs i < j, with a matrix for each vector: [B, N, D] -> [B, P D]."""

    def __init__(self, num_vectors: int, embedding_dim: int) -> None:
        super().__init__()
        self.matrices = nn.Parameter(torch.empty(num_vectors - 1, embedding_dim, embedding_dim))
        nn.init.xavier_normal_(self.matrices)
        self.num_vectors = num_vectors

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the rows."""
        left = torch.einsum("bnd,nde->bne", vectors[:, :-1], self.matrices)
        pairs = [left[:, i : i + 1] * vectors[:, i + 1 :] for i in range(self.num_vectors - 1)]
        return torch.cat(pairs, dim=1).flatten(1)


class FiBiNET(nn.Module):
    """Products of the vectors as they are, and of the weighed ones; the over arch reads both."""

    settings: ClassVar = {"reduction": 3}

    def __init__(self, num_sparse_features: int, embedding_dim: int, reduction: int) -> None:
        super().__init__()
        num_vectors = num_sparse_features + 1
        self.weighed = Weighed(num_vectors, reduction)
        self.plain_products = BilinearProducts(num_vectors, embedding_dim)
        self.weighed_products = BilinearProducts(num_vectors, embedding_dim)
        self.output_size = num_vectors * (num_vectors - 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Map [B, D] and [B, F, D] to [B, 2 P D]."""
        vectors = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        return torch.cat([self.plain_products(vectors), self.weighed_products(self.weighed(vectors))], dim=1)
