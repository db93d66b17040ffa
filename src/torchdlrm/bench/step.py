"""Measures the training step: ours, plain TorchRec's, the floor, and what a step takes of the host.

The floor is the matrix products of one step alone, as the model's architecture names them: every linear layer forward
and backward and the interaction's batched products, into buffers that are there already. No step can be faster without
computing less. What the host takes is measured by our step on so few rows that there is hardly anything to compute.

On CPU all are interleaved. On GPUs each is built when the one before has ended: the tables of one may fill the memory.

B rows of the batch, F sparse features.
"""

import itertools
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from operator import truediv
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch as TorchRecBatch
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.distributed.types import ShardingEnv
from torchrec.models.dlrm import DLRMTrain as TorchRecDLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper

from torchdlrm.bench.interleaved import Competitor, Step, take_turns
from torchdlrm.bench.upstream import random_rows, torchrec_dlrm, torchrec_kjt
from torchdlrm.config import Config
from torchdlrm.features.schema import NUM_CRITEO_DENSE
from torchdlrm.loader.batch import Batch, single_valued_kjt
from torchdlrm.model.architecture import ModelShape
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.planner import PlanOptions, plan_sharding, table_sharder
from torchdlrm.sharding.topology import local_machine
from torchdlrm.tables.optimizers import check_plain_torchrec, fused_params
from torchdlrm.training.compute import allow_tf32, choose_precision, keep_freed_memory
from torchdlrm.training.pipeline import build_pipeline
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.sharded import build_optimizer, build_sharded_model

_FEW_ROWS = 16  # a rank, to measure what the host does


@dataclass(frozen=True)
class StepBenchmark:
    """Rows per second (medians over rounds) and what they were measured on.

    Attributes:
        rows_per_s: ours.
        torchrec_rows_per_s: TorchRec's own DLRM, row-wise Adagrad, TrainPipelineSparseDist, float32.
        floor_rows_per_s: the step's matrix products alone, in the precision of ours.
        ratio_to_torchrec: the first over the second, median of the rounds' ratios.
        ratio_to_floor_time: our time over the floor's, median of the rounds' ratios.
        host_ms: of our step whatever its rows, median over rounds: Python, launches of kernels, waits for them.
        batch_size_global: rows per step.
        precision: of ours and of the floor, and why; products that stay float32 are TF32 on GPUs where `train.tf32`
            says so, of all three.
        num_processes: of each competitor.
        num_threads: of torch in each process.
        rounds: how often each was measured.
    """

    rows_per_s: float
    torchrec_rows_per_s: float
    floor_rows_per_s: float
    ratio_to_torchrec: float
    ratio_to_floor_time: float
    host_ms: float
    batch_size_global: int
    precision: str
    num_processes: int
    num_threads: int
    rounds: int


