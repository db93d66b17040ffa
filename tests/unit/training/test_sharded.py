"""Optimizers of the dense parts, with parameters on the meta device in place of those on a GPU."""

import pytest
import torch

from torchdlrm.config import DenseOptimizerConfig
from torchdlrm.training.sharded import dense_optimizer


@pytest.mark.parametrize(("name", "momentum"), [("adagrad", 0.0), ("sgd", 0.9), ("adamw", 0.0)])
def test_the_state_of_the_dense_optimizer_is_where_its_parameter_is(name, momentum):
    param = torch.nn.Parameter(torch.empty(3, 2, device="meta"))
    optimizer = dense_optimizer(DenseOptimizerConfig(name=name, momentum=momentum), [param])
    assert {value.device.type for value in optimizer.state[param].values()} == {"meta"}
