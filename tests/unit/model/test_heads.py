"""The heads of several labels, beside plain torch code, and the loss that is made of them."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy, binary_cross_entropy_with_logits

from torchdlrm.config import ModelConfig
from torchdlrm.config.model import HeadsConfig
from torchdlrm.errors import ConfigError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.eager import trace_products
from torchdlrm.model.heads import HEADS, logit_of_product
from torchdlrm.model.loss import BatchLoss, ByUncertainty, WeightedSum, batch_loss

LABELS = ("click", "cart", "purchase")
INPUTS, SIZES, TOWER = 6, (5, 4), (3, 1)


def heads(kind, after=None, seed=0):
    torch.manual_seed(seed)
    of_experts = {} if kind == "shared" else {"num_experts": 2, "expert_layer_sizes": SIZES}
    config = HeadsConfig(
        kind=kind, after=after or {}, **of_experts, **({"num_shared_experts": 3} if kind == "ple" else {})
    )
    return HEADS[kind](INPUTS, TOWER, LABELS, config).double()


def layered(weights, prefix, inputs, *, last_is_linear):
    """Plain layers with ReLU, whose weights and biases come by turns."""
    tensors = [value for name, value in weights.items() if name.startswith(prefix)]
    for i, (weight, bias) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        inputs = inputs @ weight.T + bias
        if not (last_is_linear and i == len(tensors) // 2 - 1):
            inputs = inputs.clamp(min=0)
    return inputs


def mixed(weights, prefix, gate, gate_input, experts):
    """The mean of experts' outputs by the softmax of a gate."""
    scores = (gate_input @ weights[f"{prefix}.gates.{gate}.weight"].T).exp()
    shares = scores / scores.sum(1, keepdim=True)
    return sum(shares[:, i : i + 1] * expert for i, expert in enumerate(experts))


