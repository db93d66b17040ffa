"""Estimates what a plan costs: bytes and milliseconds of every shard, rank and table, by TorchRec's estimators.

A step is taken to be what the slowest rank does one after the other: look up, exchange, the dense parts, exchange back,
update. Nothing is taken to overlap, though training overlaps the exchange of ids with the step before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchrec.distributed.planner.enumerators import get_partition_by_type
from torchrec.distributed.planner.types import Shard, ShardingOption
from torchrec.distributed.planner.utils import build_sharder_data_map, sharder_name

from torchdlrm.config import TableOptimizer
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.layout import Layout
from torchdlrm.sharding.machine import Machine
from torchdlrm.sharding.planner import (
    PlanOptions,
    TableSharder,
    collections_of,
    estimators,
    meta_tables,
    planner_constraints,
)
from torchdlrm.sharding.tables import BYTES_PER_VALUE, Precision, Table, state_bytes

MATRIX_EFFICIENCY = 0.5


@dataclass(frozen=True)
class Cost:
    """Bytes and milliseconds of a shard, or of many together.

    Attributes:
        weight_bytes: embeddings.
        state_bytes: of the optimizer.
        activation_bytes: ids and pooled embeddings of a step, and the cache of tables in host memory.
        host_bytes: how much of all that is host memory while the device has its own.
        forward_ms: looking up and pooling.
        backward_ms: gradients and update.
        communication_ms: exchange of embeddings and of their gradients.
    """

    weight_bytes: int = 0
    state_bytes: int = 0
    activation_bytes: int = 0
    host_bytes: int = 0
    forward_ms: float = 0.0
    backward_ms: float = 0.0
    communication_ms: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.state_bytes + other.state_bytes,
            self.activation_bytes + other.activation_bytes,
            self.host_bytes + other.host_bytes,
            self.forward_ms + other.forward_ms,
            self.backward_ms + other.backward_ms,
            self.communication_ms + other.communication_ms,
        )

    @property
    def total_bytes(self) -> int:
        """Memory of all kinds."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    @property
    def device_bytes(self) -> int:
        """Memory of the device itself (on CPU, the host's)."""
        return self.total_bytes - self.host_bytes

    @property
    def total_ms(self) -> float:
        """One after the other."""
        return self.forward_ms + self.backward_ms + self.communication_ms


@dataclass(frozen=True)
class DensePart:
    """What every rank does besides its tables.

    Attributes:
        compute_ms: dense arch, interaction and over arch, forward, backward and update.
        all_reduce_ms: averaging their gradients over the ranks.
        multiply_adds: of a row's forward pass.
        weight_bytes: weights, their gradients and the state of their optimizer.
        activation_bytes: what the forward pass of a step keeps for the backward, in float32.
    """

    compute_ms: float
    all_reduce_ms: float
    multiply_adds: int
    weight_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """Memory of all kinds."""
        return self.weight_bytes + self.activation_bytes

    @property
    def total_ms(self) -> float:
        """One after the other."""
        return self.compute_ms + self.all_reduce_ms


def shard_costs(
    layout: Layout, tables: Sequence[Table], machine: Machine, options: PlanOptions, precision: Precision
) -> dict[str, list[Cost]]:
    """Estimate the cost of every shard, by table, in the order of the layout."""
    topology = machine.topology()
    _, constraints = planner_constraints(tables, machine, options)
    ((path, collection),) = collections_of(meta_tables(tables, precision))
    sharder = TableSharder()
    parameters = sharder.shardable_parameters(collection)
    sharding_options = [
        ShardingOption(
            name=table.name,
            tensor=parameters[table.name],
            module=(path, collection),
            input_lengths=[table.pooling_factor],
            batch_size=-(-options.batch_size_global // machine.num_devices),
            sharding_type=layout[table.name].sharding_type,
            partition_by=get_partition_by_type(layout[table.name].sharding_type),
            compute_kernel=layout[table.name].compute_kernel,
            shards=[Shard(size=list(s.sizes), offset=list(s.offsets), rank=s.rank) for s in layout[table.name].shards],
            cache_params=layout[table.name].cache_params,
            is_pooled=True,
        )
        for table in tables
    ]
    sharders = build_sharder_data_map({sharder_name(sharder.module_type): sharder})
    for estimator in estimators(topology, constraints, options.optimizer):
        estimator.estimate(sharding_options, sharder_data_map=sharders)
    return {
        option.name: [_cost(shard, options.optimizer, precision) for shard in option.shards]
        for option in sharding_options
    }


def _cost(shard: Shard, optimizer: TableOptimizer, precision: Precision) -> Cost:
    rows, columns = shard.size
    weight_bytes = rows * columns * BYTES_PER_VALUE[precision]
    state = state_bytes(rows, columns, optimizer)
    storage, perf = shard.storage, shard.perf
    return Cost(
        weight_bytes=weight_bytes,
        state_bytes=state,
        activation_bytes=storage.hbm + storage.ddr - weight_bytes - state,
        host_bytes=storage.ddr if storage.hbm else 0,
        forward_ms=perf.fwd_compute + perf.prefetch_compute,
        backward_ms=perf.bwd_compute,
        communication_ms=perf.fwd_comms + perf.bwd_comms,
    )


def dense_part(
    shape: ModelShape,
    machine: Machine,
    batch_size_global: int,
    dense_state_per_weight: int = 1,
    *,
    precision: str = "auto",
    tf32: bool = True,
) -> DensePart:
    """Estimate what the dense parts take, by their arithmetic.

    Args:
        shape: of the model.
        machine: its peak rate, of which matrix products of this size reach about half.
        batch_size_global: rows per step over all ranks.
        dense_state_per_weight: float32 values that their optimizer keeps.
        precision: of the training, which is that of the products.
        tf32: whether GPUs multiply float32 in TF32.
    """
    weights, rows = shape.num_weights, -(-batch_size_global // machine.num_devices)
    flops = shape.step_flops(rows)
    link = machine.intra_host_bytes_per_s if machine.num_hosts == 1 else machine.inter_host_bytes_per_s
    sent_bytes = 2 * 4 * weights * (machine.num_devices - 1) / machine.num_devices  # a ring
    return DensePart(
        compute_ms=1000 * flops / (MATRIX_EFFICIENCY * machine.product_flops_per_s(precision, tf32=tf32)),
        all_reduce_ms=1000 * sent_bytes / link,
        multiply_adds=shape.multiply_adds,
        weight_bytes=4 * weights * (2 + dense_state_per_weight),
        activation_bytes=4 * rows * shape.num_activations,
    )
