"""How the values of a list become the vector of their feature: a class for each kind, in training and as served.

In: what the feature's keys have looked up.  Out: its vector.  A bag is one key, whose rows are summed already.  A
sequence has a key for each position, the newest value first: rows with fewer values have zeros behind theirs.

B rows of the batch, K keys of the feature (1, or P positions), D embedding dimension, H units of a hidden layer.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from torchdlrm.config.model import FeatureConfig
from torchdlrm.features.tables import FeatureTable
from torchdlrm.model.graph import BOOL, FLOAT, Graph


class Pooling(nn.Module):
    """What the first key has looked up: of a sequence the embedding of the newest value, zeros where there is none.

    Args:
        config: of the feature.
        dim: D.
        num_keys: K.

    Attributes:
        products: matrix products of a row: rows, inputs, outputs, and whether the right factor is a weight.
    """

    products: Sequence[tuple[int, int, int, bool]] = ()

    def __init__(self, config: FeatureConfig, dim: int, num_keys: int) -> None:
        super().__init__()
        del config, dim, num_keys

    def forward(self, vectors_BKD: Tensor, num_values_B: Tensor, target_BD: Tensor) -> Tensor:
        """The vector of each row: [B, D].

        Args:
            vectors_BKD: what the keys have looked up.
            num_values_B: how many values of each row they have.
            target_BD: the vector of the feature's target; of one without a target anything.
        """
        del num_values_B, target_BD
        return vectors_BKD[:, 0]

    def shares(self, graph: Graph, name: str, vectors_BLD: str, ages_BL: str, target_B1D: str) -> str:
        """As a graph: what the values are multiplied by before they are summed, [B, L] or [B, 1].

        `name` begins the weights' names; `vectors_BLD` are zeros where there is no value; `ages_BL`, int64, are 1 for
        the newest value, 2 for the one before it, and 0 where there is none.
        """
        del name, vectors_BLD, target_B1D
        return graph.node("Cast", graph.node("Equal", ages_BL, graph.constant([1])), to=FLOAT)


class Mean(Pooling):
    """The sum of the values' embeddings over their number; zeros where there is none."""

    def forward(self, vectors_BKD: Tensor, num_values_B: Tensor, target_BD: Tensor) -> Tensor:
        """Maps [B, 1, D] and [B] to [B, D]."""
        del target_BD
        return vectors_BKD[:, 0] / num_values_B.clamp(min=1).unsqueeze(1).to(vectors_BKD.dtype)

    def shares(self, graph: Graph, name: str, vectors_BLD: str, ages_BL: str, target_B1D: str) -> str:
        """One over the number of values."""
        del name, vectors_BLD, target_B1D
        count = graph.node("ReduceMax", ages_BL, graph.constant([1]))
        return graph.node("Reciprocal", graph.node("Cast", graph.node("Max", count, graph.constant([1])), to=FLOAT))


