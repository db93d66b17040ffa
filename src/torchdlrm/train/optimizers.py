"""Optimizers and learning rates: one inside the backward of the tables, one for the rest, one schedule for both."""

from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from torchdlrm.config import DenseOptimizerConfig, ScheduleConfig, TableOptimizerConfig

MIN_LEARNING_RATE = 1e-7

_TABLE_OPTIMIZERS = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
}


def fused_params(config: TableOptimizerConfig) -> dict[str, Any]:
    """What FBGEMM's tables need to know to update themselves during the backward."""
    params: dict[str, Any] = {
        "optimizer": _TABLE_OPTIMIZERS[config.name],
        "learning_rate": config.learning_rate,
    }
    if config.name != "sgd":
        params["eps"] = config.eps
    return params


def build_optimizer(model: nn.Module, config: DenseOptimizerConfig) -> CombinedOptimizer:
    """The tables' fused optimizer and one for all other parameters, as one with names for its state.

    Args:
        model: after `DistributedModelParallel`.
        config: the optimizer for everything that is not a table.
    """
    fused: KeyedOptimizer = model.fused_optimizer
    # Not "what the fused optimizer lacks": it has this rank's tables alone, and a column-wise table has a parameter
    # on every rank.
    tables = {name for name, value in model.state_dict().items() if isinstance(value, ShardedTensor)}
    dense = {name: param for name, param in model.named_parameters() if name not in tables}
    return CombinedOptimizer([("tables", fused), ("dense", KeyedOptimizerWrapper(dense, _dense_factory(config)))])


def _dense_factory(config: DenseOptimizerConfig) -> Any:
    def make(params: list[torch.Tensor]) -> torch.optim.Optimizer:
        # fused: one pass over parameter, gradient and state instead of one for each operation.
        if config.name == "adagrad":
            return torch.optim.Adagrad(params, lr=config.learning_rate, eps=config.eps, fused=True)
        if config.name == "adamw":
            return torch.optim.AdamW(params, lr=config.learning_rate, eps=config.eps, fused=True)
        return torch.optim.SGD(params, lr=config.learning_rate, fused=True)

    return make


class Schedule:
    """Sets the learning rate of every step.

    Args:
        config: the policy.
        optimizer: its parameter groups hold their base rates when the schedule is made.
    """

    def __init__(self, config: ScheduleConfig, optimizer: CombinedOptimizer) -> None:
        self._config = config
        self._groups = [(group, float(group["lr"])) for group in optimizer.param_groups]

    def set(self, step: int) -> float:
        """Set the rates of step `step` (from 1); returns that of the dense optimizer."""
        rate = 0.0
        for group, base in self._groups:
            rate = learning_rate(base, step, self._config)
            group["lr"] = rate
        return rate


def learning_rate(base: float, step: int, config: ScheduleConfig) -> float:
    """The policy of facebookresearch/dlrm as it was meant: warm-up reaches the base rate, decay needs no warm-up.

    Args:
        base: the base rate.
        step: from 1.
        config: warm-up steps W, decay start D, decay steps N.

    Returns:
        base * step / W while step <= W; base until D; then base * ((N - (step - D)) / N)^2, not below 1e-7.
    """
    if step <= config.warmup_steps:
        return base * step / config.warmup_steps
    if not config.decay_steps or step <= config.decay_start_step:
        return base
    left = max(0.0, 1 - (step - config.decay_start_step) / config.decay_steps)
    return max(MIN_LEARNING_RATE, base * left**2)
