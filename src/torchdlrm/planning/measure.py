"""Measures how fast this machine looks up, exchanges and multiplies, by the code that trains.

Every rank times its own part at the same time as the others, as in training, so that they share the host's cores and
memory as they will then: with the kernels, the precision and the optimizers of the training. In come the problem and
the ranks; out come rates in TorchRec's terms and the time of the dense parts.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial

import torch
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
from fbgemm_gpu.split_table_batched_embeddings_ops_training import ComputeDevice, SplitTableBatchedEmbeddingBagsCodegen
from torch import distributed as dist
from torch import nn

from torchdlrm.config import Config
from torchdlrm.errors import PlanError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.eager import EagerModel
from torchdlrm.sharding.layout import PlacedShard, PlacedTable
from torchdlrm.sharding.machine import device_of_gpu
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import shard_costs
from torchdlrm.sharding.tables import Table
from torchdlrm.shared_memory import FIRST_FREE_BYTE, SharedMemory
from torchdlrm.tables.collection import TablesOfRank
from torchdlrm.tables.optimizers import fused_params
from torchdlrm.training.compute import allow_tf32, choose_precision, keep_freed_memory, set_threads
from torchdlrm.training.gradients_on_one_host import SharedSum
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import Ranks, join_process_group
from torchdlrm.training.sharded import dense_optimizer

_WEIGHTS_LIMIT_BYTES = 2 * 10**9
_ROUNDS = 9
_Precision = Callable[[], AbstractContextManager[object]]  # inside, the forward computes as in training


@dataclass(frozen=True)
class Measurement:
    """What was measured, on the slowest rank.

    Attributes:
        lookup_forward_ms: of all tables of a rank.
        lookup_backward_ms: of the same, with the update.
        memory_bytes_per_s: the rate at which TorchRec's estimate of that forward comes true. It is no bandwidth of the
            hardware: the estimate has penalties for narrow rows that were found on GPUs.
        exchange_ms: an exchange of the embeddings of a step, in one direction.
        exchange_bytes: that each rank takes part with.
        dense_ms: dense arch, interaction and over arch with their update.
        all_reduce_ms: of the dense parts' gradients.
    """

    lookup_forward_ms: float
    lookup_backward_ms: float
    memory_bytes_per_s: float
    exchange_ms: float
    exchange_bytes: float
    dense_ms: float
    all_reduce_ms: float

    def apply(self, problem: Problem) -> Problem:
        """The problem with the machine's own rates in place of peak ones."""
        machine = replace(
            problem.machine,
            memory_bytes_per_s=self.memory_bytes_per_s,
            backward_multiplier=self.lookup_backward_ms / self.lookup_forward_ms,
            intra_host_bytes_per_s=1000 * self.exchange_bytes / self.exchange_ms,
            source="measured on this machine",
        )
        measured = replace(problem.dense, compute_ms=self.dense_ms, all_reduce_ms=self.all_reduce_ms)
        return replace(problem, machine=machine, measured=measured)


def measured(problem: Problem, config: Config) -> tuple[Problem, Measurement]:
    """Return the problem with this machine's own rates, timed in as many processes as the plan has ranks.

    Raises:
        PlanError: the plan is for another machine than this one.
    """
    devices = {"cpu", "here"}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        devices.add(device_of_gpu(properties.name, properties.total_memory).device)
    if problem.machine.num_hosts != 1 or problem.machine.device not in devices:
        msg = f"`measure`: times this machine, not {problem.machine.device}; give here as `device`, and one host"
        raise PlanError(msg)
    found: Measurement = launch(_measure_rank, problem, config, processes=Processes(problem.machine.num_devices))
    return found.apply(problem), found


def _measure_rank(problem: Problem, config: Config) -> Measurement:
    with join_process_group(device="cuda" if problem.machine.kind == "cuda" else "cpu") as ranks:
        keep_freed_memory()
        set_threads(config, problem.shape, ranks)
        allow_tf32(config.train, ranks.device)
        return measure(problem, config, ranks)


def measure(problem: Problem, config: Config, ranks: Ranks) -> Measurement:
    """Time this rank, which computes as in training already; every rank must call this at the same time.

    Args:
        problem: whose tables, batch and dense parts are timed.
        config: of the training.
        ranks: the processes that would train.
    """
    device, world_size = ranks.device, ranks.world_size
    dtype = choose_precision(config, problem.shape, device).dtype
    rows = problem.batch_size_per_rank
    mine = list(problem.tables)[ranks.rank :: world_size] or list(problem.tables)[:1]
    # Entered again in each step, as in training: it keeps the weights that it has cast until it is left.
    precision = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    forward_ms, backward_ms = _time_lookups(mine, rows * world_size, config, device, precision)
    dense_ms, dense_bytes = _time_dense(problem.shape, config, rows, device, precision)
    rate = torch.tensor(problem.machine.memory_bytes_per_s * _estimated_forward_ms(problem, mine) / forward_ms)
    dist.all_reduce(rate, op=dist.ReduceOp.MIN)
    # Of the mean rank: sizes of an all-to-all must agree, and ranks may look up unequal numbers of tables.
    exchange_bytes = 4.0 * sum(table.dim for table in problem.tables) * rows
    exchange_ms = _time_exchange(int(exchange_bytes), ranks, dtype)
    all_reduce_ms = _time_all_reduce(dense_bytes, ranks) if world_size > 1 else 0.0
    slowest = torch.tensor([forward_ms, backward_ms, exchange_ms, dense_ms, all_reduce_ms])
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    forward_ms, backward_ms, exchange_ms, dense_ms, all_reduce_ms = slowest.tolist()
    return Measurement(forward_ms, backward_ms, rate.item(), exchange_ms, exchange_bytes, dense_ms, all_reduce_ms)


