"""The cross net's own forward and backward, by kernels and by torch's operators, against autograd of the formula."""

import pytest
import torch
from torch import fx
from torch.nn.functional import linear

from torchdlrm.kernels import threads
from torchdlrm.model import dcn
from torchdlrm.model.dcn import ROWS_OF_A_SUM, LowRankCrossNet

NUM_ROWS, SIZE, RANK = 2 * ROWS_OF_A_SUM + 5, 24, 3
nets = pytest.mark.parametrize(("num_layers", "gated"), [(1, False), (3, False), (1, True), (2, True)])


def build(seed, num_layers, *, gated):
    torch.manual_seed(seed)
    net = LowRankCrossNet(SIZE, num_layers, RANK, gated=gated)
    for bias in net.bias:
        torch.nn.init.normal_(bias)
    return net, torch.randn(NUM_ROWS, SIZE), torch.randn(NUM_ROWS, SIZE)


def formula(net, x0):
    x = x0
    for layer in range(net.num_layers):
        crossed = linear(linear(x, net.V_kernels[layer]), net.W_kernels[layer], net.bias[layer])
        if net.gated:
            crossed = crossed * linear(linear(x, net.gate_V_kernels[layer]), net.gate_W_kernels[layer]).sigmoid()
        x = x0 * crossed + x
    return x


def gradients(run, net, x0, grad):
    """Of x_0 and of all weights, after the output itself."""
    x0 = x0.clone().requires_grad_()
    out = run(x0)
    return [out.detach(), *torch.autograd.grad(out, [x0, *net.parameters()], grad.to(out.dtype))]


@nets
def test_gradients_equal_numerical_differences(num_layers, gated, seed):
    net, x0, _ = build(seed, num_layers, gated=gated)
    net, names = net.double(), [name for name, _ in net.named_parameters()]

    def run(x0, *weights):
        return torch.func.functional_call(net, dict(zip(names, weights, strict=True)), x0)

    arguments = [x0[:4].double().requires_grad_(), *net.parameters()]
    assert torch.autograd.gradcheck(run, arguments, fast_mode=True)


@pytest.mark.parametrize("by_kernels", [True, False])
@nets
def test_output_and_gradients_equal_autograds(num_layers, gated, by_kernels, seed, monkeypatch):
    net, x0, grad = build(seed, num_layers, gated=gated)
    if not by_kernels:  # as on a GPU
        monkeypatch.setattr(dcn, "has_kernels", lambda _: False)
    for found, expected in zip(
        gradients(net, net, x0, grad), gradients(lambda x: formula(net, x), net, x0, grad), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by_kernels", [True, False])
@nets
def test_in_bfloat16_gradients_are_those_of_float32_but_for_its_rounding(
    num_layers, gated, by_kernels, seed, monkeypatch
):
    net, x0, grad = build(seed, num_layers, gated=gated)
    if not by_kernels:
        monkeypatch.setattr(dcn, "has_kernels", lambda _: False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(net, net, x0, grad)
    assert found[0].dtype == torch.bfloat16
    for ours, expected in zip(found, gradients(net, net, x0, grad), strict=True):
        assert (ours.float() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_no_bit(dtype, seed, monkeypatch):
    monkeypatch.setattr(threads, "MIN_FLOATS", 0)
    net, x0, grad = build(seed, 3, gated=True)
    before, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 4):
            torch.set_num_threads(number)
            found.append(gradients(net, net, x0.to(dtype), grad))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        for other in others:
            assert one.equal(other)


def test_a_second_backward_gives_the_same_and_the_gradient_that_it_is_given_stays_as_it_is(seed):
    net, x0, grad = build(seed, 3, gated=True)
    out, before = net(x0), grad.clone()
    first, second = (torch.autograd.grad(out, [*net.parameters()], grad, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert grad.equal(before)


def test_the_train_pipelines_tracer_sees_one_function(seed):
    net, x0, _ = build(seed, 2, gated=False)
    traced = fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [dcn.cross_net]
    assert traced(x0).equal(net(x0))
