"""Batch normalisation over the rows of the global batch, compared with torch's own on the whole batch."""

import pytest
import torch
from torch import nn

from torchdlrm import GlobalBatchNorm1d
from torchdlrm.loader.batch import num_padding_rows, rank_rows
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group

C, NUM_INPUTS = 6, 20
# Of two ranks: an odd batch, one of a row, one of two rows, and a mean that is large beside the deviation.
BATCHES = {"odd": (301, 0.0), "one row": (1, 0.0), "a row each": (2, 0.0), "far from 0": (33, 1000.0)}


def drawn(name, seed):
    """Inputs [B, C] of different scales, and what the loss is multiplied by."""
    generator = torch.Generator().manual_seed(seed)
    rows, offset = BATCHES[name]
    inputs = torch.randn(rows, C, generator=generator) * torch.arange(1, C + 1) + offset
    return inputs, torch.randn(rows, C, generator=generator), torch.randn(2, C, generator=generator)


def loss_of(outputs, factors):
    """Not linear, so that the gradient depends on what comes out."""
    return (outputs * factors + outputs.pow(3) * 0.1).sum()


def with_weights(norm, weights):
    norm.weight.data.copy_(weights[0])
    norm.bias.data.copy_(weights[1])
    return norm


class FinalMLP(nn.Module):
    """The logit is a product of two streams of the same rows (Mao et al., AAAI 2023)."""

    def __init__(self, norm, *, bias):
        super().__init__()
        self.streams = nn.ModuleList(
            nn.Sequential(nn.Linear(NUM_INPUTS, C, bias=bias), norm(C), nn.ReLU(), nn.Linear(C, C, bias=bias), norm(C))
            for _ in range(2)
        )
        self.bilinear = nn.Parameter(torch.randn(C, C) / C)

    def forward(self, rows):
        first, second = (stream(rows) for stream in self.streams)
        return (first @ self.bilinear * second).sum(1)


