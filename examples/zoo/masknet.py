r"""MaskNet (arXiv:2102.07619): blocks that multiply the vectors by masks, which are made of all vectors of the row.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/masknet.py:MaskNet \
        --model.settings.num-blocks 2

The parallel form of the paper. B rows, F sparse features, D embedding dimension, N = F + 1 vectors, O outputs.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn


class MaskBlock(nn.Module):
    """relu(LayerNorm(W (mask * x))), with a mask of two layers: [B, N D] -> [B, O]."""

    def __init__(self, in_size: int, mask_size: int, out_size: int) -> None:
        super().__init__()
        self.mask = nn.Sequential(nn.Linear(in_size, mask_size), nn.ReLU(), nn.Linear(mask_size, in_size))
        self.hidden = nn.Sequential(nn.Linear(in_size, out_size, bias=False), nn.LayerNorm(out_size), nn.ReLU())

    def forward(self, flat: Tensor, normalised: Tensor) -> Tensor:
        """Map the vectors as they are, of which the mask is made, and the normalised ones, which it multiplies."""
        return self.hidden(self.mask(flat) * normalised)


class MaskNet(nn.Module):
    """Blocks side by side; the over arch reads what all give."""

    settings: ClassVar = {"num_blocks": 3, "mask_size": 64, "block_size": 64}

    def __init__(
        self, num_sparse_features: int, embedding_dim: int, num_blocks: int, mask_size: int, block_size: int
    ) -> None:
        super().__init__()
        flat_size = (num_sparse_features + 1) * embedding_dim
        self.normalise = nn.LayerNorm(embedding_dim)
        self.blocks = nn.ModuleList(MaskBlock(flat_size, mask_size, block_size) for _ in range(num_blocks))
        self.output_size = num_blocks * block_size

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Map [B, D] and [B, F, D] to [B, blocks O]."""
        vectors = torch.cat([dense_features.unsqueeze(1), sparse_features], dim=1)
        flat, normalised = vectors.flatten(1), self.normalise(vectors).flatten(1)
        return torch.cat([block(flat, normalised) for block in self.blocks], dim=1)
