"""The optimizer of a model: the tables' own, which runs inside their backward, and one of torch for everything else."""

from typing import Any

import torch
from torch import nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.utils import clip_grad_norm_
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from torchdlrm.config import DenseOptimizerConfig


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
        optimizer = _dense_optimizer(config, params)
        if config.clip_norm is not None:
            clip_norm = config.clip_norm

            def clip(*_: object) -> None:
                # Every rank has the mean gradient already, so this norm is that of the global batch.
                clip_grad_norm_(params, clip_norm)

            optimizer.register_step_pre_hook(clip)
        return optimizer

    return make


def _dense_optimizer(config: DenseOptimizerConfig, params: list[torch.Tensor]) -> torch.optim.Optimizer:
    """An optimizer of torch, its state in place before the first step: a checkpoint is loaded into it."""
    # fused: one pass over parameter, gradient and state instead of one for each operation.
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    if config.name == "adagrad":
        return torch.optim.Adagrad(
            params, eps=config.eps, initial_accumulator_value=config.initial_accumulator, **shared
        )
    if config.name == "adamw":
        adamw = torch.optim.AdamW(params, betas=(config.beta1, config.beta2), eps=config.eps, **shared)
        for param in params:
            adamw.state[param] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
        return adamw
    sgd = torch.optim.SGD(params, momentum=config.momentum, **shared)
    if config.momentum:
        for param in params:
            sgd.state[param] = {"momentum_buffer": torch.zeros_like(param)}
    return sgd
