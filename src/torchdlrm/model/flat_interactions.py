"""Lets the vectors interact as one long vector: the cross net of DCN v2, and products of two projections.

In: dense_BD, sparse_BFD.  Out: what the over arch reads.  Names and state-dict keys are those of `torchrec.models.dlrm`
and `torchrec.modules.crossnet`.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors, I = N D their numbers,
R rank of the cross net's weights.
"""

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from torchdlrm.model.interaction import together


class _FlatVectors(torch.autograd.Function):
    """All vectors of a row one after the other, in the lookup's own buffer where it has left room for the dense one."""

    @staticmethod
    def forward(ctx: Any, dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
        ctx.sparse_shape, ctx.sparse_dtype = sparse_BFD.shape, sparse_BFD.dtype
        return together(dense_BD, sparse_BFD.detach()).flatten(1)

    @staticmethod
    def backward(ctx: Any, grad_BI: Tensor) -> tuple[Tensor, Tensor]:
        num_rows, num_features, embedding_dim = ctx.sparse_shape
        grad_BND = grad_BI.view(num_rows, num_features + 1, embedding_dim)
        return grad_BND[:, 0], grad_BND[:, 1:].to(ctx.sparse_dtype)


@fx.wrap  # a leaf for the train pipeline, which traces the model to find its sharded modules
def flat_vectors(dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
    """The dense vector and all embeddings one after the other: [B, I], in the precision of the dense vector."""
    return _FlatVectors.apply(dense_BD, sparse_BFD)  # type: ignore[no-untyped-call]


@fx.wrap
def cross(
    x0_BI: Tensor, x_BI: Tensor, weights: tuple[Tensor, Tensor], bias_I: Tensor, gate: tuple[Tensor, Tensor] | None
) -> Tensor:
    """A layer of the cross net: x0 * (W V x + b) * g + x, where g is 1 or the sigmoid of another W V x.

    Args:
        x0_BI: what the first layer was given.
        x_BI: what the layer before gave.
        weights: W [I, R] and V [R, I].
        bias_I: b.
        gate: W and V of the gate; None where there is none.
    """
    W, V = weights
    crossed_BI = linear(linear(x_BI, V), W, bias_I)
    if gate is not None:
        crossed_BI = crossed_BI * linear(linear(x_BI, gate[1]), gate[0]).sigmoid()
    return torch.addcmul(x_BI, x0_BI, crossed_BI)


class LowRankCrossNet(nn.Module):
    """The cross net of DCN v2 (arXiv:2008.13535) with weights of low rank, as `torchrec.modules.crossnet` has it.

    Args:
        in_features: I, of its input and output.
        num_layers: of the net.
        low_rank: R.
        gated: whether each layer has a gate, as in GDCN (arXiv:2311.04635), whose weights are of rank R too.
    """

    def __init__(self, in_features: int, num_layers: int, low_rank: int, *, gated: bool = False) -> None:
        super().__init__()

        def kernels(rows: int, columns: int) -> nn.ParameterList:
            drawn = (nn.init.xavier_normal_(torch.empty(rows, columns)) for _ in range(num_layers))
            return nn.ParameterList(map(nn.Parameter, drawn))

        self.W_kernels, self.V_kernels = kernels(in_features, low_rank), kernels(low_rank, in_features)
        self.bias = nn.ParameterList(nn.Parameter(torch.zeros(in_features)) for _ in range(num_layers))
        self.gated, self.num_layers = gated, num_layers
        if gated:
            self.gate_W_kernels, self.gate_V_kernels = kernels(in_features, low_rank), kernels(low_rank, in_features)

    def forward(self, x0_BI: Tensor) -> Tensor:
        """Maps [B, I] to [B, I]."""
        x_BI = x0_BI
        for layer in range(self.num_layers):
            gate = (self.gate_W_kernels[layer], self.gate_V_kernels[layer]) if self.gated else None
            x_BI = cross(x0_BI, x_BI, (self.W_kernels[layer], self.V_kernels[layer]), self.bias[layer], gate)
        return x_BI


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
