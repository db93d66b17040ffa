r"""FinalMLP (arXiv:2304.00902): two perceptrons that read the vectors through gates of their own, and a bilinear end.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/finalmlp.py:FinalMLP \
        --model.settings.num-heads 4

`model.over_arch_layer_sizes` without its last 1 are the layers of both. Gates are made of learnt numbers, the same for
all rows, in the first and of the dense vector in the second; without batch normalisation. B rows, O outputs of a
perceptron.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DenseArch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM


class Fusion(nn.Module):
    """A logit of two outputs [B, O]: linear in each, and in their products head by head, a matrix for each head."""

    def __init__(self, size: int, num_heads: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * size, 1)
        self.matrices = nn.Parameter(torch.empty(num_heads, size // num_heads, size // num_heads))
        nn.init.xavier_normal_(self.matrices)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Map both to [B, 1]."""
        heads = (each.unflatten(1, (len(self.matrices), -1)) for each in (first, second))
        products = torch.einsum("bhi,hij,bhj->b", next(heads), self.matrices, next(heads))
        return self.linear(torch.cat([first, second], dim=1)) + products.unsqueeze(1)


class FinalMLP(DLRM):
    """A DLRM whose over arch is one of the two perceptrons, up to its last layer."""

    settings: ClassVar = {"num_heads": 2, "gate_size": 64}

    def __init__(self, num_heads: int, gate_size: int, over_arch_layer_sizes: list[int], **arguments: Any) -> None:
        super().__init__(over_arch_layer_sizes=over_arch_layer_sizes, **arguments)
        dim, device, sizes = self.sparse_arch.D, arguments["dense_device"], over_arch_layer_sizes[:-1]
        flat_size = (self.sparse_arch.F + 1) * dim
        self.context = nn.Parameter(torch.zeros(1, dim, device=device))
        self.gates = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, gate_size), nn.ReLU(), nn.Linear(gate_size, flat_size), nn.Sigmoid())
            for _ in range(2)
        ).to(device)
        self.over_arch = nn.ModuleList(DenseArch(flat_size, sizes, device=device) for _ in range(2))
        self.fusion = Fusion(sizes[-1], num_heads).to(device)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The perceptrons read all vectors, as they are."""
        return nn.Identity(), (num_sparse_features + 1) * embedding_dim

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        """Map a batch to logits [B, 1]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        flat = torch.cat([dense, sparse.flatten(1)], dim=1)
        gates = self.gates[0](self.context), self.gates[1](dense)
        return self.fusion(*(arch(2 * gate * flat) for arch, gate in zip(self.over_arch, gates, strict=True)))
