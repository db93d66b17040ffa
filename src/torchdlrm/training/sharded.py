"""Config and dataset -> the sharded model with its initial weights: the same for training and for evaluation."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.types import ShardingEnv, ShardingPlan

from torchdlrm.config import Config
from torchdlrm.model.build import build_model, standardize_dense_input
from torchdlrm.model.dropout import add_dropout
from torchdlrm.sharding.planner import table_sharder
from torchdlrm.sharding.problem import Solution
from torchdlrm.sharding.resolve import load_or_make_plan
from torchdlrm.sharding.topology import local_machine
from torchdlrm.sharding.weights import initialize_tables
from torchdlrm.tables.optimizers import fill_accumulators, fused_params
from torchdlrm.training.communication import communication_codecs
from torchdlrm.training.process_group import Ranks


@dataclass(frozen=True)
class ShardedModel:
    """A `DLRMTrain` inside `DistributedModelParallel`, and the plan that it follows, with what it costs."""

    module: nn.Module
    plan: ShardingPlan
    solution: Solution


def build_sharded_model(
    config: Config,
    *,
    num_embeddings: Mapping[str, int],
    num_dense_features: int,
    dense_sample: Tensor | None,
    ranks: Ranks,
    saved_plan: Path | None = None,
) -> ShardedModel:
    """Build, plan and shard the model, then give it initial weights that do not depend on the number of ranks.

    Args:
        config: of the run.
        num_embeddings: rows of each feature's table, in schema order.
        num_dense_features: number of dense features.
        dense_sample: encoded dense features of some training rows, float32 [rows, num_dense_features], from which
            the dense arch learns the scale of its input; None leaves it as TorchRec initialises it.
        ranks: the processes that share the model.
        saved_plan: a plan.json to obey; planned anew when None.

    Raises:
        PlanError: the tables do not fit the machine, or the saved plan is for another model or number of ranks.
    """
    torch.manual_seed(config.seed)  # every rank draws the same dense and over arch
    model = build_model(
        config.model, num_dense_features=num_dense_features, num_embeddings=num_embeddings, device=ranks.device
    )
    model.negative_weight = config.train.negative_weight
    if config.train.dropout:
        add_dropout(model.model.dense_arch, model.model.over_arch, config.train.dropout)
    if dense_sample is not None and num_dense_features:
        standardize_dense_input(model.model.dense_arch, dense_sample)
    sharder = table_sharder(fused_params(config.table_optimizer))
    plan, solution = load_or_make_plan(
        model,
        config,
        machine=local_machine(
            config.sharding,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            device=ranks.device,
        ),
        sharders=[sharder],
        process_group=ranks.process_group,
        saved_plan=saved_plan,
    )
    module = DistributedModelParallel(
        module=model,
        env=ShardingEnv.from_process_group(ranks.process_group),
        device=ranks.device,
        plan=plan,
        init_data_parallel=ranks.world_size > 1,  # a single rank would reduce gradients with itself
        # Not the planner's: `dlrm plan`, which knows no codecs, must find the plan that training uses.
        sharders=[
            table_sharder(fused_params(config.table_optimizer), communication_codecs(config.train, ranks.device))
        ],
    )
    initialize_tables(module, seed=config.seed)
    if config.table_optimizer.initial_accumulator:
        fill_accumulators(module, config.table_optimizer.initial_accumulator)
    return ShardedModel(module, plan, solution)
