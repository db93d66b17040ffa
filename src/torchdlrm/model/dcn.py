"""The cross net of DCN v2 (arXiv:2008.13535) with weights of low rank, and of GDCN (arXiv:2311.04635).

In: x_0, all vectors of a row one after the other.  Out: x_L, as many numbers.  A layer is
x_{l+1} = x_0 * (W_l V_l x_l + b_l) * g_l + x_l, where g_l is 1, or the sigmoid of another W V x_l.
Cost: two products a layer forward and four backward, twice as many with gates; all else is one pass over the rows each
way, by kernels on CPU. Autograd makes an operator of each sign in the formula, and adds up what x_0 gets from each
layer: two passes forward and more than four backward over numbers that do not fit in the caches.

B rows of the batch on this rank, F sparse features, D embedding dimension, N = F + 1 vectors, I = N D numbers of a row,
R rank of the weights, S sums of some rows; the kernels' arrays [B, I] are float32 or the bits of bfloat16.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.functional import linear

from torchdlrm.config import ModelConfig
from torchdlrm.kernels.compile import as_in, compiled_loop, widened
from torchdlrm.kernels.threads import array_of, in_parts
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape, Product, layers
from torchdlrm.model.dot import has_kernels
from torchdlrm.model.graph import Graph
from torchdlrm.model.served import FastInteraction, PackedLinear, ServedWeights, run_layers

# Sums over the batch are taken of this many rows, and then of these sums: in one order, however many threads there are.
ROWS_OF_A_SUM = 32


@compiled_loop
def write_layer(first: int, end: int, x0_BI: Any, x_BI: Any, product_BI: Any, bias_I: Any, out_BI: Any) -> None:
    """Write what a layer gives for the rows from `first` to before `end`: x0 * (W V x + bias) + x."""
    size = len(bias_I)
    for b in range(first, end):
        x0, x, product, out = x0_BI[b], x_BI[b], product_BI[b], out_BI[b]
        for i in range(size):
            out[i] = as_in(out, widened(x0[i]) * (widened(product[i]) + bias_I[i]) + widened(x[i]))


@compiled_loop
def write_gradients(
    first: int,
    end: int,
    grad_BI: Any,
    x0_BI: Any,
    product_BI: Any,
    bias_I: Any,
    num_added: int,
    grad_product_BI: Any,
    grad_x0_BI: Any,
    grad_bias_SI: Any,
) -> None:
    """Write, for some sums of rows, the gradients of a layer's product and bias, and add that of x0.

    Args:
        first: sum of `ROWS_OF_A_SUM` rows.
        end: one past the last.
        grad_BI: of what the layer has given.
        x0_BI: what the net was given.
        product_BI: W V x.
        bias_I: float32; of the net's first layer, whose x is x0 too, it is 1 more.
        num_added: layers whose gradient `grad_x0_BI` holds; with 0 it holds nothing yet.
        grad_product_BI: receives grad * x0.
        grad_x0_BI: grad * (product + bias) is added to it.
        grad_bias_SI: float32, a row for each sum.
    """
    size = len(bias_I)
    for s in range(first, end):
        grad_bias = grad_bias_SI[s]
        for i in range(size):
            grad_bias[i] = np.float32(0)
        for b in range(s * ROWS_OF_A_SUM, min((s + 1) * ROWS_OF_A_SUM, len(grad_BI))):
            grad, x0, product = grad_BI[b], x0_BI[b], product_BI[b]
            grad_product, grad_x0 = grad_product_BI[b], grad_x0_BI[b]
            # Loops that each write little: of more, the compiler does not see that they may take many numbers at once.
            for i in range(size):
                one = widened(grad[i]) * widened(x0[i])
                grad_bias[i] += one
                grad_product[i] = as_in(grad_product, one)
            if num_added == 0:
                for i in range(size):
                    grad_x0[i] = as_in(grad_x0, widened(grad[i]) * (widened(product[i]) + bias_I[i]))
            else:
                for i in range(size):
                    one = widened(grad[i]) * (widened(product[i]) + bias_I[i])
                    grad_x0[i] = as_in(grad_x0, one + widened(grad_x0[i]))


class _CrossNet(torch.autograd.Function):
    """All layers, in the precision of x_0; weights, and so their gradients, may be in another."""

    @staticmethod
    def forward(ctx: Any, x0_BI: Tensor, num_layers: int, *weights: Tensor) -> Tensor:
        x_BI, saved = x0_BI, []
        for W, V, bias_I, *gate in _groups(weights, len(weights) // num_layers):
            W, V, *gate = (weight.to(x0_BI.dtype) for weight in (W, V, *gate))  # noqa: PLW2901 - as they multiply
            hidden_BR = x_BI @ V.t()
            product_BI = hidden_BR @ W.t()
            saved += [W, V, bias_I, x_BI, hidden_BR, product_BI]
            factor_BI = x0_BI
            if gate:
                gate_W, gate_V = gate
                gate_hidden_BR = x_BI @ gate_V.t()
                gate_BI = (gate_hidden_BR @ gate_W.t()).sigmoid_()
                saved += [gate_W, gate_V, gate_hidden_BR, gate_BI]
                factor_BI = x0_BI * gate_BI
            x_BI = _layer(factor_BI, x_BI, product_BI, bias_I)
        ctx.save_for_backward(x0_BI, *saved)
        ctx.num_layers, ctx.weight_dtypes = num_layers, [weight.dtype for weight in weights]
        return x_BI

    @staticmethod
    def backward(ctx: Any, grad_BI: Tensor) -> tuple[Any, ...]:
        x0_BI, *saved = ctx.saved_tensors
        grad_BI = grad_BI.contiguous()
        grad_x0_BI, grad_product_BI = torch.empty_like(x0_BI), torch.empty_like(x0_BI)
        grad_weights: list[Tensor] = []
        layers = [*_groups(saved, len(saved) // ctx.num_layers)]
        for number in reversed(range(len(layers))):
            W, V, bias_I, x_BI, hidden_BR, product_BI, *gate = layers[number]
            is_first, num_added = number == 0, len(layers) - 1 - number
            # The first layer's x is x_0, which also gets the gradient of the sum's other term: as if b were 1 more.
            factor_BI, shift = (grad_BI * gate[3], 0) if gate else (grad_BI, int(is_first))
            read, written = (factor_BI, x0_BI, product_BI, bias_I + shift), (grad_product_BI, grad_x0_BI)
            grad_bias_I = _layer_gradients(*read, *written, num_added)
            if is_first:
                grad_BI = grad_x0_BI.add_(grad_BI) if gate else grad_x0_BI
            elif num_added == 0:
                grad_BI = grad_BI.clone()  # what autograd has given may belong to others too
            grad_hidden_BR = grad_product_BI @ W
            of_layer = [grad_product_BI.t() @ hidden_BR, _inner(grad_hidden_BR, x_BI), grad_bias_I]
            grad_BI.addmm_(grad_hidden_BR, V)
            if gate:
                gate_W, gate_V, gate_hidden_BR, gate_BI = gate
                # Of the sigmoid's argument: g' = g (1 - g), and the g is in the product's gradient already.
                grad_gate_BI = grad_product_BI.mul_(product_BI + bias_I.to(x0_BI.dtype)).mul_(1 - gate_BI)
                grad_hidden_BR = grad_gate_BI @ gate_W
                of_layer += [grad_gate_BI.t() @ gate_hidden_BR, _inner(grad_hidden_BR, x_BI)]
                grad_BI.addmm_(grad_hidden_BR, gate_V)
            grad_weights = [*of_layer, *grad_weights]
        grads = (grad.to(dtype) for grad, dtype in zip(grad_weights, ctx.weight_dtypes, strict=True))
        return grad_BI, None, *grads


def _groups(tensors: Sequence[Tensor], size: int) -> Iterator[Sequence[Tensor]]:
    return (tensors[begin : begin + size] for begin in range(0, len(tensors), size))


def _layer(x0_BI: Tensor, x_BI: Tensor, product_BI: Tensor, bias_I: Tensor) -> Tensor:
    """x_0 * (W V x + b) + x."""
    if not has_kernels(x0_BI):
        return torch.addcmul(x_BI, x0_BI, product_BI + bias_I.to(x0_BI.dtype))
    out_BI = torch.empty_like(x_BI)
    arrays = [array_of(tensor) for tensor in (x0_BI, x_BI, product_BI, bias_I.float(), out_BI)]
    in_parts(len(x_BI), 4 * x_BI.shape[1], lambda first, end: write_layer(first, end, *arrays))
    return out_BI


def _layer_gradients(
    grad_BI: Tensor,
    x0_BI: Tensor,
    product_BI: Tensor,
    bias_I: Tensor,
    grad_product_BI: Tensor,
    grad_x0_BI: Tensor,
    num_added: int,
) -> Tensor:
    """Write grad * x_0 into `grad_product_BI`, add grad * (W V x + b) to `grad_x0_BI`, and return the bias's gradient.

    That holds the sum of `num_added` layers; with 0 it holds nothing yet.
    """
    if not has_kernels(x0_BI):
        factor_BI = product_BI + bias_I.to(x0_BI.dtype)
        torch.mul(grad_BI, x0_BI, out=grad_product_BI)
        grad_x0_BI.copy_(grad_BI * factor_BI) if num_added == 0 else grad_x0_BI.addcmul_(grad_BI, factor_BI)
        return grad_product_BI.sum(0, dtype=bias_I.dtype)
    num_rows, size = x0_BI.shape
    sums_SI = torch.empty(-(-num_rows // ROWS_OF_A_SUM), size)
    read = [array_of(tensor) for tensor in (grad_BI, x0_BI, product_BI, bias_I.float())]
    written = [array_of(tensor) for tensor in (grad_product_BI, grad_x0_BI, sums_SI)]
    work = 5 * size * ROWS_OF_A_SUM
    in_parts(len(sums_SI), work, lambda first, end: write_gradients(first, end, *read, num_added, *written))
    return sums_SI.sum(0)


def _inner(few_BR: Tensor, many_BI: Tensor) -> Tensor:
    """The product over the batch, [R, I]; oneDNN transposes the small factor slower than a copy does."""
    return few_BR.t().contiguous() @ many_BI


@fx.wrap  # a leaf for the train pipeline, which traces the model to find its sharded modules
def cross_net(x0_BI: Tensor, num_layers: int, weights: list[Tensor]) -> Tensor:
    """All layers of a cross net, in the precision of autocast where it is on.

    Args:
        x0_BI: what the first layer is given.
        num_layers: of the net.
        weights: of each layer W [I, R], V [R, I] and b [I]; with a gate W and V of the gate, too.

    Returns:
        [B, I].
    """
    # TorchScript knows no functions of Python.
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        x_BI, size = x0_BI, len(weights) // num_layers
        for i in range(0, len(weights), size):
            crossed_BI = linear(linear(x_BI, weights[i + 1]), weights[i], weights[i + 2])
            if size > 3:
                crossed_BI = crossed_BI * linear(linear(x_BI, weights[i + 4]), weights[i + 3]).sigmoid()
            x_BI = x0_BI * crossed_BI + x_BI
        return x_BI
    kind, dtype = x0_BI.device.type, x0_BI.dtype
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    return _CrossNet.apply(x0_BI.to(dtype).contiguous(), num_layers, *weights)  # type: ignore[no-untyped-call]


class LowRankCrossNet(nn.Module):
    """The cross net with weights of low rank, as `torchrec.modules.crossnet` has it.

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
        lists = [self.W_kernels, self.V_kernels, self.bias]
        if self.gated:
            lists += [self.gate_W_kernels, self.gate_V_kernels]
        return cross_net(x0_BI, self.num_layers, [weight for layer in zip(*lists, strict=True) for weight in layer])


