"""Interactions as they are served, between the lookup and the over arch, and the packed layers that they are made of.

In: the vectors where the lookup has put them.  Out: what the over arch reads.  A server loads this without TorchRec.
The dot products' is `torchdlrm.model.interaction.PairLayout`, which has no weights.

B rows, M slots for vectors, D embedding dimension, N = F + 1 vectors that interact, I inputs and O outputs of a layer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear


class FastInteraction(Protocol):
    """An interaction as it is served: reads the vectors where the lookup has put them.

    The over arch's first weight may be laid out in another way than in training, to suit `interact`.

    Attributes:
        num_slots: vectors of a row; the dense one comes first, then the embeddings, and what is left is zero.
    """

    num_slots: int

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, num_slots, D] to what the over arch reads."""

    def spread(self, weight: Tensor) -> Tensor:
        """The over arch's first weight of training, [O, I], for inputs in this layout."""


class PackedLinear:
    """A linear layer, and a ReLU where it has one, its weight packed once as the processor's matrix kernels want it.

    oneDNN reorders a weight for every product unless it is given one that it has reordered before; so do the graphs
    that `torch.compile` freezes, by the same two operators.  Bias and ReLU are part of the product.

    Args:
        weight: float32 [O, I].
        bias: float32 [O]; None: there is none.
        dtype: of inputs and outputs; inside, products are added up in float32.
        relu: whether there is one.
        batch_rows: the usual B; others work too.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, *, relu: bool = False, batch_rows: int
    ) -> None:
        self._relu = relu
        self._bias = None if bias is None else bias.to(dtype, copy=True)
        self._weight = weight.to(dtype, copy=True)
        self._is_packed = torch.backends.mkldnn.is_available()
        if self._is_packed:
            self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, batch_rows)

    def __call__(self, inputs_BI: Tensor) -> Tensor:
        """Maps [B, I] to [B, O]."""
        if self._is_packed:
            activation = "relu" if self._relu else "none"
            return torch.ops.mkldnn._linear_pointwise(inputs_BI, self._weight, self._bias, activation, [], "")
        outputs_BO = linear(inputs_BI, self._weight, self._bias)
        return outputs_BO.relu_() if self._relu else outputs_BO


def run_layers(layers: Sequence[PackedLinear], inputs_BI: Tensor) -> Tensor:
    """One layer after the other: [B, O] of the last."""
    for layer in layers:
        inputs_BI = layer(inputs_BI)
    return inputs_BI


@dataclass(frozen=True)
class ServedWeights:
    """The weights of a bundle, for layers that compute in one precision.

    Attributes:
        get: gives the float32 weight of a name in the model's state dict, whose shape must be as told; raises
            BundleError.
        dtype: that layers compute in.
        batch_rows: the usual B.
    """

    get: Callable[[str, tuple[int, ...]], Tensor]
    dtype: torch.dtype
    batch_rows: int

    def layer(
        self, weight: str, shape: tuple[int, int], *, bias: str | None = None, relu: bool = False
    ) -> PackedLinear:
        """A layer with the weight [O, I] and the bias of these names."""
        bias_O = self.get(bias, shape[:1]) if bias is not None else None
        return PackedLinear(self.get(weight, shape), bias_O, self.dtype, relu=relu, batch_rows=self.batch_rows)


class ServedCrossNet:
    """The cross net, as `torchdlrm.model.cross_net` trains it.

    Args:
        num_vectors: N.
        size: N D.
        num_layers: of the net.
        low_rank: rank of its weights.
        gated: whether its layers have gates.
        weights: of the model.
    """

    def __init__(
        self, num_vectors: int, size: int, num_layers: int, low_rank: int, *, gated: bool, weights: ServedWeights
    ) -> None:
        self.num_slots = num_vectors

        def pair(kind: str, number: int, bias: str | None = None) -> tuple[PackedLinear, PackedLinear]:
            """V and W."""
            name = f"inter_arch.crossnet.{kind}{{}}_kernels.{number}"
            V = weights.layer(name.format("V"), (low_rank, size))
            return V, weights.layer(name.format("W"), (size, low_rank), bias=bias)

        self._layers = [pair("", number, f"inter_arch.crossnet.bias.{number}") for number in range(num_layers)]
        self._gates = [pair("gate_", number) if gated else () for number in range(num_layers)]

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, N D]."""
        x0 = x = vectors_BMD.flatten(1)
        for layer, gate in zip(self._layers, self._gates, strict=True):
            crossed = run_layers(layer, x)
            if gate:
                crossed.mul_(run_layers(gate, x).sigmoid_())
            x = torch.addcmul(x, x0, crossed, out=crossed)
        return x

    def spread(self, weight: Tensor) -> Tensor:
        """The same: inputs are laid out as in training."""
        return weight


class ServedProjection:
    """The products of what two branches make of all vectors, as `torchdlrm.model.flat_interactions` trains them.

    Args:
        num_vectors: N.
        dim: D.
        branches: output sizes of the layers of both.
        weights: of the model.
    """

    def __init__(self, num_vectors: int, dim: int, branches: Sequence[Sequence[int]], weights: ServedWeights) -> None:
        self.num_slots, self._dim = num_vectors, dim
        self._branches = []
        for branch, sizes in enumerate(branches, start=1):
            name = f"inter_arch.interaction_branch{branch}.model._mlp.{{}}._linear."
            shapes = [(outputs, inputs) for inputs, outputs in pairwise((num_vectors * dim, *sizes))]
            names = [(shape, name.format(number)) for number, shape in enumerate(shapes)]
            self._branches.append(
                [weights.layer(f"{name}weight", shape, bias=f"{name}bias", relu=True) for shape, name in names]
            )

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, D + F1 F2]: the first vector, and all products of the branches' vectors."""
        first, second = (run_layers(branch, vectors_BMD.flatten(1)) for branch in self._branches)
        products = torch.bmm(first.unflatten(1, (-1, self._dim)), second.unflatten(1, (self._dim, -1)))
        return torch.cat([vectors_BMD[:, 0], products.flatten(1)], dim=1)

    def spread(self, weight: Tensor) -> Tensor:
        """The same: inputs are laid out as in training."""
        return weight
