"""Builds the sharded model with its initial weights, and its optimizers."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, assert_never

import torch
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.nn.utils import clip_grad_norm_
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizer, KeyedOptimizerWrapper

from torchdlrm.config import Config, DenseOptimizerConfig, TableOptimizerConfig
from torchdlrm.errors import ConfigError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.build import build_model, standardize_dense_input
from torchdlrm.model.dropout import DroppedActivation
from torchdlrm.model.loss import DLRMTrain
from torchdlrm.sharding.layout import sharding_plan, tables_of
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.resolve import plan_of_training
from torchdlrm.sharding.solution import Solution
from torchdlrm.sharding.weights import initialize_tables
from torchdlrm.tables.collection import TrainingSharder
from torchdlrm.tables.optimizers import clear_states, fill_accumulators, fused_params, set_steps_done, table_kernels
from torchdlrm.training.compute import communication_codecs
from torchdlrm.training.freeze import frozen_parts
from torchdlrm.training.gradients_on_one_host import AddedUpOnOneHost
from torchdlrm.training.processes.process_group import Ranks


@dataclass(frozen=True)
class ShardedModel:
    """A `DLRMTrain` inside `DistributedModelParallel`, and what its sharding costs."""

    module: nn.Module
    solution: Solution


def build_sharded_model(
    config: Config,
    shape: ModelShape,
    *,
    dense_sample: Tensor | None,
    ranks: Ranks,
) -> ShardedModel:
    """Build, plan and shard the model, then give it initial weights that do not depend on the number of ranks.

    Seeds torch's random numbers with `config.seed`.

    Args:
        config: of the run; may name a plan to follow.
        shape: of the model.
        dense_sample: encoded dense features of some training rows, float32 [rows, num_dense], from which the dense
            arch learns the scale of its input; None leaves it as TorchRec initialises it.
        ranks: the processes that share the model.

    Raises:
        PlanError: the tables do not fit the machine, or the saved plan is for another model or number of ranks.
        ConfigError: `train.freeze` names what the model does not have, or all of it.
    """
    torch.manual_seed(config.seed)  # every rank draws the same dense and over arch
    train = config.train
    how = {"dropout": train.dropout, "negative_weight": train.negative_weight}
    model = build_model(shape, ranks.device, **how, loss_weights=train.loss_weights)
    if dense_sample is not None and shape.num_dense:
        standardize_dense_input(model.model, dense_sample)
    frozen = frozen_parts(config.train.freeze, model.model, shape.tables)
    # A single rank would reduce gradients with itself.
    reduces = (frozen.freeze_parameters(model.model) or bool([*model.loss.parameters()])) and ranks.world_size > 1
    sharded = _shard(model, config, shape, ranks, reduces=reduces, frozen=frozen.tables)
    trained: Any = sharded.module.module
    frozen.keep_in_evaluation(trained.model)
    begin_tables(sharded.module, config, shape)
    return sharded


def begin_tables(model: nn.Module, config: Config, shape: ModelShape, *, epoch: int = 0) -> None:
    """Give the tables of a sharded model initial rows, of each epoch others, and their optimizer its first state."""
    scale = config.model.table_init_scale
    initialize_tables(model, seed=config.seed, parts=shape.tables, scale=scale, epoch=epoch)
    if epoch:  # before the first, nothing is written to what may be large and is 0
        clear_states(model)
    if config.table_optimizer.initial_accumulator:
        fill_accumulators(model, config.table_optimizer.initial_accumulator)


def check_freeze(config: Config, shape: ModelShape, device: torch.device) -> None:
    """See that the model has what `train.freeze` names, and that it can be frozen on this device.

    Raises:
        ConfigError: it has not, or nothing is left to learn; or some tables are frozen on a GPU, and others are not.
    """
    if config.train.freeze or any(table.asked is not None and table.asked.frozen for table in shape.tables):
        model = build_model(shape, torch.device("meta")).model
        frozen = frozen_parts(config.train.freeze, model, shape.tables)
        if device.type == "cuda" and 0 < len(frozen.tables) < len({table.name for table in shape.tables}):
            raise ConfigError(
                f"train.freeze: on GPUs tables are frozen all together or not at all (FBGEMM), and this names "
                f"{', '.join(sorted(frozen.tables))}; freeze tables, all of them, or set train.device = cpu"
            )


def build_empty_model(config: Config, shape: ModelShape, *, ranks: Ranks) -> nn.Module:
    """Build, plan and shard a model into which weights are going to be loaded, in order to predict with it.

    It keeps no state of an optimizer, and what its ranks exchange is not rounded, whatever the config of its run says,
    whose `sharding` is for this machine.

    Raises:
        PlanError: the tables do not fit the machine, or `sharding.plan` is for another model or number of ranks.
    """
    config = config.model_copy(
        update={
            "table_optimizer": TableOptimizerConfig(name="sgd"),  # has no state, and a kernel on every device
            "train": config.train.model_copy(update={"communication": "float32"}),
        }
    )
    model = build_model(shape, ranks.device, loss_weights=config.train.loss_weights)
    return _shard(model, config, shape, ranks, reduces=False).module


def _shard(
    model: DLRMTrain,
    config: Config,
    shape: ModelShape,
    ranks: Ranks,
    *,
    reduces: bool,
    frozen: Collection[str] = (),
) -> ShardedModel:
    """Give each rank its part of the tables, not initialised yet; no step changes those in `frozen`.

    With `reduces`, the gradients of all parameters but the tables are averaged over the ranks.
    """
    machine = local_machine(
        config.sharding,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device=ranks.device,
        all_gather=ranks.all_gather,
    )
    solution = plan_of_training(config, shape, tables_of(model), machine, ranks.process_group)
    codecs = communication_codecs(config.train, ranks.device)
    module = DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(ranks.process_group),
        device=ranks.device,
        plan=sharding_plan(solution.layout, model, machine),
        init_data_parallel=reduces,
        sharders=[TrainingSharder(fused_params(config.table_optimizer), codecs, ranks, frozen)],
        data_parallel_wrapper=AddedUpOnOneHost(ranks) if ranks.device.type == "cpu" and ranks.world_size == 2 else None,
    )
    ranks.set_timeout_of_host_groups()
    return ShardedModel(module, solution)


def build_optimizer(model: nn.Module, config: DenseOptimizerConfig) -> CombinedOptimizer:
    """The tables' fused optimizer and one of `config` for all other parameters, as one with names for its state."""
    fused: KeyedOptimizer = model.fused_optimizer
    # Not "what the fused optimizer lacks": it has this rank's tables alone, and a column-wise table has a parameter
    # on every rank.
    tables = {name for name, value in model.state_dict().items() if isinstance(value, ShardedTensor)}
    dense = {name: param for name, param in model.named_parameters() if name not in tables}
    wrapped = KeyedOptimizerWrapper(dense, partial(dense_optimizer, config))
    return CombinedOptimizer([("tables", fused), ("dense", wrapped)])


