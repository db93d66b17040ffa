"""TorchRec's planner with other parts: estimates with what TorchRec's leave out, and a search within bounds.

TorchRec's default tries every step of its greedy proposers and places the largest tables first. Two of the three cost
more than they bring:
- a step of the greedy proposers moves one table to its next kind; most steps in a row rate alike, so of many only a
  selection is tried (`Thinned`);
- placing the slowest tables first balances time better than placing the largest first, and in one pass. Where memory
  is tight that order may fail to fit; then the largest go first, as TorchRec does by default, and at last each of them
  to the rank with the most memory left.

Bounds are counts and not seconds, so the same question has the same answer on any machine.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from typing import Any

from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.planner import ParameterConstraints, Topology
from torchrec.distributed.planner.enumerators import EmbeddingEnumerator
from torchrec.distributed.planner.partitioners import GreedyPerfPartitioner, SortBy
from torchrec.distributed.planner.perf_models import NoopPerfModel
from torchrec.distributed.planner.proposers import GreedyProposer, GridSearchProposer, UniformProposer
from torchrec.distributed.planner.shard_estimators import EmbeddingPerfEstimator, EmbeddingStorageEstimator
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import (
    Enumerator,
    Partitioner,
    Perf,
    PlannerError,
    PlannerErrorType,
    Proposer,
    SharderDataMap,
    ShardEstimator,
    ShardingOption,
    Stats,
    Storage,
)
from torchrec.distributed.planner.utils import reset_shard_rank
from torchrec.distributed.types import ModuleSharder

from torchdlrm.config import TableOptimizer
from torchdlrm.sharding.constraints import KINDS
from torchdlrm.sharding.tables import row_state_bytes, state_bytes

# Work of one proposal grows with shards, and so with tables times devices: about 0.1 s at 16,000.
_SEARCH_BUDGET = 160_000
_BOTH_GREEDY_UP_TO = 16_000
_MIN_PROPOSALS, _MAX_PROPOSALS = 8, 400


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


class Thinned(Proposer):  # type: ignore[misc]  # TorchRec is untyped
    """A selection of a greedy proposer's proposals: all of the first ones, then ever fewer, and the last.

    The greedy proposers move the largest table first. Where memory is short it is the first few moves that make room,
    and every table that is cut by rows costs each rank a copy of its output, so the selection is geometric.

    Args:
        inner: one whose next proposal does not depend on how the last was rated.
        max_proposals: about how many there are at most.
    """

    def __init__(self, inner: Proposer, max_proposals: int) -> None:
        self._inner = inner
        self._max_proposals = max_proposals
        self._selected: list[int] = []  # steps that are still to be proposed, in falling order
        self._step = 0

    def load(self, search_space: list[ShardingOption], enumerator: Enumerator | None = None) -> None:
        """Take in all options; the greedy proposers make one step an option, but for the first of each table."""
        num_steps = len(search_space) - len({option.fqn for option in search_space})
        self._selected = sorted(geometric_steps(num_steps, self._max_proposals), reverse=True)
        self._step = 0
        self._inner.load(search_space, enumerator)

    def propose(self) -> list[ShardingOption] | None:
        """Return the next one that is selected."""
        while self._selected and self._step < self._selected[-1]:
            if self._inner.propose() is None:
                return None
            self._inner.feedback(partitionable=False)
            self._step += 1
        return self._inner.propose() if self._selected else None

    def feedback(
        self,
        partitionable: bool,  # noqa: FBT001 - TorchRec's interface
        plan: list[ShardingOption] | None = None,
        perf_rating: float | None = None,
        storage_constraint: Topology | None = None,
    ) -> None:
        """Move to the next one."""
        self._inner.feedback(partitionable, plan, perf_rating, storage_constraint)
        self._step += 1
        self._selected.pop()


def geometric_steps(num_steps: int, max_proposals: int) -> set[int]:
    """Steps from 0 to `num_steps`, both among them, in growing distances: about `max_proposals` in all."""
    if num_steps < max_proposals:
        return set(range(num_steps + 1))
    return {0} | {round(num_steps ** (k / (max_proposals - 1))) for k in range(max_proposals)}


class PlacingPartitioner(Partitioner):  # type: ignore[misc]  # TorchRec is untyped
    """Pinned tables first, then the rest by TorchRec's greedy partitioner in the better of its orders.

    Args:
        pinned: table -> ranks that its shards have to be on.
        thorough: rate the first two orders of every proposal, instead of the next only where one does not fit.
    """

    def __init__(self, pinned: Mapping[str, tuple[int, ...]], *, thorough: bool) -> None:
        self._pinned = pinned
        self._thorough = thorough

    def partition(self, proposal: list[ShardingOption], storage_constraint: Topology) -> list[ShardingOption]:
        """Give every shard a rank.

        Raises:
            PlannerError: it does not fit.
        """
        left, machine = proposal, storage_constraint
        if self._pinned:
            left, machine = self._place_pinned(proposal, storage_constraint)
        ranks: list[list[int | None]] | None = None
        best = float("inf")
        error: PlannerError | None = None
        for place in (_slowest_first, _largest_first, _largest_to_emptiest):
            reset_shard_rank(left)
            try:
                place(left, machine)
            except PlannerError as failure:
                error = failure
                continue
            rating = NoopPerfModel(storage_constraint).rate(proposal)
            if rating < best:
                best, ranks = rating, [option.get_shards_assignment() for option in left]
            if not self._thorough or place is _largest_first:
                break
        if ranks is None:
            assert error is not None
            raise error
        for option, assigned in zip(left, ranks, strict=True):
            for shard, rank in zip(option.shards, assigned, strict=True):
                shard.rank = rank
        return proposal

    def _place_pinned(
        self, proposal: list[ShardingOption], storage_constraint: Topology
    ) -> tuple[list[ShardingOption], Topology]:
        machine = copy.deepcopy(storage_constraint)
        left = []
        for option in proposal:
            if option.name not in self._pinned:
                left.append(option)
                continue
            for shard, rank in zip(option.shards, cycle(self._pinned[option.name]), strict=False):
                device = machine.devices[rank]
                if not shard.storage.fits_in(device.storage):
                    message = f"{option.name} does not fit on rank {rank}, which sharding.constraints asks for"
                    raise PlannerError(message, PlannerErrorType.PARTITION)
                shard.rank = rank
                device.storage -= shard.storage
                device.perf += shard.perf
        return left, machine


def _slowest_first(proposal: list[ShardingOption], machine: Topology) -> None:
    GreedyPerfPartitioner(sort_by=SortBy.PERF).partition(proposal, machine)


def _largest_first(proposal: list[ShardingOption], machine: Topology) -> None:
    GreedyPerfPartitioner(sort_by=SortBy.STORAGE).partition(proposal, machine)


def _largest_to_emptiest(proposal: list[ShardingOption], machine: Topology) -> None:
    """Balance memory instead of time: TorchRec's greedy partitioner, with bytes in place of milliseconds."""
    times = [[shard.perf for shard in option.shards] for option in proposal]
    try:
        for option in proposal:
            for shard in option.shards:
                size_bytes = shard.storage.hbm if machine.compute_device == "cuda" else shard.storage.ddr
                shard.perf = Perf(fwd_compute=float(size_bytes), fwd_comms=0.0, bwd_compute=0.0, bwd_comms=0.0)
        GreedyPerfPartitioner(sort_by=SortBy.PERF).partition(proposal, machine)
    finally:
        for option, perfs in zip(proposal, times, strict=True):
            for shard, perf in zip(option.shards, perfs, strict=True):
                shard.perf = perf


class ProposalCount(Stats):  # type: ignore[misc]  # TorchRec is untyped
    """Keeps how many plans were tried, which TorchRec's planner tells those who print its plans."""

    num_proposals = 0

    def log(self, *, num_proposals: int, **_: Any) -> None:
        """Keep the number; the planner calls this at its end."""
        self.num_proposals = num_proposals


def proposers(num_tables: int, num_devices: int) -> list[Proposer]:
    """TorchRec's proposers, bounded for a problem of this size."""
    max_proposals = max(_MIN_PROPOSALS, min(_MAX_PROPOSALS, _SEARCH_BUDGET // (num_tables * num_devices)))
    chosen: list[Proposer] = [
        UniformProposer(),
        GridSearchProposer(max_proposals=max_proposals),
        Thinned(GreedyProposer(), max_proposals),
    ]
    # TorchRec's own step from one proposal to the next goes through all shards: 9 ms for 1,000 tables on 64 devices.
    if num_tables * num_devices <= _BOTH_GREEDY_UP_TO:
        chosen.append(Thinned(GreedyProposer(use_depth=False), max_proposals))
    return chosen
