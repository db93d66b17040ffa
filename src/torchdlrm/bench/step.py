"""The training step: ours, plain TorchRec's and the floor, interleaved in one process.

The floor is the matrix products of one step alone: every linear layer forward and backward and the interaction's
batched products, into buffers that are there already. No step can be faster without computing less.

B rows of the batch, F sparse features, D embedding dimension, N = F + 1 vectors that interact.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.models.dlrm import DLRM as TorchRecDLRM  # noqa: N811 - an acronym
from torchrec.models.dlrm import DLRMTrain as TorchRecDLRMTrain
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchdlrm.config import Config
from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.planner import PlanOptions, plan_sharding, table_sharder
from torchdlrm.sharding.topology import local_machine
from torchdlrm.train.optimizers import build_optimizer, fused_params
from torchdlrm.train.process_group import Ranks
from torchdlrm.train.sharded import build_sharded_model

NUM_DENSE = 13
NUM_DISTINCT_BATCHES = 16


@dataclass(frozen=True)
class StepBenchmark:
    """Rows per second (medians over rounds) and what they were measured on.

    Attributes:
        rows_per_s: ours.
        torchrec_rows_per_s: TorchRec's own DLRM, row-wise Adagrad, TrainPipelineSparseDist, float32.
        floor_rows_per_s: the step's matrix products alone.
        ratio_to_torchrec: the first over the second, median of the rounds' ratios.
        ratio_to_floor_time: our time over the floor's, median of the rounds' ratios.
        batch_size_global: rows per step.
        num_threads: of torch.
        rounds: how often each was measured.
    """

    rows_per_s: float
    torchrec_rows_per_s: float
    floor_rows_per_s: float
    ratio_to_torchrec: float
    ratio_to_floor_time: float
    batch_size_global: int
    num_threads: int
    rounds: int

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def benchmark_step(
    config: Config,
    *,
    num_embeddings: dict[str, int],
    steps_per_round: int,
    rounds: int,
    ranks: Ranks,
    progress: ProgressListener = SILENT,
) -> StepBenchmark:
    """Measure the training step on random batches that lie in memory.

    Args:
        config: model, optimizers and batch size.
        num_embeddings: rows of each feature's table.
        steps_per_round: steps of each contestant before the next has its turn.
        rounds: turns that count, after one that does not.
        ranks: one process.
        progress: is told of every turn.
    """
    batch_size = config.train.batch_size_global
    contestants: dict[str, Callable[[], object]] = {
        "ours": _our_step(config, num_embeddings, ranks),
        "torchrec": _torchrec_step(config, num_embeddings, ranks),
        "floor": _floor_step(config, len(num_embeddings), ranks.device),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    progress.start_phase("bench step", (rounds + 1) * len(contestants), unit="turns")
    for turn in range(rounds + 1):
        for name, step in contestants.items():
            elapsed_s = _time(step, steps_per_round, ranks.device)
            if turn > 0:  # the first warms up: allocator, pipeline, page faults
                seconds[name].append(elapsed_s)
            progress.advance(1)
    rows = batch_size * steps_per_round
    return StepBenchmark(
        rows_per_s=rows / statistics.median(seconds["ours"]),
        torchrec_rows_per_s=rows / statistics.median(seconds["torchrec"]),
        floor_rows_per_s=rows / statistics.median(seconds["floor"]),
        ratio_to_torchrec=statistics.median(map(_ratio, seconds["torchrec"], seconds["ours"])),
        ratio_to_floor_time=statistics.median(map(_ratio, seconds["ours"], seconds["floor"])),
        batch_size_global=batch_size,
        num_threads=torch.get_num_threads(),
        rounds=rounds,
    )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator


def _time(step: Callable[[], object], steps: int, device: torch.device) -> float:
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started_s


def _our_step(config: Config, num_embeddings: dict[str, int], ranks: Ranks) -> Callable[[], object]:
    model = build_sharded_model(
        config, num_embeddings=num_embeddings, num_dense_features=NUM_DENSE, dense_sample=None, ranks=ranks
    ).module
    optimizer = build_optimizer(model, config.dense_optimizer)
    pipeline = TrainPipelineSparseDist(model, optimizer, ranks.device, execute_all_batches=True)
    names = list(num_embeddings)
    batches = itertools.cycle(
        [
            Batch(torch.from_numpy(dense), single_valued_kjt(names, ids_FB), torch.from_numpy(labels_B))
            for dense, ids_FB, labels_B in _random_arrays(config.train.batch_size_global, num_embeddings)
        ]
    )
    return lambda: pipeline.progress(batches)


def _torchrec_step(config: Config, num_embeddings: dict[str, int], ranks: Ranks) -> Callable[[], object]:
    """TorchRec's own model, batch, sharder and pipeline, as its examples put them together."""
    tables = EmbeddingBagCollection(
        tables=[
            EmbeddingBagConfig(
                name=f"t_{name}", embedding_dim=config.model.embedding_dim, num_embeddings=rows, feature_names=[name]
            )
            for name, rows in num_embeddings.items()
        ],
        device=torch.device("meta"),
    )
    dlrm = TorchRecDLRM(
        tables,
        dense_in_features=NUM_DENSE,
        dense_arch_layer_sizes=list(config.model.dense_arch_layer_sizes),
        over_arch_layer_sizes=list(config.model.over_arch_layer_sizes),
        dense_device=ranks.device,
    )
    sharder = table_sharder(fused_params(config.table_optimizer))
    unsharded = TorchRecDLRMTrain(dlrm)
    plan = plan_sharding(
        unsharded,
        machine=local_machine(config.sharding, world_size=1, local_world_size=1, device=ranks.device),
        options=PlanOptions.of(config),
        sharders=[sharder],
        process_group=ranks.process_group,
    ).plan
    env = ShardingEnv.from_process_group(ranks.process_group)
    model = DistributedModelParallel(unsharded, env=env, device=ranks.device, plan=plan, sharders=[sharder])
    fused = model.fused_optimizer
    dense = {name: param for name, param in model.named_parameters() if name not in fused.params}
    dense_optimizer = KeyedOptimizerWrapper(
        dense, lambda params: torch.optim.Adagrad(params, lr=config.dense_optimizer.learning_rate)
    )
    pipeline = TrainPipelineSparseDist(
        model, CombinedOptimizer([fused, dense_optimizer]), ranks.device, execute_all_batches=True
    )
    batches = itertools.cycle(
        [
            TorchRecBatch(
                torch.from_numpy(dense),
                KeyedJaggedTensor.from_lengths_sync(
                    keys=list(num_embeddings),
                    values=torch.from_numpy(ids_FB).view(-1),
                    lengths=torch.ones(ids_FB.size, dtype=torch.int32),
                ),
                torch.from_numpy(labels_B),
            )
            for dense, ids_FB, labels_B in _random_arrays(config.train.batch_size_global, num_embeddings)
        ]
    )
    return lambda: pipeline.progress(batches)


