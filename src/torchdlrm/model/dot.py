"""Computes pairwise dot products of the dense vector and all embeddings, each pair once; in training and serving.

In: dense_BD, sparse_BFD.  Out: [B, D + N(N-1)/2], the dense vector itself and then the upper triangle of V V^T.
Cost: one batched product forward and one backward; the triangle is copied by one flat index per row. On CPU two kernels
write the pairs, and the square of their gradients: torch computes the whole square, picks its upper triangle in a
second pass, and has slow products of such small float32 matrices. The first one also leaves all vectors in one buffer,
as the backward needs them, while it has them in its hands.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors that interact,
P = N(N-1)/2 pairs, O = D + P; as served M slots for vectors (N rounded up to even) and W words of two numbers.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchdlrm.kernels.compile import as_in, compiled_loop, widened
from torchdlrm.kernels.threads import array_of, in_parts
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape, Product
from torchdlrm.model.graph import Graph
from torchdlrm.model.served import FastInteraction, ServedWeights


def dot_output_size(num_sparse_features: int, embedding_dim: int) -> int:
    """D + P: what the over arch reads."""
    return embedding_dim + num_sparse_features * (num_sparse_features + 1) // 2


def has_kernels(tensor: Tensor) -> bool:
    """Not where operators are compiled or listed, as for the products of a model of one's own."""
    is_plain = tensor.device.type == "cpu" and tensor.dtype in {torch.float32, torch.bfloat16}
    return is_plain and not torch.compiler.is_compiling() and not is_in_torch_dispatch_mode()


@compiled_loop
def write_pairs(
    first: int, end: int, dense_BD: Any, sparse_BFD: Any, vectors_BND: Any, out_BO: Any, vectors_ND: Any
) -> None:
    """Write, for some rows, all vectors, and the dense one with the dot products of all pairs (i < j).

    Args:
        first: row of the batch.
        end: one past the last.
        dense_BD: float32 or the bits of bfloat16.
        sparse_BFD: the same, maybe of the other type.
        vectors_BND: receives all vectors, of the dense one's type.
        out_BO: receives the dense vector and P products, of the same type.
        vectors_ND: room for the vectors of a row, float32.
    """
    num_vectors, dim = vectors_ND.shape
    for b in range(first, end):
        written = out_BO[b]
        _keep(dense_BD[b], vectors_BND[b, 0], vectors_ND[0])
        for i in range(1, num_vectors):
            _keep(sparse_BFD[b, i - 1], vectors_BND[b, i], vectors_ND[i])
        for k in range(dim):
            written[k] = vectors_BND[b, 0, k]
        place = dim
        for i in range(num_vectors - 1):
            one, j = vectors_ND[i], i + 1
            while j + 4 <= num_vectors:  # four at a time: each number of the one is loaded once for them
                a, b_, c, d = vectors_ND[j], vectors_ND[j + 1], vectors_ND[j + 2], vectors_ND[j + 3]
                dot_a, dot_b, dot_c, dot_d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
                for k in range(dim):
                    dot_a += one[k] * a[k]
                    dot_b += one[k] * b_[k]
                    dot_c += one[k] * c[k]
                    dot_d += one[k] * d[k]
                written[place], written[place + 1] = as_in(out_BO, dot_a), as_in(out_BO, dot_b)
                written[place + 2], written[place + 3] = as_in(out_BO, dot_c), as_in(out_BO, dot_d)
                place, j = place + 4, j + 4
            while j < num_vectors:
                other, dot = vectors_ND[j], np.float32(0)
                for k in range(dim):
                    dot += one[k] * other[k]
                written[place] = as_in(out_BO, dot)
                place, j = place + 1, j + 1


@compiled_loop
def _keep(given: Any, kept: Any, vector: Any) -> None:
    """Copy a vector, in the type of the copy, and that as float32."""
    for k in range(len(given)):
        kept[k] = as_in(kept, widened(given[k]))
        vector[k] = widened(kept[k])


@compiled_loop
def write_square(first: int, end: int, grad_pairs_BP: Any, square_BNN: Any) -> None:
    """Write, for some rows, the pairs' gradients above and below a diagonal of zeros.

    Args:
        first: row of the batch.
        end: one past the last.
        grad_pairs_BP: float32 or the bits of bfloat16.
        square_BNN: of the same type.
    """
    num_vectors = square_BNN.shape[1]
    for b in range(first, end):
        pairs, square = grad_pairs_BP[b], square_BNN[b]
        place = 0
        for i in range(num_vectors):
            square[i, i] = 0
            for j in range(i + 1, num_vectors):
                square[i, j] = pairs[place]
                place += 1
            for j in range(i):
                square[i, j] = square[j, i]