def benchmark_step(
    config: Config,
    *,
    num_embeddings: dict[str, int],
    steps_per_round: int,
    rounds: int,
    nproc: int = 1,
    progress: ProgressListener = SILENT,
) -> StepBenchmark:
    """Measure the training step on random batches that lie in memory, with the arguments of `dlrm bench step`.

    One round more is run than counts: the first warms up.
    """
    choice = config.train.device
    device = rank_device(0, nproc, choice)
    check_plain_torchrec(config.table_optimizer, device)
    precision = choose_precision(config, _shape(config, num_embeddings), device)
    few_rows = config.train.model_copy(update={"batch_size_global": _FEW_ROWS * nproc})
    small_tables = dict.fromkeys(num_embeddings, 100)
    start = {
        "ours": partial(Competitor, our_step, config, num_embeddings, precision.dtype),
        "torchrec": partial(Competitor, torchrec_step, config, num_embeddings),
        "floor": partial(Competitor, floor_step, config, num_embeddings, precision.dtype),
        "host": partial(
            Competitor, our_step, config.model_copy(update={"train": few_rows}), small_tables, precision.dtype
        ),
    }
    seconds: dict[str, list[float]] = {}
    for names in [[name] for name in start] if device.type == "cuda" else [list(start)]:
        competitors = {name: start[name](nproc=nproc, device=choice) for name in names}
        steps = dict.fromkeys(names, steps_per_round)
        seconds |= take_turns("bench step", competitors, steps, rounds, progress)
    rows = config.train.batch_size_global * steps_per_round
    return StepBenchmark(
        rows_per_s=rows / statistics.median(seconds["ours"]),
        torchrec_rows_per_s=rows / statistics.median(seconds["torchrec"]),
        floor_rows_per_s=rows / statistics.median(seconds["floor"]),
        ratio_to_torchrec=statistics.median(map(truediv, seconds["torchrec"], seconds["ours"])),
        ratio_to_floor_time=statistics.median(map(truediv, seconds["ours"], seconds["floor"])),
        host_ms=1000 * statistics.median(seconds["host"]) / steps_per_round,
        batch_size_global=config.train.batch_size_global,
        precision=str(precision),
        num_processes=nproc,
        num_threads=max(1, len(os.sched_getaffinity(0)) // nproc),
        rounds=rounds,
    )


def _shape(config: Config, num_embeddings: dict[str, int]) -> ModelShape:
    return ModelShape(config.model, NUM_CRITEO_DENSE, len(num_embeddings))


def our_step(ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype) -> Step:
    """What `dlrm train` does in a step."""
    keep_freed_memory()
    allow_tf32(config.train, ranks.device)
    model = build_sharded_model(
        config, _shape(config, num_embeddings), num_embeddings=num_embeddings, dense_sample=None, ranks=ranks
    ).module
    optimizer = build_optimizer(model, config.dense_optimizer)
    pipeline = build_pipeline(model, optimizer, dtype=dtype, device=ranks.device)
    names = list(num_embeddings)
    batches = [
        Batch(torch.from_numpy(dense), single_valued_kjt(names, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in _random_arrays(ranks, config, num_embeddings)
    ]
    return _steps_of(pipeline, batches, ranks)


def torchrec_step(ranks: Ranks, config: Config, num_embeddings: dict[str, int]) -> Step:
    """TorchRec's own model, batch, sharder and pipeline, as its examples put them together."""
    allow_tf32(config.train, ranks.device)
    dlrm = torchrec_dlrm(
        _shape(config, num_embeddings), num_embeddings, tables=torch.device("meta"), dense=ranks.device
    )
    params = fused_params(config.table_optimizer)
    del params["bounds_check_mode"]  # FBGEMM's own check of ids is on in TorchRec's examples
    sharder = table_sharder(params)
    unsharded = TorchRecDLRMTrain(dlrm)
    plan = plan_sharding(
        unsharded,
        machine=local_machine(
            config.sharding,
            world_size=ranks.world_size,
            local_world_size=ranks.local_world_size,
            device=ranks.device,
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
    pipeline = TrainPipelineSparseDist(
        model, CombinedOptimizer([fused, dense_optimizer]), ranks.device, execute_all_batches=True
    )
    batches = [
        TorchRecBatch(torch.from_numpy(dense), torchrec_kjt(num_embeddings, ids_FB), torch.from_numpy(labels_B))
        for dense, ids_FB, labels_B in _random_arrays(ranks, config, num_embeddings)
    ]
    return _steps_of(pipeline, batches, ranks)


def _steps_of(pipeline: TrainPipelineSparseDist, batches: list[TorchRecBatch], ranks: Ranks) -> Step:
    """Step through the batches again and again, from page-locked memory where a GPU fetches them."""
    if ranks.device.type == "cuda":
        batches = [batch.pin_memory() for batch in batches]
    endless = itertools.cycle(batches)
    return lambda: pipeline.progress(endless)


def _random_arrays(
    ranks: Ranks, config: Config, num_embeddings: dict[str, int]
) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    """This rank's part of each batch: dense [B, 13] and ids [F, B] as `random_rows` gives them, labels float32 [B]."""
    num_rows, generator = config.train.batch_size_global // ranks.world_size, np.random.default_rng(ranks.rank)
    for dense, ids_FB in random_rows(num_embeddings.values(), num_rows, generator, np.int64):
        yield dense, ids_FB, generator.integers(2, size=num_rows).astype(np.float32)


def floor_step(ranks: Ranks, config: Config, num_embeddings: dict[str, int], dtype: torch.dtype) -> Step:
    """The matrix products of one step, and nothing else."""
    keep_freed_memory()
    allow_tf32(config.train, ranks.device)
    num_rows = config.train.batch_size_global // ranks.world_size

    def some(*sizes: int) -> Tensor:
        return torch.rand(sizes, device=ranks.device, dtype=dtype)

    products: list[Callable[[], object]] = []
    for product in _shape(config, num_embeddings).products:
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
