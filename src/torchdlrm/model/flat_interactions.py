"""Lets the vectors interact as one long vector: the cross net of DCN v2, and products of two projections.

In: dense_BD, sparse_BFD.  Out: what the over arch reads.  Names and keys are those of `torchrec.models.dlrm`.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors, I = N D their numbers,
R rank of the cross net's weights.
"""

import torch
from torch import Tensor, nn


def flat_vectors(dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
    """The dense vector and all embeddings one after the other: [B, I], in the precision of the dense vector."""
    return torch.cat([dense_BD, sparse_BFD.flatten(1).to(dense_BD.dtype)], dim=1)


class InteractionDCNArch(nn.Module):
    """Same inputs, outputs and state dict as `torchrec.models.dlrm.InteractionDCNArch`.

    Args:
        num_sparse_features: F.
        crossnet: maps [B, I] to [B, I].
    """

    def __init__(self, num_sparse_features: int, crossnet: nn.Module) -> None:
        super().__init__()
        self.F, self.crossnet = num_sparse_features, crossnet

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Maps [B, D] and [B, F, D] to [B, I]."""
        crossed_BI: Tensor = self.crossnet(flat_vectors(dense_features, sparse_features))
        return crossed_BI


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