class _PairwiseDots(torch.autograd.Function):
    """The strict upper triangle of V V^T, row by row.

    TorchRec's arch picks the triangle by advanced indexing, whose backward is an accumulating scatter over the whole
    square. Each pair occurs once, so plain copies do: with S the symmetric matrix of the pairs' gradients, dL/dV = S V.
    """

    @staticmethod
    def forward(ctx: Any, dense_BD: Tensor, sparse_BFD: Tensor, upper_P: Tensor, lower_P: Tensor) -> Tensor:
        num_rows, num_features, embedding_dim = sparse_BFD.shape
        num_vectors = num_features + 1
        vectors_BND = dense_BD.new_empty(num_rows, num_vectors, embedding_dim)
        out = dense_BD.new_empty(num_rows, embedding_dim + upper_P.numel())
        if has_kernels(dense_BD) and has_kernels(sparse_BFD):
            given = dense_BD.contiguous(), sparse_BFD.contiguous()
            arrays, work = [array_of(each) for each in (*given, vectors_BND, out)], num_vectors**2 * embedding_dim / 8
            shape = num_vectors, embedding_dim
            in_parts(num_rows, work, lambda first, end: write_pairs(first, end, *arrays, np.empty(shape, np.float32)))
        else:
            vectors_BND[:, 0], vectors_BND[:, 1:] = dense_BD, sparse_BFD
            square_BNN = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2))
            out[:, :embedding_dim] = dense_BD
            torch.index_select(square_BNN.flatten(1), 1, upper_P, out=out[:, embedding_dim:])
        ctx.save_for_backward(vectors_BND, upper_P, lower_P)
        ctx.sparse_dtype = sparse_BFD.dtype
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor, Tensor, None, None]:
        vectors_BND, upper_P, lower_P = ctx.saved_tensors
        num_rows, num_vectors, embedding_dim = vectors_BND.shape
        grad_pairs_BP = grad_out[:, embedding_dim:]
        if has_kernels(grad_out):
            grad_square = grad_out.new_empty(num_rows, num_vectors, num_vectors)
            arrays = array_of(grad_pairs_BP), array_of(grad_square)
            in_parts(num_rows, num_vectors**2, lambda first, end: write_square(first, end, *arrays))
        else:
            grad_square = grad_out.new_zeros(num_rows, num_vectors * num_vectors)
            grad_square.index_copy_(1, upper_P, grad_pairs_BP)
            grad_square.index_copy_(1, lower_P, grad_pairs_BP)
        grad_vectors_BND = torch.bmm(grad_square.view(num_rows, num_vectors, num_vectors), vectors_BND)
        grad_dense_BD = grad_vectors_BND[:, 0] + grad_out[:, :embedding_dim]
        return grad_dense_BD, grad_vectors_BND[:, 1:].to(ctx.sparse_dtype), None, None


@fx.wrap  # a leaf for the train pipeline, which traces the model to find its sharded modules
def pairwise_dots(dense_BD: Tensor, sparse_BFD: Tensor, upper_P: Tensor, lower_P: Tensor) -> Tensor:
    """The dense vector and all dot products of pairs.

    Args:
        dense_BD: output of the dense arch.
        sparse_BFD: embeddings, of the same dtype.
        upper_P: positions of the pairs (i < j) in the flattened N x N square, int64.
        lower_P: positions of the same pairs mirrored, int64.
    """
    # Compilers know neither memory nor, in TorchScript, functions of Python.
    if torch.jit.is_scripting() or torch.compiler.is_compiling():  # type: ignore[attr-defined]
        vectors_BND = torch.cat([dense_BD.unsqueeze(1), sparse_BFD.to(dense_BD.dtype)], dim=1)
        square_BC = torch.bmm(vectors_BND, vectors_BND.transpose(1, 2)).flatten(1)
        return torch.cat([dense_BD, square_BC.index_select(1, upper_P)], dim=1)
    return _PairwiseDots.apply(dense_BD, sparse_BFD, upper_P, lower_P)  # type: ignore[no-untyped-call]


