r"""TabM (arXiv:2410.24210): k over arches that share their weights, and differ by factors of inputs and outputs.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/tabm.py:TabM \
        --model.settings.num-members 16

Each learns the labels by itself; the logit is the mean of theirs. B rows, k members, I inputs and O outputs of a layer.
"""

from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, linear
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, InteractionArch


class SharedLinear(nn.Module):
    """s_i * (W (r_i * x)) + b_i for each member i: [B, k, I] (or [B, 1, I]) -> [B, k, O]."""

    def __init__(self, in_size: int, out_size: int, num_members: int, *, is_first: bool) -> None:
        super().__init__()
        shared = nn.Linear(in_size, out_size)
        self.weight, self.bias = shared.weight, nn.Parameter(shared.bias.detach().repeat(num_members, 1))
        signs = torch.randint(0, 2, (num_members, in_size)) * 2.0 - 1
        self.in_factor = nn.Parameter(signs if is_first else torch.ones(num_members, in_size))
        self.out_factor = nn.Parameter(torch.ones(num_members, out_size))

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the rows."""
        return linear(inputs * self.in_factor, self.weight) * self.out_factor + self.bias


class TabM(DLRM):
    """A DLRM with several over arches in one; `reads_vectors`: they read the vectors besides the dot products."""

    settings: ClassVar = {"num_members": 8, "reads_vectors": False}

    def __init__(
        self, num_members: int, *, reads_vectors: bool, over_arch_layer_sizes: list[int], **arguments: Any
    ) -> None:
        self.reads_vectors = reads_vectors
        super().__init__(over_arch_layer_sizes=over_arch_layer_sizes, **arguments)
        _, in_size = self.make_interaction(self.sparse_arch.F, self.sparse_arch.D)
        *sizes, last = pairwise([in_size, *over_arch_layer_sizes])
        layers: list[nn.Module] = []
        for size in sizes:
            layers += [SharedLinear(*size, num_members, is_first=not layers), nn.ReLU()]
        self.over_arch = nn.Sequential(*layers).to(arguments["dense_device"])
        # The last layer is each member's own.
        heads = [nn.Linear(*last) for _ in range(num_members)]
        self.weight = nn.Parameter(torch.cat([head.weight.detach() for head in heads]).to(arguments["dense_device"]))
        self.bias = nn.Parameter(torch.cat([head.bias.detach() for head in heads]).to(arguments["dense_device"]))

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The dot products of all pairs of vectors, and how many numbers the over arches read."""
        num_vectors = num_sparse_features + 1
        vectors = num_vectors if self.reads_vectors else 1
        return InteractionArch(num_sparse_features), vectors * embedding_dim + num_vectors * (num_vectors - 1) // 2

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Any:
        """Map a batch to logits [B, 1]; in training also to those of the members [B, k]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        inputs = self.inter_arch(dense, sparse)
        if self.reads_vectors:
            inputs = torch.cat([inputs, sparse.flatten(1)], dim=1)
        members = (self.over_arch(inputs.unsqueeze(1)).float() * self.weight).sum(dim=2) + self.bias
        logits = members.mean(dim=1, keepdim=True)
        return (logits, members) if self.training else logits

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor, weights: Tensor) -> Tensor:
        """The mean cross-entropy of the members [B]; rows are weighed where it is called."""
        del weights
        _, members = outputs
        clicks = labels.unsqueeze(1).expand_as(members)
        return binary_cross_entropy_with_logits(members, clicks, reduction="none").mean(dim=1)
