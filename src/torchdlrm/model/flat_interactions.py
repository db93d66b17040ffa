"""Lets the vectors interact as one long vector: the cross net of DCN v2, and products of two projections.

In: dense_BD, sparse_BFD.  Out: what the over arch reads.  Names and keys are those of `torchrec.models.dlrm`.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors, I = N D their numbers,
R rank of the cross net's weights.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn

from torchdlrm.model.interaction import together
from torchdlrm.model.room import has_room, mark_room


class _FlatVectors(torch.autograd.Function):
    """All vectors of a row one after the other, in the lookup's own buffer where it has left room for the dense one."""

    @staticmethod
    def forward(ctx: Any, dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
        ctx.sparse_shape, ctx.sparse_dtype = sparse_BFD.shape, sparse_BFD.dtype
        sparse = sparse_BFD.detach()  # which loses the mark
        return together(dense_BD, mark_room(sparse) if has_room(sparse_BFD) else sparse).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_BI: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, num_features, embedding_dim = ctx.sparse_shape
        grad_BND = grad_BI.view(num_rows, num_features + 1, embedding_dim)
        return grad_BND[:, 0], grad_BND[:, 1:].to(ctx.sparse_dtype)


@fx.wrap  # a leaf for the train pipeline, which traces the model to find its sharded modules
def flat_vectors(dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
    """The dense vector and all embeddings one after the other: [B, I], in the precision of the dense vector."""
    return _FlatVectors.apply(dense_BD, sparse_BFD)  # type: ignore[no-untyped-call]


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
