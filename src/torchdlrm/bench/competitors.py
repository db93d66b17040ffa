"""The competitors of the benchmarks: ours, ours with a few rows, TorchRec's own, and the floor; and their random rows.

In: a case, which is what a training would be given.  Out: a function that does one step, on random batches that lie in
memory.

The floor is the matrix products of one step alone, as the model's architecture names them: every linear layer forward
and backward and the interaction's batched products, into buffers that are there already. No step can be faster without
computing less.

B rows of a batch, F sparse features.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.models import dlrm
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.bench.interleaved import Step
from torchdlrm.config import Config, ModelConfig
from torchdlrm.errors import ConfigError
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.features.tables import features_of_sizes, table_name
from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.model.architecture import BuiltInArchitecture, ModelShape
from torchdlrm.model.loss import DLRMTrain
from torchdlrm.model.model_class import architecture_of
from torchdlrm.sharding.layout import sharding_plan, tables_of
from torchdlrm.sharding.local_machine import local_machine
from torchdlrm.sharding.planner import TableSharder
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import solve
from torchdlrm.tables.optimizers import fused_params
from torchdlrm.training.compute import allow_tf32, keep_freed_memory, set_threads
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

_NUM_BATCHES = 16
_FEW_ROWS = 16  # a rank, to measure what the host does


@dataclass(frozen=True)
class Case:
    """A training without its data.

    Attributes:
        config: of the training.
        num_embeddings: rows of each table, by feature; there are Criteo's dense features beside them.
        model_class: a model of the user's own, FILE.py:NAME or MODULE:NAME.
        dtype: in which our dense parts compute, and the floor.
    """

    config: Config
    num_embeddings: dict[str, int]
    model_class: str | None = None
    dtype: torch.dtype = torch.float32

    @property
    def shape(self) -> ModelShape:
        """Of the model."""
        config, features = self.config.model, features_of_sizes(self.num_embeddings)
        architecture = architecture_of(config, self.model_class)
        if architecture.tables(features):
            raise ConfigError("`model_class`: asks for tables of its own, which no batch of this benchmark has")
        return ModelShape(config, NUM_CRITEO_DENSE, len(features), architecture, known_features=features)


def our_step(ranks: Ranks, case: Case) -> Step:
    """What `dlrm train` does in a step, on random batches."""
    names = list(case.num_embeddings)
    batches = [
        Batch(torch.from_numpy(dense), single_valued_kjt(names, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in random_batches(ranks, case)
    ]
    return steps_of(our_pipeline(ranks, case), batches, ranks)


def our_pipeline(ranks: Ranks, case: Case) -> TrainPipelineSparseDist:
    """What `dlrm train` gives its batches to."""
    config, shape = case.config, case.shape
    keep_freed_memory()
    set_threads(config, shape, ranks)
    allow_tf32(config.train, ranks.device)
    sharded = build_sharded_model(config, shape, dense_sample=None, ranks=ranks)
    optimizer = build_optimizer(sharded.module, config.dense_optimizer)
    return build_pipeline(sharded.module, optimizer, dtype=case.dtype, ranks=ranks)


def host_step(ranks: Ranks, case: Case) -> Step:
    """Our step with hardly anything to compute, on as many threads as if there were all rows."""
    set_threads(case.config, case.shape, ranks)
    few = {"batch_size_global": _FEW_ROWS * ranks.world_size, "num_threads": torch.get_num_threads()}
    config = case.config.model_copy(update={"train": case.config.train.model_copy(update=few)})
    return our_step(ranks, replace(case, config=config, num_embeddings=dict.fromkeys(case.num_embeddings, 100)))


def torchrec_step(ranks: Ranks, case: Case) -> Step:
    """A step of plain TorchRec on random batches of its own kind."""
    batches = [
        TorchRecBatch(torch.from_numpy(dense), torchrec_kjt(case.num_embeddings, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in random_batches(ranks, case)
    ]
    return steps_of(torchrec_pipeline(ranks, case), batches, ranks)


def torchrec_pipeline(ranks: Ranks, case: Case) -> TrainPipelineSparseDist:
    """TorchRec's own model, sharder and pipeline, as its examples put them together; a model class has its own loss."""
    config = case.config
    allow_tf32(config.train, ranks.device)
    model = torchrec_dlrm(case.shape, case.num_embeddings, tables=torch.device("meta"), dense=ranks.device)
    params = fused_params(config.table_optimizer)
    del params["bounds_check_mode"]  # FBGEMM's own check of ids is on in TorchRec's examples
    unsharded = dlrm.DLRMTrain(model) if case.model_class is None else DLRMTrain(model)
    machine = local_machine(
        config.sharding,
        world_size=ranks.world_size,
        local_world_size=ranks.local_world_size,
        device=ranks.device,
        all_gather=ranks.all_gather,
    )
    group = ranks.process_group
    layout = solve(Problem.of(config, tables_of(unsharded), machine, case.shape), group).layout
    sharded = DistributedModelParallel(
        unsharded,
        env=ShardingEnv.from_process_group(group),
        device=ranks.device,
        plan=sharding_plan(layout, unsharded, machine),
        sharders=[TableSharder(params)],
    )
    fused = sharded.fused_optimizer
    dense = {name: param for name, param in sharded.named_parameters() if name not in fused.params}
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda params: torch.optim.Adagrad(params, lr=config.dense_optimizer.learning_rate)
    )
    optimizer = CombinedOptimizer([fused, dense_optimizer])
    return TrainPipelineSparseDist(sharded, optimizer, ranks.device, execute_all_batches=True)


