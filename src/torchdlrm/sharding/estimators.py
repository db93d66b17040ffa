"""Extends TorchRec's estimators by what they leave out: the optimizer's state, and the reserve of host memory."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import SharderDataMap, ShardEstimator, ShardingOption, Storage
from torchrec.distributed.types import ModuleSharder

from torchdlrm.config import TableOptimizer
from torchdlrm.sharding.constraints import KINDS
from torchdlrm.sharding.tables import row_state_bytes, state_bytes


class TimeEstimator(ShardEstimator):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's estimate of each shard's milliseconds, made once for shards of the same size.

    TorchRec estimates the 64 equal shards of a row-wise table 64 times, at half a millisecond each: of 1,000 tables
    on 64 devices that was 66 of 80 seconds.
    """

    def __init__(self, topology: Topology, constraints: Mapping[str, ParameterConstraints]) -> None:
        self._inner = EmbeddingPerfEstimator(topology=topology, constraints=dict(constraints))

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Set `perf` of every shard."""
        with _one_shard_a_size(sharding_options):
            self._inner.estimate(sharding_options, sharder_data_map=sharder_data_map)


class MemoryEstimator(EmbeddingStorageEstimator):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's estimate of each shard's bytes, with the state of the optimizer that runs in the tables' backward.

    TorchRec 1.8 counts the state of optimizers given by `apply_optimizer_in_backward` alone: one that is named in the
    sharder's `fused_params` counts as nothing, and a plan for Adagrad is half of what training needs.
    """

    def __init__(
        self, topology: Topology, constraints: Mapping[str, ParameterConstraints], optimizer: TableOptimizer
    ) -> None:
        super().__init__(topology=topology, constraints=dict(constraints))
        self._on_gpu = topology.compute_device == "cuda"
        self._optimizer = optimizer

    def estimate(self, sharding_options: list[ShardingOption], sharder_data_map: SharderDataMap) -> None:
        """Set `storage` of every shard."""
        with _one_shard_a_size(sharding_options):
            super().estimate(sharding_options, sharder_data_map)
            for option in sharding_options:
                on_host = not self._on_gpu or option.compute_kernel != EmbeddingComputeKernel.FUSED.value
                for shard in option.shards:
                    rows, columns = shard.size
                    state = state_bytes(rows, columns, self._optimizer)
                    # Of a table in host memory FBGEMM keeps values that there are for each weight there too, outside
                    # the cache, and those that there are for each row on the GPU.
                    hbm = row_state_bytes(rows, self._optimizer) if on_host else state
                    hbm *= self._on_gpu
                    shard.storage += Storage(hbm=hbm, ddr=state - hbm)


@contextmanager
def _one_shard_a_size(sharding_options: list[ShardingOption]) -> Iterator[None]:
    """Inside, options have one shard of each size; afterwards all shards have what it was given."""
    all_shards = [option.shards for option in sharding_options]
    for option, shards in zip(sharding_options, all_shards, strict=True):
        option.shards = list({tuple(shard.size): shard for shard in shards}.values())
    yield
    for option, shards in zip(sharding_options, all_shards, strict=True):
        by_size = {tuple(shard.size): shard for shard in option.shards}
        for shard in shards:
            estimated = by_size[tuple(shard.size)]
            shard.perf, shard.storage = estimated.perf, estimated.storage
        option.shards = shards


class ReservedFraction(FixedPercentageStorageReservation):  # type: ignore[misc]  # TorchRec is untyped
    """Keeps a fraction of each rank's memory for what is not a table; TorchRec's own keeps none of host memory."""

    def reserve(
        self,
        topology: Topology,
        batch_size: int,
        module: nn.Module,
        sharders: list[ModuleSharder[nn.Module]],
        constraints: dict[str, ParameterConstraints] | None = None,
    ) -> Topology:
        """A copy of the topology with less memory."""
        reserved = super().reserve(topology, batch_size, module, sharders, constraints)
        for device in reserved.devices:
            device.storage.ddr = int((1 - self._percentage) * device.storage.ddr)
        return reserved


class OrderedEnumerator(EmbeddingEnumerator):  # type: ignore[misc]  # TorchRec is untyped
    """TorchRec's enumerator with a fixed order.

    TorchRec goes through Python sets of strings, whose order changes with every process (PYTHONHASHSEED): between two
    kinds of equal cost the planner took one or the other by chance, and a plan could not be reproduced.
    """

    def enumerate(self, module: nn.Module, sharders: list[ModuleSharder[nn.Module]]) -> list[ShardingOption]:
        """All options: tables in the model's order, then kinds in that of `KINDS`, then kernels by name."""
        options = super().enumerate(module, sharders)
        table_order = {name: index for index, name in enumerate(dict.fromkeys(option.name for option in options))}
        kind_order = {kind: index for index, kind in enumerate(KINDS)}
        return sorted(options, key=lambda o: (table_order[o.name], kind_order[o.sharding_type], o.compute_kernel))
