r"""AutoInt (arXiv:1810.11921): layers of self-attention, in which each vector asks all others.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/autoint.py:AutoInt \
        --model.settings.num-layers 3

What the last layer gives goes into the over arch; in the paper it goes into the logit. B rows, F sparse features, D
embedding dimension, N = F + 1 vectors, A numbers of a vector behind a layer.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Maps [B, N, D] to [B, N, A]; without a scale of the products, and with a projected residual, as in the paper."""

    def __init__(self, size: int, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.project = nn.Linear(size, 4 * num_heads * head_dim, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the rows."""
        *parts, residual = self.project(vectors).chunk(4, dim=2)
        queries, keys, values = (part.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for part in parts)
        attention = torch.softmax(queries @ keys.transpose(2, 3), dim=3)  # [B, heads, N, N]
        return torch.relu((attention @ values).transpose(1, 2).flatten(2) + residual)


class AutoInt(nn.Module):
    """Layers of attention between the vectors and the over arch."""

    settings: ClassVar = {"num_layers": 2, "num_heads": 2, "head_dim": 16}

    def __init__(
        self, num_sparse_features: int, embedding_dim: int, num_layers: int, num_heads: int, head_dim: int
    ) -> None:
        super().__init__()
        size = num_heads * head_dim
        sizes = [embedding_dim, *[size] * (num_layers - 1)]
        self.layers = nn.Sequential(*(SelfAttention(each, num_heads, head_dim) for each in sizes))
        self.output_size = (num_sparse_features + 1) * size

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Map [B, D] and [B, F, D] to [B, N A]."""
        vectors = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        return self.layers(vectors).flatten(1)