def steps_of(pipeline: TrainPipelineSparseDist, batches: list[TorchRecBatch], ranks: Ranks) -> Step:
    """Step through the batches again and again, from page-locked memory where a GPU fetches them."""
    if ranks.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    endless = itertools.cycle(batches)
    return lambda: pipeline.progress(endless)


def floor_step(ranks: Ranks, case: Case) -> Step:
    """The matrix products of one step, and nothing else."""
    keep_freed_memory()
    allow_tf32(case.config.train, ranks.device)
    num_rows = case.config.train.batch_size_global // ranks.world_size

    def some(*sizes: int) -> Tensor:
        return torch.rand(sizes, device=ranks.device, dtype=case.dtype)

    products: list[Callable[[], object]] = []
    for product in case.shape.products:
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


def random_rows(
    num_embeddings: Iterable[int], num_rows: int, generator: np.random.Generator, id_type: type[np.integer[Any]]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """16 batches: dense float32 [B, 13] and ids [F, B], uniform over the tables, the hardest case for the caches."""
    sizes = list(num_embeddings)
    for _ in range(_NUM_BATCHES):
        dense = generator.random((num_rows, NUM_CRITEO_DENSE), dtype=np.float32)
        yield dense, np.stack([generator.integers(rows, size=num_rows, dtype=id_type) for rows in sizes])


def random_batches(
    ranks: Ranks, case: Case
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """This rank's part of each batch: dense [B, 13] and ids [F, B] as `random_rows` gives them, labels float32 [B]."""
    num_rows, generator = case.config.train.batch_size_global // ranks.world_size, np.random.default_rng(ranks.rank)
    for dense, ids_FB in random_rows(case.num_embeddings.values(), num_rows, generator, np.int64):
        yield dense, ids_FB, generator.integers(2, size=num_rows).astype(np.float32)


def check_torchrec_has(config: ModelConfig) -> None:
    """Refuse to compare a model with TorchRec's own that has no such thing.

    Raises:
        ConfigError: the cross net has gates, or tables are smaller.
    """
    if config.features:
        msg = "model.features: TorchRec's own model, which this is compared with, has no smaller tables; leave them out"
        raise ConfigError(msg)
    if config.dcn.gated:
        msg = "model.dcn.gated: TorchRec's DLRM_DCN, which this is compared with, has no gates; leave the setting out"
        raise ConfigError(msg)


def torchrec_dlrm(
    shape: ModelShape, num_embeddings: Mapping[str, int], *, tables: torch.device, dense: torch.device
) -> Any:
    """TorchRec's class of this architecture with random weights, its tables on one device and all else on another.

    A model class of the user's own is itself, on TorchRec's tables.
    """
    configs = [
        EmbeddingBagConfig(
            name=table_name(feature),
            embedding_dim=shape.config.embedding_dim,
            num_embeddings=rows,
            feature_names=[feature],
        )
        for feature, rows in num_embeddings.items()
    ]
    architecture, collection = shape.architecture, EmbeddingBagCollection(tables=configs, device=tables)
    if not isinstance(architecture, BuiltInArchitecture):
        return architecture.build(shape, collection, dense)
    model = getattr(dlrm, architecture.class_name)(collection, **shape.arguments, dense_device=dense)
    model.inter_arch.to(dense)  # TorchRec leaves the cross net on the CPU
    return model


def torchrec_kjt(features: Iterable[str], ids_FB: Any) -> KeyedJaggedTensor:
    """One id of each feature a row, as TorchRec's examples make it; `ids_FB` is an array of integers [F, B]."""
    return KeyedJaggedTensor.from_lengths_sync(
        keys=list(features),
        values=torch.from_numpy(ids_FB).view(-1),
        lengths=torch.ones(ids_FB.size, dtype=torch.int32),
    )