def learnt(norm, dtype, *, bias=False, num_steps=40, nudge=0.0, rank=0, world_size=1):
    """Probabilities of some rows after steps of Adagrad on batches, of which each rank has its part."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.rand(num_steps, 64, NUM_INPUTS, generator=generator, dtype=torch.float64).to(dtype) * (1 + nudge)
    labels = (torch.rand(num_steps, 64, generator=generator) < 0.3).to(dtype)
    torch.manual_seed(3)
    model = FinalMLP(norm, bias=bias).to(dtype)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.05)
    for inputs_B, labels_B in zip(rows, labels, strict=True):
        optimizer.zero_grad()
        logits_B = model(inputs_B[rank::world_size])
        loss = nn.functional.binary_cross_entropy_with_logits(logits_B, labels_B[rank::world_size], reduction="sum")
        (loss / len(labels_B)).backward()
        if world_size > 1:
            for parameter in model.parameters():
                torch.distributed.all_reduce(parameter.grad)
        optimizer.step()
    return model.eval()(rows[0]).sigmoid().detach()


def on_two_ranks(seed):
    """Of each batch the outputs, the gradients and the running statistics; those of rows rank by rank.

    And what a model has learnt of some.
    """
    with join_process_group() as ranks:
        found = {}
        for name in BATCHES:
            inputs, factors, weights = drawn(name, seed)
            batch = range(len(inputs))
            rows = rank_rows(batch, rank=ranks.rank, world_size=2)
            mine = slice(rows.start, rows.stop)
            norm = with_weights(GlobalBatchNorm1d(C), weights)
            norm.num_padding = num_padding_rows(batch, rank=ranks.rank, world_size=2)
            padding = torch.full((norm.num_padding, C), 7.0)  # anything: it counts for nothing
            padded = torch.cat([inputs[mine], padding]).requires_grad_()
            outputs = norm(padded)
            loss_of(outputs[: len(rows)], factors[mine]).backward()
            part = (outputs[: len(rows)].detach(), padded.grad[: len(rows)], padded.grad[len(rows) :])
            outputs, gradients, of_padding = map(torch.cat, zip(*ranks.all_gather(part), strict=True))
            assert not of_padding.any()
            reduced = [sum(ranks.all_gather(weight.grad)) for weight in (norm.weight, norm.bias)]
            buffers = ranks.all_gather([norm.running_mean, norm.running_var])
            assert all(torch.equal(*both) for both in zip(*buffers, strict=True))
            found[name] = outputs, gradients, *reduced, *buffers[0]
        found["learnt"] = learnt(GlobalBatchNorm1d, torch.float64, rank=ranks.rank, world_size=2)
        return found


@pytest.fixture(scope="module")
def found():
    return launch(on_two_ranks, 5, processes=Processes(2))


@pytest.mark.parametrize("name", [name for name in BATCHES if name != "one row"])
def test_two_processes_compute_what_torch_computes_of_the_whole_batch(found, name):
    inputs, factors, weights = drawn(name, 5)
    norm = with_weights(torch.nn.BatchNorm1d(C, dtype=torch.float64), weights)
    inputs = inputs.double().requires_grad_()
    outputs = norm(inputs)
    loss_of(outputs, factors).backward()
    expected = outputs, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
    for is_, should_be in zip(found[name], expected, strict=True):
        largest = max(1.0, should_be.detach().abs().max().item())  # of two rows the gradients cancel out
        torch.testing.assert_close(is_.double(), should_be, rtol=2e-4, atol=1e-4 * largest)


def test_after_many_steps_two_processes_have_learnt_what_one_has_with_torchs_own(found):
    """In float64.  In float32 a ReLU whose input is within rounding of 0 decides, as it does for one process."""
    expected = learnt(nn.BatchNorm1d, torch.float64)
    assert expected.std() > 0.02  # something was learnt
    torch.testing.assert_close(found["learnt"], expected, rtol=0, atol=1e-12)


def test_a_bias_before_it_learns_nothing_but_rounding():
    """Its gradient is 0 but for that, of which Adagrad makes whole steps: they move the running mean."""
    for bias, is_exact in ((False, True), (True, False)):
        one, nudged = (
            learnt(nn.BatchNorm1d, torch.float32, bias=bias, num_steps=5, nudge=nudge) for nudge in (0.0, 1e-7)
        )
        assert ((one - nudged).abs().max() < 1e-5) == is_exact


def test_a_batch_of_one_row_is_normalised_by_the_running_statistics(found):
    inputs, factors, weights = drawn("one row", 5)
    norm = with_weights(torch.nn.BatchNorm1d(C).eval(), weights)
    inputs.requires_grad_()
    outputs = norm(inputs)
    loss_of(outputs, factors).backward()
    expected = outputs, inputs.grad, norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var
    for is_, should_be in zip(found["one row"], expected, strict=True):
        torch.testing.assert_close(is_, should_be)
    alone = with_weights(GlobalBatchNorm1d(C), weights)
    torch.testing.assert_close(alone(inputs), outputs)
    assert torch.equal(alone.running_var, torch.ones(C))


def test_alone_it_is_torchs_own_in_training_and_evaluation(seed):
    inputs, _, weights = drawn("odd", seed)
    ours, torchs = (with_weights(make(C), weights) for make in (GlobalBatchNorm1d, torch.nn.BatchNorm1d))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(ours(inputs.to(dtype)), torchs(inputs.to(dtype)))
    assert torch.equal(ours.eval()(inputs), torchs.eval()(inputs))
    assert {name: value.dtype for name, value in ours.state_dict().items()} == dict.fromkeys(
        ("weight", "bias", "running_mean", "running_var"), torch.float32
    )


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"GlobalBatchNorm1d\(6\) takes \[rows, 6\], got \[2, 3, 6\]"):
        GlobalBatchNorm1d(C)(torch.zeros(2, 3, C))
