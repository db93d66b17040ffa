"""A model of your own, whole: FinalNet (Zhu et al., SIGIR 2023), first in BARS' tables of Criteo's logs.

    dlrm train criteo-small --dataset DATASET --run RUN --model-class examples/finalnet.py:FinalNet
    python examples/finalnet.py DATASET RUN

Two blocks of factorised layers read the embeddings, one of them through a gate for each feature; the logit is the mean
of theirs, and in training each block also learns what the mean says. `model.over_arch_layer_sizes` without its last 1
are the layers of a block.

B rows, F features (the dense ones count as one), D embedding dimension, I inputs and O outputs of a layer.
"""

import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm import DroppedActivation, GlobalBatchNorm1d, SparseArch, evaluate, load_config, train
from torchdlrm.model.dlrm import ConstantArch, DenseArch


class FactorizedLayer(nn.Module):
    """[B, I] -> [B, O]: a linear layer plus the product of two, so that each layer doubles the order of the terms."""

    def __init__(self, in_size: int, out_size: int, device: torch.device | None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_size, 2 * out_size, device=device)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map the rows."""
        linear, factor = self.linear(inputs).chunk(2, dim=1)
        return linear + linear * factor


class FeatureGate(nn.Module):
    """[B, F, D] -> [B, 2 F, D]: the vectors, and each once more behind a gate that sees all; gates begin at 1."""

    def __init__(self, num_features: int, device: torch.device | None) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_features, device=device)
        nn.init.zeros_(self.linear.weight)
        nn.init.ones_(self.linear.bias)

    def forward(self, vectors: Tensor) -> Tensor:
        """Map the rows."""
        gates = self.linear(vectors.transpose(1, 2)).transpose(1, 2)
        return torch.cat([vectors, vectors * gates], dim=1)


class FinalNet(nn.Module):
    """Made with the arguments of TorchRec's DLRM; a subclass may set `dropout`."""

    dropout = 0.0

    def __init__(
        self,
        embedding_bag_collection: EmbeddingBagCollection,
        dense_in_features: int,
        dense_arch_layer_sizes: list[int],
        over_arch_layer_sizes: list[int],
        dense_device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.sparse_arch = SparseArch(embedding_bag_collection, dense_device)
        self.dense_arch = (
            DenseArch(dense_in_features, dense_arch_layer_sizes, device=dense_device)
            if dense_in_features
            else ConstantArch(dense_arch_layer_sizes, device=dense_device)
        )
        num_features, layer_sizes = self.sparse_arch.F + 1, over_arch_layer_sizes[:-1]
        self.gate = FeatureGate(num_features, dense_device)
        flat_size = num_features * self.sparse_arch.D
        self.gated_block = self._block([2 * flat_size, *layer_sizes], 0, dense_device)
        self.plain_block = self._block([flat_size, *layer_sizes], len(layer_sizes), dense_device)

    def _block(self, sizes: list[int], first_layer: int, device: torch.device | None) -> nn.Sequential:
        layers: list[nn.Module] = []
        for layer, (in_size, out_size) in enumerate(pairwise(sizes), start=first_layer):
            layers += [FactorizedLayer(in_size, out_size, device), GlobalBatchNorm1d(out_size, device=device)]
            # Not torch's dropout, whose random numbers no checkpoint holds.
            layers.append(DroppedActivation(torch.relu, self.dropout, layer) if self.dropout else nn.ReLU())
        return nn.Sequential(*layers, nn.Linear(sizes[-1], 1, device=device))

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Any:
        """Map a batch to logits [B, 1]; in training also to the loss of each row that teaches the blocks, [B]."""
        dense, sparse = self.dense_arch(dense_features), self.sparse_arch(sparse_features)
        vectors = torch.cat([dense.unsqueeze(1), sparse], dim=1)
        blocks = self.gated_block(self.gate(vectors).flatten(1)), self.plain_block(vectors.flatten(1))
        logits = (blocks[0].float() + blocks[1].float()) / 2
        if not self.training:
            return logits
        taught = torch.sigmoid(logits).detach()
        losses = [binary_cross_entropy_with_logits(block.float(), taught, reduction="none") for block in blocks]
        return logits, (losses[0] + losses[1]).squeeze(1)


if __name__ == "__main__":
    dataset, run = sys.argv[1:]
    train(load_config("criteo-small"), dataset, run, model_class=FinalNet)
    print(evaluate(run, model_class=FinalNet))