class InteractionArch(nn.Module):
    """Same inputs, outputs and (empty) state dict as `torchrec.models.dlrm.InteractionArch`."""

    def __init__(self, num_sparse_features: int) -> None:
        super().__init__()
        self.F = num_sparse_features
        num_vectors = num_sparse_features + 1
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self.upper_P: Tensor
        self.lower_P: Tensor
        self.register_buffer("upper_P", first_P * num_vectors + second_P, persistent=False)
        self.register_buffer("lower_P", second_P * num_vectors + first_P, persistent=False)

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Maps [B, D] and [B, F, D] to [B, D + P]."""
        return pairwise_dots(dense_features, sparse_features, self.upper_P, self.lower_P)


class PairLayout(FastInteraction):
    """The interaction as it is served: which cells of the square feed the over arch, and in which order.

    Each pair of the N vectors stands twice in the square, and the over arch wants it once.  In float32 the upper
    triangle is picked, as in training.  Picking single bfloat16 numbers is slow (torch copies 2-byte numbers one by
    one: 0.44 ms for 512 rows, longer than the products), picking 4 bytes is not (0.05 ms).  So two neighbours are
    picked at a time, from a square whose rows have an even length; the few cells that come along without being wanted
    (a vector with itself, or with the zero vector that makes N even) get the weight 0 in the over arch's first layer.
    The sums are of the same products.

    Args:
        num_vectors: N.
        embedding_dim: D.
        dtype: of the vectors.

    Attributes:
        num_slots: M.
        output_size: D and the number of cells that are picked.
    """

    def __init__(self, num_vectors: int, embedding_dim: int, dtype: torch.dtype) -> None:
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        self._dim, self._is_paired = embedding_dim, dtype == torch.bfloat16
        self.num_slots = num_vectors + (num_vectors % 2 if self._is_paired else 0)
        cells_P = first_P * self.num_slots + second_P
        if self._is_paired:
            self._picked = (cells_P // 2).unique()  # W words, sorted
            self._position_P = torch.searchsorted(self._picked, cells_P // 2) * 2 + cells_P % 2
        else:
            self._picked, self._position_P = cells_P, torch.arange(len(cells_P))
        self.output_size = embedding_dim + len(self._picked) * (2 if self._is_paired else 1)

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, M, D] to [B, output_size]: the first vector, and the cells of the square that are picked."""
        square_BC = torch.bmm(vectors_BMD, vectors_BMD.transpose(1, 2)).flatten(1)
        out = vectors_BMD.new_empty(len(vectors_BMD), self.output_size)
        out[:, : self._dim] = vectors_BMD[:, 0]
        cells = out[:, self._dim :]
        if self._is_paired:
            torch.index_select(square_BC.view(torch.float32), 1, self._picked, out=cells.view(torch.float32))
        else:
            torch.index_select(square_BC, 1, self._picked, out=cells)
        return out

    def spread(self, weight: Tensor) -> Tensor:
        """The over arch's first weight for inputs in this layout: [O, output_size].

        Args:
            weight: [O, D + P], P the pairs in the order of the upper triangle.
        """
        spread = weight.new_zeros(len(weight), self.output_size)
        spread[:, : self._dim] = weight[:, : self._dim]
        spread[:, self._dim + self._position_P] = weight[:, self._dim :]
        return spread


class DotArchitecture(BuiltInArchitecture):
    """That of `model.interaction = "dot"`, the paper's."""

    class_name = "DLRM"

    def interaction(self, shape: ModelShape) -> tuple[Sequence[Product], int]:
        """V V^T."""
        num_vectors, dim = shape.num_sparse + 1, shape.config.embedding_dim
        square = Product(num_vectors, dim, num_vectors, has_weight=False, num_gradients=1)
        return [square], dot_output_size(shape.num_sparse, dim)

    def fast_interaction(self, shape: ModelShape, weights: ServedWeights) -> FastInteraction:
        """Picks the pairs out of the square, two at a time in bfloat16."""
        return PairLayout(shape.num_sparse + 1, shape.config.embedding_dim, weights.dtype)

    def graph_interaction(self, shape: ModelShape, graph: Graph, dense_BD: str, vectors_BND: str) -> str:
        """The dense vector, and the pairs of the square."""
        num_vectors = shape.num_sparse + 1
        first_P, second_P = torch.triu_indices(num_vectors, num_vectors, offset=1)
        square = graph.node("MatMul", vectors_BND, graph.node("Transpose", vectors_BND, perm=[0, 2, 1]))
        pairs = graph.node(
            "Gather", graph.node("Flatten", square), graph.constant(first_P * num_vectors + second_P), axis=1
        )
        return graph.node("Concat", dense_BD, pairs, axis=1)


ARCHITECTURE = DotArchitecture()
