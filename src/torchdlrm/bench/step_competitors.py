"""The competitors of the benchmark of the step: ours, the same with a few rows, plain TorchRec's, and the floor.

In: what a training would be given.  Out: a function that does one step, on random batches that lie in memory.

The floor is the matrix products of one step alone, as the model's architecture names them: every linear layer forward
and backward and the interaction's batched products, into buffers that are there already. No step can be faster without
computing less.
"""

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.models.dlrm import DLRMTrain as TorchRecDLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchdlrm.bench.interleaved import Step
from torchdlrm.bench.upstream import random_batches, torchrec_dlrm, torchrec_kjt
from torchdlrm.config import Config
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.loss import DLRMTrain
from torchdlrm.model.model_class import architecture_of
from torchdlrm.sharding.planner import PlanOptions, plan_sharding, table_sharder
from torchdlrm.sharding.topology import local_machine
from torchdlrm.tables.optimizers import fused_params
from torchdlrm.training.compute import allow_tf32, keep_freed_memory, set_threads
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

_FEW_ROWS = 16  # a rank, to measure what the host does


def shape_of(config: Config, num_embeddings: dict[str, int], model_class: str | None = None) -> ModelShape:
    """The model that is measured: Criteo's dense features, and a feature for each table."""
    architecture = architecture_of(config.model, model_class)
    features = tuple(num_embeddings.items())
    return ModelShape(config.model, NUM_CRITEO_DENSE, len(features), architecture, num_embeddings=features)


def our_step(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype, model_class: str | None = None
) -> Step:
    """What `dlrm train` does in a step, on random batches."""
    pipeline, names = our_pipeline(ranks, config, num_embeddings, dtype, model_class), list(num_embeddings)
    batches = [
        Batch(torch.from_numpy(dense), single_valued_kjt(names, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in random_batches(ranks, config, num_embeddings)
    ]
    return steps_of(pipeline, batches, ranks)


def our_pipeline(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype, model_class: str | None = None
) -> TrainPipelineSparseDist:
    """What `dlrm train` gives its batches to."""
    shape = shape_of(config, num_embeddings, model_class)
    keep_freed_memory()
    set_threads(config, shape, ranks)
    allow_tf32(config.train, ranks.device)
    sharded = build_sharded_model(config, shape, num_embeddings=num_embeddings, dense_sample=None, ranks=ranks)
    optimizer = build_optimizer(sharded.module, config.dense_optimizer)
    return build_pipeline(sharded.module, optimizer, dtype=dtype, ranks=ranks, frozen=sharded.frozen_tables)


def host_step(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype, model_class: str | None = None
) -> Step:
    """Our step with hardly anything to compute, on as many threads as if there were all rows."""
    set_threads(config, shape_of(config, num_embeddings, model_class), ranks)
    few = {"batch_size_global": _FEW_ROWS * ranks.world_size, "num_threads": torch.get_num_threads()}
    config = config.model_copy(update={"train": config.train.model_copy(update=few)})
    return our_step(ranks, config, dict.fromkeys(num_embeddings, 100), dtype, model_class)


def torchrec_step(ranks: Ranks, config: Config, num_embeddings: dict[str, int], model_class: str | None = None) -> Step:
    """A step of plain TorchRec on random batches of its own kind."""
    pipeline = torchrec_pipeline(ranks, config, num_embeddings, model_class)
    batches = [
        TorchRecBatch(torch.from_numpy(dense), torchrec_kjt(num_embeddings, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in random_batches(ranks, config, num_embeddings)
    ]
    return steps_of(pipeline, batches, ranks)


def torchrec_pipeline(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int], model_class: str | None = None
) -> TrainPipelineSparseDist:
    """TorchRec's own model, sharder and pipeline, as its examples put them together; a model class has its own loss."""
    allow_tf32(config.train, ranks.device)
    shape = shape_of(config, num_embeddings, model_class)
    dlrm = torchrec_dlrm(shape, num_embeddings, tables=torch.device("meta"), dense=ranks.device)
    params = fused_params(config.table_optimizer)
    del params["bounds_check_mode"]  # FBGEMM's own check of ids is on in TorchRec's examples
    sharder = table_sharder(params)
    unsharded = TorchRecDLRMTrain(dlrm) if model_class is None else DLRMTrain(dlrm)
    plan = plan_sharding(
        unsharded,
        machine=local_machine(
            config.sharding,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            device=ranks.device,
            all_gather=ranks.all_gather,
        ),
        options=PlanOptions.of(config),
        process_group=ranks.process_group,
    ).plan
    env = ShardingEnv.from_process_group(ranks.process_group)
    model = DistributedModelParallel(unsharded, env=env, device=ranks.device, plan=plan, sharders=[sharder])
    fused = model.fused_optimizer
    dense = {name: param for name, param in model.named_parameters() if name not in fused.params}
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda params: torch.optim.Adagrad(params, lr=config.dense_optimizer.learning_rate)
    )
    return TrainPipelineSparseDist(
        model, CombinedOptimizer([fused, dense_optimizer]), ranks.device, execute_all_batches=True
    )


def steps_of(pipeline: TrainPipelineSparseDist, batches: list[TorchRecBatch], ranks: Ranks) -> Step:
    """Step through the batches again and again, from page-locked memory where a GPU fetches them."""
    if ranks.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    endless = itertools.cycle(batches)
    return lambda: pipeline.progress(endless)


def floor_step(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype, model_class: str | None = None
) -> Step:
    """The matrix products of one step, and nothing else."""
    keep_freed_memory()
    allow_tf32(config.train, ranks.device)
    num_rows = config.train.batch_size_global // ranks.world_size

    def some(*sizes: int) -> Tensor:
        return torch.rand(sizes, device=ranks.device, dtype=dtype)

    products: list[Callable[[], object]] = []
    for product in shape_of(config, num_embeddings, model_class).products:
        rows, inputs, outputs = product.rows, product.inputs, product.outputs
        if product.has_weight:
            left, right, grad = some(num_rows * rows, inputs), some(outputs, inputs).t(), some(num_rows * rows, outputs)
            gradients = [(grad.t(), left), (grad, right.t())]
        else:
            left, grad = some(num_rows, rows, inputs), some(num_rows, rows, outputs)
            right = left.transpose(1, 2) if rows == outputs else some(num_rows, inputs, outputs)
            gradients = [(grad, right.transpose(1, 2)), (left.transpose(1, 2), grad)]
        products += [_product(*factors) for factors in [(left, right), *gradients[: product.num_gradients]]]

    def step() -> None:
        for product in products:
            product()

    return step


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    out = torch.matmul(left, right)
    return lambda: torch.matmul(left, right, out=out)