class Din(Pooling):
    """Weights by a small network of a value and the target: the local activation unit of DIN (arXiv:1706.06978).

    The weight of a value e beside the target t is MLP([e, t, e - t, e * t]), without a softmax, and the vector is the
    sum of the weighted values.  Positions without a value have e = 0 and add nothing.  Of the first layer
    W [e, t, e - t, e * t] = (W1 + W3 + W4 diag(t)) e + (W2 - W3) t both factors are made once a row, which is half the
    products.  All weights begin with 1: what a value says is learnt from the sum, before it is learnt when it counts.
    """

    def __init__(self, config: FeatureConfig, dim: int, num_keys: int) -> None:
        super().__init__(config, dim, num_keys)
        sizes = (4 * dim, *config.attention_layer_sizes, 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        nn.init.zeros_(self.layers[-1].get_parameter("weight"))
        nn.init.ones_(self.layers[-1].get_parameter("bias"))
        others = [(num_keys, *pair, True) for pair in pairwise(sizes[1:])]
        self.products = ((1, dim, sizes[1], True), (num_keys, dim, sizes[1], False), *others, (1, num_keys, dim, False))

    def forward(self, vectors_BKD: Tensor, num_values_B: Tensor, target_BD: Tensor) -> Tensor:
        """Maps [B, K, D] and [B, D] to [B, D]."""
        del num_values_B
        first, *others = self.layers
        own, target, difference, product = first.get_parameter("weight").chunk(4, dim=1)
        of_row_BHD = torch.addcmul(own + difference, product, target_BD.unsqueeze(1))
        of_target_BH = linear(target_BD, target - difference, first.get_parameter("bias"))
        hidden_BKH = torch.baddbmm(of_target_BH.unsqueeze(1), vectors_BKD, of_row_BHD.transpose(1, 2))
        for layer in others:
            hidden_BKH = layer(torch.relu(hidden_BKH))
        return torch.bmm(hidden_BKH.transpose(1, 2).to(vectors_BKD.dtype), vectors_BKD).squeeze(1)

    def shares(self, graph: Graph, name: str, vectors_BLD: str, ages_BL: str, target_B1D: str) -> str:
        """The network, of the numbers that the paper names."""
        target = graph.node("Expand", target_B1D, graph.node("Shape", vectors_BLD))
        both = (graph.node(op, vectors_BLD, target) for op in ("Sub", "Mul"))
        x = graph.node("Flatten", graph.node("Concat", vectors_BLD, target, *both, axis=2), axis=2)
        for number in range(len(self.layers)):
            names = (f"{name}layers.{number}.{part}" for part in ("weight", "bias"))
            x = graph.linear(x, *names, relu=number + 1 < len(self.layers))
        return graph.node("Reshape", x, graph.node("Shape", ages_BL))


class Dot(Pooling):
    """Scaled dot products with the target, a softmax over the values, and a learnt vector for each position.

    The weight of the value e_k at position k is softmax_k(W t . (e_k + p_k) / sqrt(D)) over those that there are.
    """

    def __init__(self, config: FeatureConfig, dim: int, num_keys: int) -> None:
        super().__init__(config, dim, num_keys)
        self.query, self.positions = nn.Linear(dim, dim, bias=False), nn.Parameter(torch.zeros(num_keys, dim))
        self.products = ((1, dim, dim, True), (1, dim, num_keys, False), (1, num_keys, dim, False))

    def forward(self, vectors_BKD: Tensor, num_values_B: Tensor, target_BD: Tensor) -> Tensor:
        """Maps [B, K, D], [B] and [B, D] to [B, D]."""
        query_BD = self.query(target_BD) * target_BD.shape[1] ** -0.5
        scores_BK = torch.bmm(vectors_BKD + self.positions, query_BD.unsqueeze(2)).squeeze(2)
        is_missing = torch.arange(scores_BK.shape[1], device=scores_BK.device) >= num_values_B.unsqueeze(1)
        # Not by infinity: a row without any value has weights, of zeros.
        weights_BK = scores_BK.masked_fill(is_missing, -1e9).softmax(dim=1).to(vectors_BKD.dtype)
        return torch.bmm(weights_BK.unsqueeze(1), vectors_BKD).squeeze(1)

    def shares(self, graph: Graph, name: str, vectors_BLD: str, ages_BL: str, target_B1D: str) -> str:
        """The softmax over the values."""
        weight, positions = (graph.weight(f"{name}{part}").numpy() for part in ("query.weight", "positions"))
        query_B1D = graph.node("MatMul", target_B1D, graph.constant(weight.T * len(weight) ** -0.5, np.float32))
        learnt = graph.node("Gather", graph.constant(np.pad(positions, ((1, 0), (0, 0))), np.float32), ages_BL)
        products = graph.node("Mul", graph.node("Add", vectors_BLD, learnt), query_B1D)
        scores_BL = graph.node("ReduceSum", products, graph.constant([2]), keepdims=0)
        is_value, none = graph.node("Cast", ages_BL, to=BOOL), graph.constant([-1e9], np.float32)
        return graph.node("Softmax", graph.node("Where", is_value, scores_BL, none), axis=1)


KINDS: Mapping[str, type[Pooling]] = {"mean": Mean, "last": Pooling, "din": Din, "dot": Dot}


def pooled_features(tables: Sequence[FeatureTable]) -> dict[str, list[FeatureTable]]:
    """The features whose vector is no sum of rows, with their keys."""
    names = dict.fromkeys(table.feature for table in tables if table.pooling is not None)
    return {name: [table for table in tables if table.feature == name and table.pooling] for name in names}


def pooling_of(keys: Sequence[FeatureTable]) -> Pooling:
    """The pooling of a feature with these keys, with initial weights."""
    first, config = keys[0], keys[0].pooling
    assert config is not None
    kind = KINDS[config.attention if config.pooling == "attention" else config.pooling]
    return kind(config, first.vector_dim, 1 if first.position is None else len(keys))