def flat_vectors(dense_BD: Tensor, sparse_BFD: Tensor) -> Tensor:
    """The dense vector and all embeddings one after the other: [B, I], in the precision of the dense vector."""
    return torch.cat([dense_BD, sparse_BFD.flatten(1).to(dense_BD.dtype)], dim=1)


class InteractionDCNArch(nn.Module):
    """Same arguments, inputs, outputs and state dict as `torchrec.models.dlrm.InteractionDCNArch`."""

    def __init__(self, num_sparse_features: int, crossnet: nn.Module) -> None:
        super().__init__()
        self.F, self.crossnet = num_sparse_features, crossnet

    def forward(self, dense_features: Tensor, sparse_features: Tensor) -> Tensor:
        """Maps [B, D] and [B, F, D] to [B, I]."""
        return self.crossnet(flat_vectors(dense_features, sparse_features))


class ServedCrossNet(FastInteraction):
    """The cross net as it is served, with packed weights."""

    def __init__(self, shape: ModelShape, weights: ServedWeights) -> None:
        self.num_slots, size = shape.num_sparse + 1, shape.flat_size
        config = shape.config.dcn

        def pair(kind: str, number: int, bias: str | None = None) -> tuple[PackedLinear, PackedLinear]:
            """V and W."""
            name = f"inter_arch.crossnet.{kind}{{}}_kernels.{number}"
            V = weights.layer(name.format("V"), (config.low_rank_dim, size))
            return V, weights.layer(name.format("W"), (size, config.low_rank_dim), bias=bias)

        self._layers = [pair("", number, f"inter_arch.crossnet.bias.{number}") for number in range(config.num_layers)]
        self._gates = [pair("gate_", number) if config.gated else () for number in range(config.num_layers)]

    def interact(self, vectors_BMD: Tensor) -> Tensor:
        """Maps [B, N, D] to [B, N D]."""
        x0 = x = vectors_BMD.flatten(1)
        for layer, gate in zip(self._layers, self._gates, strict=True):
            crossed = run_layers(layer, x)
            if gate:
                crossed.mul_(run_layers(gate, x).sigmoid_())
            x = torch.addcmul(x, x0, crossed, out=crossed)
        return x


