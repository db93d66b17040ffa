r"""FCN, also called DCNv3 (arXiv:2407.13349): two cross nets, one of which doubles the order with each layer.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/fcn.py:FCN

Each net is taught besides, the more the worse it is than both together (Tri-BCE). Without an over arch. B rows, N
vectors, D embedding dimension, I = N D.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, global_mean


class CrossNet(nn.Module):
    """x <- y * (W x, and the same again behind a mask, plus b) + x; y is x (exponential) or x_0 (linear order).

    Maps [B, I] to [B, 1].
    """

    def __init__(self, size: int, num_layers: int, *, is_exponential: bool) -> None:
        super().__init__()
        self.is_exponential = is_exponential
        self.layers = nn.ModuleList(nn.Linear(size, size // 2, bias=False) for _ in range(num_layers))
        self.masks = nn.ModuleList(nn.LayerNorm(size // 2) for _ in range(num_layers))
        self.biases = nn.ParameterList(torch.zeros(size) for _ in range(num_layers))
        self.head = nn.Linear(size, 1)

    def forward(self, x0: Tensor) -> Tensor:
        """Map the rows."""
        x = x0
        for layer, mask, bias in zip(self.layers, self.masks, self.biases, strict=True):
            half = layer(x)
            crossed = torch.cat([half, half * torch.relu(mask(half))], dim=1) + bias
            x = (x if self.is_exponential else x0) * crossed + x
        return self.head(x)


class FCN(DLRM):
    """The logit is the mean of those of both nets."""

    settings: ClassVar = {"num_exponential_layers": 2, "num_linear_layers": 2}

    def __init__(self, num_exponential_layers: int, num_linear_layers: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        size = (self.sparse_arch.F + 1) * self.sparse_arch.D
        exponential = CrossNet(size, num_exponential_layers, is_exponential=True)
        self.over_arch = nn.ModuleList([exponential, CrossNet(size, num_linear_layers, is_exponential=False)])
        self.over_arch.to(arguments["dense_device"])

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The nets read all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Any:
        """Map a batch to logits [B, 1]; in training also to those of the nets [B, 2]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        flat = torch.cat([dense, sparse.flatten(1)], dim=1)
        nets = torch.cat([net(flat) for net in self.over_arch], dim=1)
        logits = nets.mean(dim=1, keepdim=True)
        return (logits, nets) if self.training else logits

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor, weights: Tensor) -> Tensor:
        """Cross-entropy of each row [B], plus that of each net times by how much its mean is above that of both."""
        logits, nets = outputs
        together, *alone = (
            binary_cross_entropy_with_logits(each, labels, reduction="none") for each in (logits[:, 0], *nets.unbind(1))
        )
        of_both = global_mean(weights * together)
        for each in alone:
            together = together + torch.relu(global_mean(weights * each) - of_both) * each
        return together
