"""The optimizers of the tables, which FBGEMM runs inside its backward."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn

from torchdlrm.config import TABLE_OPTIMIZERS, TableOptimizerConfig, TableOptimizerName
from torchdlrm.errors import ConfigError

# LARS, which FBGEMM has too, cannot be saved: it gives TorchRec no state by name.
_FBGEMM_NAMES: Mapping[TableOptimizerName, EmbOptimType] = {
    "rowwise_adagrad": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    "adagrad": EmbOptimType.EXACT_ADAGRAD,
    "sgd": EmbOptimType.EXACT_SGD,
    "adam": EmbOptimType.ADAM,
    "partial_rowwise_adam": EmbOptimType.PARTIAL_ROWWISE_ADAM,
    "lamb": EmbOptimType.LAMB,
    "partial_rowwise_lamb": EmbOptimType.PARTIAL_ROWWISE_LAMB,
}


def check_table_optimizer(config: TableOptimizerConfig, device: torch.device) -> None:
    """Refuse what FBGEMM does not have on this device.

    Raises:
        ConfigError: the optimizer, or its weight decay, has no CPU kernel; lists both.
    """
    if device.type != "cpu":
        return
    problems = []
    record = TABLE_OPTIMIZERS[config.name]
    if not record.on_cpu:
        others = ", ".join(other.name for other in TABLE_OPTIMIZERS.values() if other.on_cpu)
        problems.append(f"table_optimizer.name: FBGEMM has {config.name} for GPUs alone; on CPU choose one of {others}")
    if config.weight_decay and not record.decays_on_cpu:
        # The CPU kernel takes the argument and ignores it.
        problems.append(
            f"table_optimizer.weight_decay: FBGEMM's CPU kernels have none, got {config.weight_decay}; leave it at 0 "
            "on CPU (dense_optimizer.weight_decay works everywhere)"
        )
    if problems:
        raise ConfigError("\n".join(["the tables cannot be trained so on this device:", *(f"  {p}" for p in problems)]))


def fused_params(config: TableOptimizerConfig) -> dict[str, Any]:
    """What FBGEMM's tables need to know to update themselves during the backward.

    They give out float32, also where embeddings travel as float16: autograd casts a gradient to the type of what it is
    the gradient of, and the tables would be updated with gradients that have lost the range of bfloat16.
    """
    params: dict[str, Any] = {
        "optimizer": _FBGEMM_NAMES[config.name],
        "learning_rate": config.learning_rate,
        # The loader has checked every id already, once a row group: `Loader` raises where one is outside its table.
        "bounds_check_mode": BoundsCheckMode.NONE,
    }
    record = TABLE_OPTIMIZERS[config.name]
    params |= {name: getattr(config, name) for name in ("eps", "beta1", "beta2") if name in record.settings}
    if record.momentum:
        params["weight_decay"] = config.weight_decay  # decoupled: these have no other mode
    elif config.weight_decay:
        params |= {"weight_decay": config.weight_decay, "weight_decay_mode": WeightDecayMode.DECOUPLE}
    return params


def table_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules inside a sharded model; each holds several of this rank's tables and their optimizer."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):  # a plain list in TorchRec: modules() does not look into it
            yield from (part for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))


def set_steps_done(kernels: Iterable[SplitTableBatchedEmbeddingBagsCodegen], steps: int) -> None:
    """Say how many steps were done, on which Adam's and LAMB's bias correction depends.

    FBGEMM counts forward passes, also those of a validation, and its count is in no state dict.
    """
    for kernel in kernels:
        kernel.iter.fill_(steps)  # its forward adds one
        kernel.iter_cpu.fill_(steps)


def fill_accumulators(model: nn.Module, value: float) -> None:
    """Let the tables' sums of squares start from `value`; FBGEMM knows zero alone."""
    for kernel in table_kernels(model):
        for states in kernel.split_optimizer_states():
            states[0].fill_(value)