def _estimated_forward_ms(problem: Problem, tables: Sequence[Table]) -> float:
    """What TorchRec expects of the forward of these tables on one rank, at the machine's present rates."""
    layout = {
        table.name: PlacedTable("table_wise", "fused", (PlacedShard(0, (0, 0), (table.rows, table.dim)),))
        for table in tables
    }
    costs = shard_costs(replace(problem, tables=tuple(tables), constraints=(), precision="float32"), layout)
    return sum(cost.forward_ms for shards in costs.values() for cost in shards)


def _time_lookups(
    tables: Sequence[Table], batch_rows: int, config: Config, device: torch.device, precision: _Precision
) -> tuple[float, float]:
    """Milliseconds of the fused forward, and of the backward with its update, for tables of one rank."""
    limit = max(1, _WEIGHTS_LIMIT_BYTES // (4 * sum(table.dim for table in tables)))
    sizes = [min(table.rows, limit) for table in tables]
    on_gpu = device.type == "cuda"
    place = EmbeddingLocation.DEVICE if on_gpu else EmbeddingLocation.HOST
    unit = ComputeDevice.CUDA if on_gpu else ComputeDevice.CPU
    specs = [(size, table.dim, place, unit) for size, table in zip(sizes, tables, strict=True)]
    kind = SplitTableBatchedEmbeddingBagsCodegen if on_gpu else TablesOfRank
    lookup = kind(specs, device=device, **fused_params(config.table_optimizer))
    counts = [max(1, round(table.pooling_factor)) for table in tables]
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.cat(
            [torch.randint(size, (batch_rows * n,), generator=generator) for size, n in zip(sizes, counts, strict=True)]
        ).to(device)
        for _ in range(4)
    ]
    lengths = torch.cat([torch.full((batch_rows,), n) for n in counts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(device)
    forward, backward = [], []
    for turn in range(_ROUNDS + 2):
        started_s = _now(device)
        with precision():
            pooled = lookup(batches[turn % 4], offsets)
        between_s = _now(device)
        pooled.backward(pooled.detach())
        ended_s = _now(device)
        if turn >= 2:  # the first ones allocate
            forward.append(between_s - started_s)
            backward.append(ended_s - between_s)
    return 1000 * statistics.median(forward), 1000 * statistics.median(backward)


def _time_exchange(num_bytes: int, ranks: Ranks, dtype: torch.dtype) -> float:
    """Milliseconds until every rank has what it needs of a step's embeddings: `num_bytes` of float32 for each.

    On CPU the ranks of a host write embeddings and gradients where the others read them, at half of this each way.
    """
    device, world_size = ranks.device, ranks.world_size
    values = max(1, num_bytes // 4 // world_size) * world_size
    if device.type == "cpu" and world_size > 1:
        num_bytes = FIRST_FREE_BYTE + dtype.itemsize * values * world_size
        memory = SharedMemory.make_for_all("torchdlrm-measured", num_bytes, ranks.all_gather)
        if memory is not None:
            mine = torch.frombuffer(memory.map, dtype=dtype, offset=FIRST_FREE_BYTE).view(world_size, values)[
                ranks.rank
            ]
            gradient, group = torch.ones(values, dtype=dtype), ranks.new_group()

            def exchange() -> None:
                dist.barrier(group=group)
                torch.div(gradient, world_size, out=mine)
                dist.barrier(group=group)

            return _median_ms(exchange, device) / 2
    sent, received = torch.ones(values, device=device), torch.empty(values, device=device)
    return _median_ms(lambda: dist.all_to_all_single(received, sent), device)


def _time_all_reduce(num_bytes: int, ranks: Ranks) -> float:
    gradient = torch.ones(num_bytes // 4, device=ranks.device)
    if ranks.device.type == "cpu" and ranks.world_size == 2:
        shared = SharedSum.of_two_ranks(num_bytes, ranks)
        if shared is not None:
            return _median_ms(lambda: shared.add_up(gradient, is_first=True), ranks.device)
    return _median_ms(lambda: dist.all_reduce(gradient), ranks.device)


def _time_dense(
    shape: ModelShape, config: Config, rows: int, device: torch.device, precision: _Precision
) -> tuple[float, int]:
    """Milliseconds of the dense parts with loss and update, and the bytes of their parameters."""
    model = EagerModel(shape, device)
    parameters = list(model.module.train().parameters())
    optimizer = dense_optimizer(config.dense_optimizer, parameters)
    dense_rows = torch.rand(rows, shape.num_inputs, device=device)
    ids = torch.zeros(len(model.tables) * rows, dtype=torch.int32, device=device)
    with precision():
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    num_columns = sum(table.dim for table in model.tables)
    pooled = torch.rand(rows, num_columns, device=device, dtype=dtype, requires_grad=True)
    labels_B = torch.ones(rows, device=device)

    def step() -> None:
        with precision():
            logits_B = model.logits(dense_rows, ids, torch.ones_like(ids), pooled)
            loss = nn.functional.binary_cross_entropy_with_logits(logits_B, labels_B)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        pooled.grad = None

    return _median_ms(step, device), sum(4 * parameter.numel() for parameter in parameters)


def _median_ms(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for turn in range(_ROUNDS + 2):
        started_s = _now(device)
        work()
        if turn >= 2:
            times.append(_now(device) - started_s)
    return 1000 * statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
