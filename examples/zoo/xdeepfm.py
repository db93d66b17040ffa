r"""xDeepFM (arXiv:1803.05170): products of vectors, number by number, of an order that rises with each layer.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/xdeepfm.py:XDeepFM \
        --model.settings.layer-sizes 32,32

Without the paper's linear part. B rows, N vectors, D embedding dimension, H vectors behind a layer.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM


class CompressedInteraction(nn.Module):
    """CIN: each layer's vectors are weighted sums of the products of the last layer's with the first ones.

    Maps [B, N, D] to [B, sum of all H]: the numbers of each vector are added up.
    """

    def __init__(self, num_vectors: int, layer_sizes: Sequence[int]) -> None:
        super().__init__()
        sizes = zip([num_vectors, *layer_sizes], layer_sizes, strict=False)
        self.layers = nn.ModuleList(nn.Linear(num_vectors * before, size) for before, size in sizes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the rows."""
        by_number = first = vectors.transpose(1, 2)  # [B, D, N]: a layer sums over vectors, and D stays apart
        sums = []
        for layer in self.layers:
            products = by_number.unsqueeze(3) * first.unsqueeze(2)  # [B, D, H, N]
            by_number = torch.relu(layer(products.flatten(2)))
            sums.append(by_number.sum(dim=1))
        return torch.cat(sums, dim=1)


class XDeepFM(DLRM):
    """The logit is a weighted sum of what the CIN gives, plus that of the over arch."""

    settings: ClassVar = {"layer_sizes": [16, 16]}

    def __init__(self, layer_sizes: Sequence[int], **arguments: Any) -> None:
        super().__init__(**arguments)
        device = arguments["dense_device"]
        self.products = CompressedInteraction(self.sparse_arch.F + 1, layer_sizes).to(device)
        self.of_products = nn.Linear(sum(layer_sizes), 1, device=device)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        return self.over_arch(vectors.flatten(1)) + self.of_products(self.products(vectors))