def expected_towers_input(kind, weights, rows):
    """What each label's tower reads, as the papers' formulas have it."""

    def expert(level, number, inputs):
        return layered(weights, f"levels.{level}.experts.{number}.", inputs, last_is_linear=False)

    if kind == "shared":
        return [rows] * 3
    if kind == "mmoe":
        experts = [expert(0, i, rows) for i in range(2)]
        return [mixed(weights, "levels.0", label, rows, experts) for label in range(3)]
    # PLE: experts 0 and 1 are the first label's, 2 and 3 the second's, 4 and 5 the third's, and 6 to 8 are shared.
    first = [expert(0, i, rows) for i in range(9)]
    below = [mixed(weights, "levels.0", t, rows, first[2 * t : 2 * t + 2] + first[6:]) for t in range(3)]
    below.append(mixed(weights, "levels.0", 3, rows, first))
    second = [expert(1, i, below[min(i // 2, 3)]) for i in range(9)]
    return [mixed(weights, "levels.1", t, below[t], second[2 * t : 2 * t + 2] + second[6:]) for t in range(3)]


@pytest.mark.parametrize("kind", HEADS)
def test_logits_are_those_of_plain_torch_code(kind, seed):
    model, rows = heads(kind, seed=seed), torch.randn(20, INPUTS, dtype=torch.float64)
    weights = dict(model.named_parameters())
    below = expected_towers_input(kind, weights, rows)
    towers = [layered(weights, f"towers.{t}.", inputs, last_is_linear=True) for t, inputs in enumerate(below)]
    # The softmax of gates is float32 in every precision.
    torch.testing.assert_close(model(rows), torch.cat(towers, dim=1), rtol=1e-5, atol=1e-7)


def test_a_label_after_another_has_the_product_of_their_probabilities(seed):
    rows = torch.randn(20, INPUTS, dtype=torch.float64)
    alone = torch.sigmoid(heads("mmoe", seed=seed)(rows))
    chained = torch.sigmoid(heads("mmoe", {"purchase": "cart", "cart": "click"}, seed=seed)(rows))
    expected = torch.stack([alone[:, 0], alone[:, 0] * alone[:, 1], alone.prod(1)], dim=1)
    torch.testing.assert_close(chained, expected, rtol=1e-6, atol=0)


def test_the_logit_of_a_product_is_exact_and_finite_everywhere():
    edges = torch.tensor([-1e4, -90.0, -30.0, -1.0, 0.0, 2.0, 40.0, 90.0, 1e4])
    first, second = (side.flatten().requires_grad_() for side in torch.meshgrid(edges, edges, indexing="ij"))
    found = logit_of_product(first, second)
    found.sum().backward()
    assert all(values.isfinite().all() for values in (found, first.grad, second.grad))
    a, b = (side.detach().numpy().astype(np.longdouble) for side in (first, second))
    with np.errstate(over="ignore"):  # the odds of 1 / ((1 + x) (1 + y)) are 1 / (x + y + x y)
        expected = -np.log(np.exp(-a) + np.exp(-b) + np.exp(-a - b))
    known = np.isfinite(expected)
    assert known.sum() > 40
    np.testing.assert_allclose(found.detach().numpy()[known], expected[known].astype(float), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
def test_the_products_that_heads_name_are_those_that_run(kind):
    of_kind = HeadsConfig(kind=kind, num_experts=3, num_shared_experts=2, expert_layer_sizes=(7, 5))
    model = ModelConfig(
        embedding_dim=8, dense_arch_layer_sizes=(12, 8), over_arch_layer_sizes=(10, 6, 1), heads=of_kind
    )
    shape = ModelShape(model, num_dense=3, num_sparse=4, labels=LABELS)
    named, run = (
        sorted((p.rows, p.inputs, p.outputs, p.has_weight) for p in products)
        for products in (shape.products, trace_products(shape))
    )
    assert named == run


def test_losses_of_labels_are_the_formulas(seed):
    rng = np.random.default_rng(seed)
    logits, labels = torch.from_numpy(rng.normal(size=(50, 2))), torch.from_numpy((rng.random((50, 2)) < 0.3) * 1.0)
    each = [binary_cross_entropy(torch.sigmoid(logits[:, t]), labels[:, t]) for t in range(2)]
    of_labels = WeightedSum(["click", "purchase"], {"purchase": 2.5}).double()
    assert batch_loss(logits, labels, None, of_labels=of_labels).item() == pytest.approx(each[0] + 2.5 * each[1])
    learnt = ByUncertainty(["click", "purchase"]).double()
    learnt.log_variances.data = torch.tensor([0.3, -0.7], dtype=torch.float64)
    loss = batch_loss(logits, labels, None, of_labels=learnt)
    s = learnt.log_variances.detach()
    assert loss.item() == pytest.approx((torch.exp(-s) * torch.stack(each) + s).sum().item())
    loss.backward()
    torch.testing.assert_close(learnt.log_variances.grad, 1 - torch.exp(-s) * torch.stack(each))


class Own(nn.Module):
    def loss(self, outputs, labels, weights):
        assert weights.shape == labels.shape
        return binary_cross_entropy_with_logits(outputs.squeeze(1), labels, reduction="none")


def test_cross_entropy_as_a_loss_of_its_own_has_the_weights_and_the_correction_of_the_built_in_one(seed):
    logits, labels = torch.randn(20, 1), (torch.rand(20) < 0.3).float()
    batch = SimpleNamespace(labels=labels, num_padding=3, row_weights=torch.rand(20), loss_weight=0.7)
    own, built_in = (BatchLoss(model, 0.2, ())(logits, batch)[0].item() for model in (Own(), nn.Module()))
    assert own == pytest.approx(built_in)
    with pytest.raises(ConfigError, match=r"train.negative_weight: corrects logits alone"):
        BatchLoss(Own(), 0.2, ())((logits, logits), batch)
    with pytest.raises(ConfigError, match=r"train.negative_weight: Own has a `loss` of its own"):
        BatchLoss(Own(), 0.2, LABELS)
