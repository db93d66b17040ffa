r"""A deep ensemble (arXiv:1612.01474) in one model: k DLRMs that share nothing but the ids, answering with their mean.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/zoo/ensemble.py:Ensemble \
        --model.settings.num-members 5 --model.embedding-dim 80 --model.dense-arch-layer-sizes 256,64,80 \
        --table-optimizer.weight-decay 0.03 --table-optimizer.weight-decay-mode lazy

Each member has a k-th of the columns of every table, a dense arch of the sizes that are set, but for the last, which is
divided by k, and an over arch. Each learns the labels by itself; the logit is the mean of theirs.
B rows, k members, F sparse features, D embedding dimension, I inputs and O outputs of a layer.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DLRM, InteractionArch


class Layers(nn.Module):
    """Layers of k perceptrons side by side, with a ReLU between two: [k, B, I] -> [k, B, O]."""

    def __init__(self, sizes: Sequence[int], num_members: int) -> None:
        super().__init__()
        members = [[nn.Linear(*pair) for pair in pairwise(sizes)] for _ in range(num_members)]
        layers = [*zip(*members, strict=True)]
        self.weights = nn.ParameterList(torch.stack([one.weight.detach().t() for one in layer]) for layer in layers)
        self.biases = nn.ParameterList(torch.stack([one.bias.detach()[None] for one in layer]) for layer in layers)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the rows."""
        for number, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            inputs = torch.baddbmm(bias, inputs.relu() if number else inputs, weight)
        return inputs


class OverArches(Layers):
    """Over arches of k members: [k, B, I] -> logits [B, k].

    The last layers are one `nn.Linear`, which reads the hidden units of each member in turn; of what it makes of a
    member's, the member's own number is its logit. So a bundle computes them in float32, and all before them in
    bfloat16 (docs/models.md).
    """

    def __init__(self, sizes: Sequence[int], num_members: int) -> None:
        super().__init__(sizes, num_members)
        self.last = nn.Linear(sizes[-2], num_members)
        self.last.weight.data, self.last.bias.data = self.weights[-1].data[:, :, 0], self.biases[-1].data.flatten()
        self.weights, self.biases = self.weights[:-1], self.biases[:-1]

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the rows."""
        return self.last(super().forward(inputs).relu()).diagonal(dim1=0, dim2=2)


class DenseArches(nn.Module):
    """The dense arches of k members: [B, I] -> [k, B, D / k]."""

    def __init__(self, first: nn.Linear, sizes: Sequence[int], num_members: int) -> None:
        super().__init__()
        self.first = nn.Linear(first.in_features, num_members * sizes[0])
        self.others = Layers(sizes, num_members)

    def forward(self, dense_features: Tensor) -> Tensor:
        """Map the rows."""
        hidden = self.first(dense_features).relu().unflatten(1, (self.others.weights[0].shape[0], -1))
        return self.others(hidden.transpose(0, 1)).relu()


class Ensemble(DLRM):
    """Members are trained for themselves, in one step."""

    settings: ClassVar = {"num_members": 4}

    def __init__(
        self, num_members: int, *, dense_arch_layer_sizes: list[int], over_arch_layer_sizes: list[int], **arguments: Any
    ) -> None:
        self.num_members = num_members
        super().__init__(
            dense_arch_layer_sizes=dense_arch_layer_sizes, over_arch_layer_sizes=over_arch_layer_sizes, **arguments
        )
        *hidden, dim = dense_arch_layer_sizes
        first = next(module for module in self.dense_arch.modules() if isinstance(module, nn.Linear))
        _, in_size = self.make_interaction(self.sparse_arch.F, self.sparse_arch.D)
        device = arguments["dense_device"]
        self.dense_arch = DenseArches(first, [*hidden, dim // num_members], num_members).to(device)
        self.over_arch = OverArches([in_size, *over_arch_layer_sizes], num_members).to(device)

    def make_interaction(self, num_sparse_features: int, embedding_dim: int) -> tuple[nn.Module, int]:
        """The dot products of all pairs of a member's vectors, and how many numbers its over arch reads."""
        if embedding_dim % self.num_members:
            msg = f"the embedding dimension, {embedding_dim}, is no multiple of num_members = {self.num_members}"
            raise ValueError(msg)
        num_vectors, dim = num_sparse_features + 1, embedding_dim // self.num_members
        return InteractionArch(num_sparse_features), dim + num_vectors * (num_vectors - 1) // 2

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Any:
        """Map a batch to logits [B, 1]; in training also to those of the members [B, k]."""
        dense = self.dense_arch(dense_features)
        sparse = self.sparse_arch(sparse_features).unflatten(2, (self.num_members, -1)).permute(2, 0, 1, 3)
        inputs = self.inter_arch(dense.flatten(0, 1), sparse.flatten(0, 1)).unflatten(0, (self.num_members, -1))
        members = self.over_arch(inputs).float()
        logits = members.mean(dim=1, keepdim=True)
        return (logits, members) if self.training else logits

    def loss(self, outputs: tuple[Tensor, Tensor], labels: Tensor, weights: Tensor) -> Tensor:
        """The mean cross-entropy of the members [B]; rows are weighed where it is called."""
        del weights
        _, members = outputs
        clicks = labels.unsqueeze(1).expand_as(members)
        return binary_cross_entropy_with_logits(members, clicks, reduction="none").mean(dim=1)
