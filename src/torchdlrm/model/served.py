"""Interactions as they are served, between the lookup and the over arch, and the packed layers that they are made of.

In: the vectors where the lookup has put them.  Out: what the over arch reads.  A server loads this without TorchRec.
Those of the built-in interactions are in their modules: `torchdlrm.model.dot`, `dcn` and `projection`.

B rows, M slots for vectors, D embedding dimension, N = F + 1 vectors that interact, I inputs and O outputs of a layer.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import linear


class FastInteraction(ABC):
    """An interaction as it is served: reads the vectors where the lookup has put them.

    Attributes:
        num_slots: vectors of a row; the dense one comes first, then the embeddings, and what is left is zero.
    """

    num_slots: int

    @abstractmethod
    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, num_slots, D] to what the over arch reads."""

    def spread(self, weight: Tensor) -> Tensor:
        """The over arch's first weight of training, [O, I], for inputs as `interact` lays them out."""
        return weight


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
        get: gives the float32 weight of a name in the model's state dict, which must have the
            shape that is given; raises BundleError.
        dtype: that layers compute in.
        batch_rows: the usual B.
    """

    get: Callable[[str, tuple[int, ...]], Tensor]
    dtype: torch.dtype
    batch_rows: int

    def layer(
        self,
        weight: str,
        shape: tuple[int, int],
        *,
        bias: str | None = None,
        relu: bool = False,
        spread: Callable[[Tensor], Tensor] | None = None,
    ) -> PackedLinear:
        """A layer with the weight [O, I] and the bias of these names; `spread` says what the weight is served as."""
        weight_OI, bias_O = self.get(weight, shape), self.get(bias, shape[:1]) if bias is not None else None
        weight_OI = weight_OI if spread is None else spread(weight_OI)
        return PackedLinear(weight_OI, bias_O, self.dtype, relu=relu, batch_rows=self.batch_rows)

    def layers(
        self, mlp: str, sizes: Sequence[int], spread: Callable[[Tensor], Tensor] | None = None
    ) -> list[PackedLinear]:
        """TorchRec's `MLP` of this name, of inputs and layers of these sizes; `spread` is for the first layer."""
        shapes = [(outputs, inputs) for inputs, outputs in pairwise(sizes)]
        names = [f"{mlp}._mlp.{number}._linear." for number in range(len(shapes))]
        return [
            self.layer(f"{name}weight", shape, bias=f"{name}bias", relu=True, spread=None if number else spread)
            for number, (name, shape) in enumerate(zip(names, shapes, strict=True))
        ]
