"""Implements dropout in the dense and over arch; its random numbers depend only on seed, step and rank.

torch's own dropout draws from a generator whose state every checkpoint would have to hold, rank by rank; and a run
could not resume on another number of ranks.

B rows of the batch on this rank, H units of a hidden layer.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, fx, nn
from torchrec.modules.mlp import Perceptron


@fx.wrap  # a leaf for the train pipeline, which traces the model to find its sharded modules
def drop(hidden_BH: Tensor, dropout: float, drawn_from: tuple[int, ...]) -> Tensor:
    """A fraction of the units zeroed for each row, the others scaled up so that the mean stays.

    Args:
        hidden_BH: [B, H], of any dtype.
        dropout: the fraction, at least 0 and below 1.
        drawn_from: numbers that fix which units; another one anywhere gives other units.

    Returns:
        [B, H], of the same dtype.
    """
    generator = torch.Generator(hidden_BH.device)
    generator.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1, np.uint32)[0]))
    kept_BH = torch.empty_like(hidden_BH).bernoulli_(1 - dropout, generator=generator)
    return hidden_BH * kept_BH.div_(1 - dropout)


class DroppedActivation(nn.Module):
    """An activation and, while training, dropout after it. It has no parameters: the state dict stays TorchRec's.

    Args:
        activation: of the layer.
        dropout: fraction of the units that are zeroed.
        layer: number of the layer; layers draw different units.
    """

    def __init__(self, activation: Callable[[Tensor], Tensor], dropout: float, layer: int) -> None:
        super().__init__()
        self.activation = activation
        self.dropout, self.layer = dropout, layer
        self.drawn_from: tuple[int, ...] = (0,)

    def forward(self, hidden_BH: Tensor) -> Tensor:
        """Maps [B, H] to [B, H]."""
        activated_BH = self.activation(hidden_BH)
        if not self.training:
            return activated_BH
        return drop(activated_BH, self.dropout, (*self.drawn_from, self.layer))


def add_dropout(model: nn.Module, dropout: float) -> None:
    """Let the hidden layers of a DLRM's dense and over arch drop a fraction of their units while training.

    The dense arch's last layer drops nothing: its output is no hidden layer but one of the vectors that interact.  That
    of the over arch has no activation.
    """
    arches = (model.get_submodule(name) for name in ("dense_arch", "over_arch"))
    dense, over = ([module for module in arch.modules() if isinstance(module, Perceptron)] for arch in arches)
    for layer, perceptron in enumerate([*dense[:-1], *over]):
        perceptron._activation_fn = DroppedActivation(perceptron._activation_fn, dropout, layer)