def _random_arrays(
    num_rows: int, num_embeddings: dict[str, int]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """Dense float32 [B, 13], ids int64 [F, B] (uniform: the hardest case for the caches), labels float32 [B]."""
    generator = np.random.default_rng(0)
    for _ in range(NUM_DISTINCT_BATCHES):
        dense = generator.random((num_rows, NUM_DENSE), dtype=np.float32)
        ids_FB = np.stack([generator.integers(rows, size=num_rows) for rows in num_embeddings.values()])
        yield dense, ids_FB, generator.integers(2, size=num_rows).astype(np.float32)


def _floor_step(config: Config, num_features: int, device: torch.device) -> Callable[[], object]:
    """The matrix products of one step, and nothing else."""
    num_rows, dim = config.train.batch_size_global, config.model.embedding_dim
    num_vectors = num_features + 1
    over_in = dim + num_vectors * (num_vectors - 1) // 2
    products: list[Callable[[], object]] = []
    for sizes, input_needs_grad in (
        ([NUM_DENSE, *config.model.dense_arch_layer_sizes], False),
        ([over_in, *config.model.over_arch_layer_sizes], True),
    ):
        for index, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
            x, weight = torch.rand(num_rows, inputs, device=device), torch.rand(outputs, inputs, device=device)
            grad = torch.rand(num_rows, outputs, device=device)
            products.append(_product(x, weight.t()))
            products.append(_product(grad.t(), x))
            if index > 0 or input_needs_grad:
                products.append(_product(grad, weight))
    vectors_BND = torch.rand(num_rows, num_vectors, dim, device=device)
    square_BNN = torch.rand(num_rows, num_vectors, num_vectors, device=device)
    products.append(_product(vectors_BND, vectors_BND.transpose(1, 2)))
    products.append(_product(square_BNN, vectors_BND))

    def step() -> None:
        for product in products:
            product()

    return step


def _product(left: Tensor, right: Tensor) -> Callable[[], object]:
    out = torch.matmul(left, right)
    return lambda: torch.matmul(left, right, out=out)
