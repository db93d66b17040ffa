"""Dropout: which units, how many, and nothing of it outside training or in the state dict."""

import pytest
import torch

from torchdlrm.config import load_config
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model
from torchdlrm.model.dropout import DroppedActivation, drop

SHAPE = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "32,16,8",
    "model.over_arch_layer_sizes": "32,16,1",
}


def built(seed, share):
    torch.manual_seed(seed)
    shape = ModelShape(load_config(None, SHAPE).model, 3, 1)
    return build_model(shape, torch.device("cpu"), dropout=share).model


def test_a_share_of_the_units_is_zero_and_the_mean_stays(seed):
    dropped = drop(torch.ones(2_000, 500), 0.3, (seed, 1, 0))
    assert sorted(dropped.unique().tolist()) == [0.0, pytest.approx(1 / 0.7)]
    assert float((dropped == 0).float().mean()) == pytest.approx(0.3, abs=0.002)  # a million draws: 4 deviations
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.003)
    assert drop(torch.ones(2, 2, dtype=torch.bfloat16), 0.3, (seed,)).dtype == torch.bfloat16


def test_the_units_depend_on_seed_step_rank_and_layer_alone(seed):
    hidden = torch.ones(50, 50)
    first = drop(hidden, 0.5, (seed, 3, 0, 1))
    torch.manual_seed(99)  # torch's own generator has no say
    assert torch.equal(first, drop(hidden, 0.5, (seed, 3, 0, 1)))
    for other in ((seed + 1, 3, 0, 1), (seed, 4, 0, 1), (seed, 3, 1, 1), (seed, 3, 0, 2)):
        assert not torch.equal(first, drop(hidden, 0.5, other))


def test_all_hidden_layers_drop_but_neither_the_vector_that_interacts_nor_the_logit(seed):
    model = built(seed, 0.5)
    dropping = [name for name, module in model.named_modules() if isinstance(module, DroppedActivation)]
    assert len(dropping) == 2 + 2
    assert model.state_dict().keys() == built(seed, 0.0).state_dict().keys()


def test_predictions_are_those_of_the_same_weights_without_dropout(seed):
    plain, dropping = built(seed, 0.0), built(seed, 0.5)
    dropping.load_state_dict(plain.state_dict())
    rows = torch.rand(20, 3)
    assert not torch.equal(dropping.dense_arch(rows), plain.dense_arch(rows))
    dropping.eval()
    assert torch.equal(dropping.dense_arch(rows), plain.dense_arch(rows))


def test_gradients_reach_the_kept_units_alone(seed):
    hidden = torch.ones(20, 30, requires_grad=True)
    dropped = drop(hidden, 0.5, (seed,))
    dropped.sum().backward()
    assert torch.equal(hidden.grad, dropped.detach())
