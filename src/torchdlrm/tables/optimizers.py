"""The optimizers of the tables, which run inside their backward: their settings, and where each runs."""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    SplitTableBatchedEmbeddingBagsCodegen,
    WeightDecayMode,
)
from torch import nn

from torchdlrm.config import TABLE_OPTIMIZERS, TableOptimizer, TableOptimizerConfig
from torchdlrm.errors import ConfigError

_RECORDS = {EmbOptimType[record.fbgemm_name]: record for record in TABLE_OPTIMIZERS.values()}


def record_of(optimizer: EmbOptimType) -> TableOptimizer:
    """The record of what FBGEMM's module steps with."""
    return _RECORDS[optimizer]


def check_table_optimizer(config: TableOptimizerConfig, device: torch.device) -> None:
    """Refuse a weight decay that the optimizer does not have on this device, and LAMB on GPUs without any.

    Raises:
        ConfigError: names the mode and those that there are, here and elsewhere.
    """
    record = TABLE_OPTIMIZERS[config.name]
    on_cpu = device.type == "cpu"
    if record.momentum == "lamb" and not config.weight_decay and not on_cpu:
        raise ConfigError(
            f"table_optimizer.weight_decay: {config.name} needs some on GPUs, got 0: FBGEMM divides by the length of a "
            "row's step, and a row whose first gradient is exactly 0, as that of rows of weight 0, becomes NaN; set it "
            "to 1e-6 or more, or choose table_optimizer.name = adam, or train.device = cpu"
        )
    modes = record.decays(on_cpu=on_cpu)
    if config.weight_decay_mode in modes or not (config.weight_decay or config.decays_lazily):
        return
    place = "on CPU" if on_cpu else "on GPUs (FBGEMM)"
    if modes or config.decays_lazily:
        wrong = f"weight_decay_mode: {config.name} has no {config.weight_decay_mode} weight decay {place}"
    else:
        wrong = f"weight_decay: {config.name} has none {place}, got {config.weight_decay}"
    choices = [f"choose {' or '.join(sorted(modes))}" if modes else "leave both settings out"]
    everything = TABLE_OPTIMIZERS.values()
    others = [other.name for other in everything if config.weight_decay_mode in other.decays(on_cpu=on_cpu)]
    if others:
        choices.append(f"another table_optimizer.name ({', '.join(others)})")
    if not on_cpu and config.weight_decay_mode in record.decays_on_cpu:
        choices.append("train.device = cpu")
    raise ConfigError(f"table_optimizer.{wrong}; {', or '.join(choices)}")


def check_plain_torchrec(config: TableOptimizerConfig, device: torch.device) -> None:
    """Refuse to compare with plain TorchRec what it does not have on this device, and what no kernel has.

    Raises:
        ConfigError: says what it has.
    """
    check_table_optimizer(config, device)
    is_in_fbgemm = config.record.is_in_fbgemm_on_cpu and not config.weight_decay
    if device.type == "cpu" and (config.decays_lazily or not is_in_fbgemm):
        raise ConfigError(
            f"table_optimizer: plain TorchRec has no {config.name} with these settings on CPU to compare with; choose "
            "rowwise_adagrad, adagrad or sgd without weight decay"
        )


def fused_params(config: TableOptimizerConfig) -> dict[str, Any]:
    """What FBGEMM's tables, or `TablesOfRank`, need to know to update themselves during the backward.

    They give out float32, also where embeddings travel as float16: autograd casts a gradient to the type of what it is
    the gradient of, and the tables would be updated with gradients that have lost the range of bfloat16.
    """
    params: dict[str, Any] = {
        "optimizer": EmbOptimType[config.record.fbgemm_name],
        "learning_rate": config.learning_rate,
        # The loader has checked every id already, once a row group: `Loader` raises where one is outside its table.
        "bounds_check_mode": BoundsCheckMode.NONE,
    }
    record = TABLE_OPTIMIZERS[config.name]
    params |= {name: getattr(config, name) for name in ("eps", "beta1", "beta2") if name in record.settings}
    if config.weight_decay:
        # On GPUs the kinds of Adam and LAMB look at the first alone: theirs is decoupled.
        mode = WeightDecayMode.L2 if config.weight_decay_mode == "l2" else WeightDecayMode.DECOUPLE
        params |= {"weight_decay": config.weight_decay, "weight_decay_mode": mode}
    if config.decays_lazily:
        params["is_lazy"] = True  # only `TablesOfRank` takes it: FBGEMM has no such mode
    return params


def table_kernels(model: nn.Module) -> Iterator[SplitTableBatchedEmbeddingBagsCodegen]:
    """FBGEMM's modules inside a sharded model; each holds several of this rank's tables and their optimizer."""
    for module in model.modules():
        for lookup in getattr(module, "_lookups", ()):  # a plain list in TorchRec: modules() does not look into it
            yield from (part for part in lookup.modules() if isinstance(part, SplitTableBatchedEmbeddingBagsCodegen))


def set_steps_done(kernels: Iterable[SplitTableBatchedEmbeddingBagsCodegen], steps: int) -> None:
    """Say how many steps were done, on which the bias correction of Adam and LAMB depends, and lazy weight decay.

    FBGEMM counts forward passes, also those of a validation, and its count is in no state dict.
    """
    for kernel in kernels:
        kernel.iter.fill_(steps)  # FBGEMM's forward adds one, or our update
        kernel.iter_cpu.fill_(steps)


def clear_states(model: nn.Module) -> None:
    """Let the tables' optimizer begin again: all that it keeps is 0, as in a new run."""
    for kernel in table_kernels(model):
        for state in chain(*kernel.split_optimizer_states()):
            state.zero_()


def fill_accumulators(model: nn.Module, value: float) -> None:
    """Let the tables' sums of squares start from `value`; FBGEMM knows zero alone."""
    for kernel in table_kernels(model):
        for states in kernel.split_optimizer_states():
            states[0].fill_(value)
