r"""GDCN-P (arXiv:2311.04635): a cross net whose layers have gates, beside the over arch.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/gdcn.py:GDCN \
        --model.settings.num-layers 2

Weights have full rank; `model.dcn.gated` is the stacked form with low rank, built in. B rows, N vectors, D embedding
dimension, I = N D.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM


class GatedCrossNet(nn.Module):
    """x <- x_0 * (W x + b) * sigmoid(G x) + x, layer after layer: [B, I] -> [B, I]."""

    def __init__(self, size: int, num_layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(num_layers))
        self.gates = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(num_layers))

    def forward(self, x0: Tensor) -> Tensor:
        """Map the rows."""
        x = x0
        for layer, gate in zip(self.layers, self.gates, strict=True):
            x = x0 * layer(x) * torch.sigmoid(gate(x)) + x
        return x


class GDCN(DLRM):
    """The logit is a weighted sum of what the cross net gives, plus that of the over arch."""

    settings: ClassVar = {"num_layers": 3}

    def __init__(self, num_layers: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        size = (self.sparse_arch.F + 1) * self.sparse_arch.D
        device = arguments["dense_device"]
        self.cross = GatedCrossNet(size, num_layers).to(device)
        self.of_cross = nn.Linear(size, 1, device=device)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The over arch reads all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        flat = torch.cat([dense, sparse.flatten(1)], dim=1)
        return self.over_arch(flat) + self.of_cross(self.cross(flat))
