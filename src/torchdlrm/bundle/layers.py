"""The dense and over arch as served: weights packed once, as the processor's matrix kernels want them.

oneDNN reorders a weight for every product unless it is given one that it has reordered before; so do the graphs that
`torch.compile` freezes, by the same two operators.  Bias and ReLU are part of the product.

B rows, I inputs, O outputs of a layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear


class PackedLinear:
    """A linear layer with its weight packed, and a ReLU where it has one.

    Args:
        weight: float32 [O, I].
        bias: float32 [O].
        dtype: of inputs and outputs; inside, products are added up in float32.
        relu: whether there is one.
        batch_rows: the usual B; others work too.
    """

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype, *, relu: bool, batch_rows: int) -> None:
        self._relu = relu
        self._bias = bias.to(dtype, copy=True)
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
    """One layer after the other."""
    for layer in layers:
        inputs_BI = layer(inputs_BI)
    return inputs_BI
