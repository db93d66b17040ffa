"""Products of what two branches make of all vectors, in place of all pairs. Names are those of `torchrec.models.dlrm`.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors, I = N D their numbers;
F1 and F2 vectors that the branches make.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchdlrm.config import ModelConfig
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape, Product, layers
from torchdlrm.model.dcn import flat_vectors
from torchdlrm.model.graph import Graph
from torchdlrm.model.served import FastInteraction, ServedWeights, run_layers


class InteractionProjectionArch(nn.Module):
    """Same inputs, outputs and state dict as `torchrec.models.dlrm.InteractionProjectionArch`.

    Args:
        num_sparse_features: F.
        interaction_branch1: maps [B, I] to F1 vectors of D numbers one after the other.
        interaction_branch2: maps [B, I] to D vectors of F2 numbers one after the other.
    """

    def __init__(
        self, num_sparse_features: int, interaction_branch1: nn.Module, interaction_branch2: nn.Module
    ) -> None:
        super().__init__()
        self.F = num_sparse_features
        self.interaction_branch1, self.interaction_branch2 = interaction_branch1, interaction_branch2

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Maps [B, D] and [B, F, D] to [B, D + F1 F2]: the dense vector, and all products of the branches' vectors."""
        embedding_dim = sparse_features.shape[2]
        vectors_BI = flat_vectors(dense_features, sparse_features)
        first = self.interaction_branch1(vectors_BI).unflatten(1, (-1, embedding_dim))
        second = self.interaction_branch2(vectors_BI).unflatten(1, (embedding_dim, -1))
        return torch.cat([dense_features, torch.bmm(first, second).flatten(1)], dim=1)


class ServedProjection(FastInteraction):
    """The same as it is served, with packed weights."""

    def __init__(self, shape: ModelShape, weights: ServedWeights) -> None:
        self.num_slots, self._dim = shape.num_sparse + 1, shape.config.embedding_dim
        self._branches = [
            weights.layers(f"inter_arch.interaction_branch{branch}.model", (shape.flat_size, *sizes))
            for branch, sizes in enumerate(shape.config.projection.branches, start=1)
        ]

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, D + F1 F2]: the first vector, and all products of the branches' vectors."""
        first, second = (run_layers(branch, vectors_BMD.flatten(1)) for branch in self._branches)
        products = torch.bmm(first.unflatten(1, (-1, self._dim)), second.unflatten(1, (self._dim, -1)))
        return torch.cat([vectors_BMD[:, 0], products.flatten(1)], dim=1)


class ProjectionArchitecture(BuiltInArchitecture):
    """That of `model.interaction = "projection"`."""

    class_name = "DLRM_Projection"

    def arguments(self, config: ModelConfig) -> dict[str, Any]:
        """The output sizes of both branches."""
        settings = config.projection
        return {
            "interaction_branch1_layer_sizes": list(settings.branch1_layer_sizes or ()),
            "interaction_branch2_layer_sizes": list(settings.branch2_layer_sizes or ()),
        }

    def interaction(self, shape: ModelShape) -> tuple[Sequence[Product], int]:
        """The layers of both branches, and the product of their vectors."""
        dim, branches = shape.config.embedding_dim, shape.config.projection.branches
        products = [product for sizes in branches for product in layers(shape.flat_size, sizes)]
        num_first, num_second = (sizes[-1] // dim for sizes in branches)
        return [*products, Product(num_first, dim, num_second, has_weight=False)], dim + num_first * num_second

    def num_activations(self, shape: ModelShape) -> int:
        """The vectors, which both branches read, are kept once."""
        return super().num_activations(shape) - shape.flat_size

    def fast_interaction(self, shape: ModelShape, weights: ServedWeights) -> FastInteraction:
        """The branches with packed weights."""
        return ServedProjection(shape, weights)

    def graph_interaction(self, shape: ModelShape, graph: Graph, dense_BD: str, vectors_BND: str) -> str:
        """The dense vector, and the products of the branches' vectors."""
        vectors, dim, branches = graph.node("Flatten", vectors_BND), shape.config.embedding_dim, []
        for number, cut in ((1, (0, -1, dim)), (2, (0, dim, -1))):
            num_layers = len(shape.config.projection.branches[number - 1])
            out = graph.layers(vectors, f"inter_arch.interaction_branch{number}.model", num_layers)
            branches.append(graph.node("Reshape", out, graph.constant(cut)))
        return graph.node("Concat", dense_BD, graph.node("Flatten", graph.node("MatMul", *branches)), axis=1)


ARCHITECTURE = ProjectionArchitecture()