def dense_optimizer(config: DenseOptimizerConfig, params: Sequence[Tensor]) -> torch.optim.Optimizer:
    """An optimizer of torch, its state in place before the first step: a checkpoint is loaded into it."""
    # fused: one pass over parameter, gradient and state instead of one for each operation.
    shared: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "fused": True}
    optimizer: torch.optim.Optimizer
    if config.name == "adagrad":
        optimizer = torch.optim.Adagrad(
            params, eps=config.eps, initial_accumulator_value=config.initial_accumulator, **shared
        )
    elif config.name == "adamw":
        optimizer = torch.optim.AdamW(params, betas=(config.beta1, config.beta2), eps=config.eps, **shared)
        for param in params:
            optimizer.state[param] = {
                "step": torch.zeros((), device=param.device),  # where the fused kernel counts it
                "exp_avg": torch.zeros_like(param),
                "exp_avg_sq": torch.zeros_like(param),
            }
    elif config.name == "sgd":
        optimizer = torch.optim.SGD(params, momentum=config.momentum, **shared)
        if config.momentum:
            for param in params:
                optimizer.state[param] = {"momentum_buffer": torch.zeros_like(param)}
    else:
        assert_never(config.name)
    limit = config.clip_norm
    if limit is not None:

        def clip(*_: object) -> None:
            # Every rank has the mean gradient already, so this norm is that of the global batch.
            clip_grad_norm_(params, limit)

        optimizer.register_step_pre_hook(clip)
    return optimizer


class StepCounters:
    """Gives FBGEMM's tables and the dropout layers the current step, so that a resumed run counts as if uninterrupted.

    Dropout draws its random numbers from seed, step and rank, so that no checkpoint needs to hold the state of a
    generator.
    """

    def __init__(self, model: nn.Module, *, seed: int, rank: int) -> None:
        self._kernels = list(table_kernels(model))
        self._dropped = [module for module in model.modules() if isinstance(module, DroppedActivation)]
        self._seed, self._rank = seed, rank

    def begin(self, step: int, steps_before: int = 0) -> None:
        """Step `step` (from 1) comes next; the tables had done `steps_before` before the run's first."""
        set_steps_done(self._kernels, steps_before + step - 1)
        for module in self._dropped:
            module.drawn_from = (self._seed, step, self._rank)