class CrossArchitecture(BuiltInArchitecture):
    """That of `model.interaction = "dcn"`."""

    class_name = "DLRM_DCN"

    def arguments(self, config: ModelConfig) -> dict[str, Any]:
        """The net's layers and rank, and `gated`, which TorchRec's class does not know, where it is set."""
        net = {"dcn_num_layers": config.dcn.num_layers, "dcn_low_rank_dim": config.dcn.low_rank_dim}
        return net | ({"gated": True} if config.dcn.gated else {})

    def interaction(self, shape: ModelShape) -> tuple[Sequence[Product], int]:
        """V and W of each layer, and of its gate."""
        config, size = shape.config.dcn, shape.flat_size
        layer = layers(size, (config.low_rank_dim, size))
        return layer * (config.num_layers * (2 if config.gated else 1)), size

    def num_activations(self, shape: ModelShape) -> int:
        """Each layer also keeps W V x, and with a gate the gate; but x, which both of its first products read, once."""
        return super().num_activations(shape) + shape.config.dcn.num_layers * shape.flat_size

    def fast_interaction(self, shape: ModelShape, weights: ServedWeights) -> FastInteraction:
        """The cross net with packed weights."""
        return ServedCrossNet(shape, weights)

    def graph_interaction(self, shape: ModelShape, graph: Graph, dense_BD: str, vectors_BND: str) -> str:
        """The cross net, which reads the dense vector among the others."""
        del dense_BD
        x0 = x = graph.node("Flatten", vectors_BND)
        for number in range(shape.config.dcn.num_layers):
            names = [f"inter_arch.crossnet.{kind}.{number}" for kind in ("V_kernels", "W_kernels", "bias")]
            crossed = graph.linear(graph.linear(x, names[0]), *names[1:])
            if shape.config.dcn.gated:
                V, W = (f"inter_arch.crossnet.gate_{kind}_kernels.{number}" for kind in "VW")
                crossed = graph.node("Mul", crossed, graph.node("Sigmoid", graph.linear(graph.linear(x, V), W)))
            x = graph.node("Add", graph.node("Mul", x0, crossed), x)
        return x


ARCHITECTURE = CrossArchitecture()
