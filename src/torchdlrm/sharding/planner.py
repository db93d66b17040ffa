"""Model and machine -> which rank holds which part of which table: TorchRec's planner, bounded to what runs here."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed as dist
from torch import nn
from torchrec.distributed.embedding_types import EmbeddingComputeKernel
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, ParameterConstraints, Topology
from torchrec.distributed.planner.storage_reservations import FixedPercentageStorageReservation
from torchrec.distributed.planner.types import PlannerError
from torchrec.distributed.types import ModuleSharder, ShardingPlan, ShardingType

from torchdlrm.errors import PlanError

# gloo has no reduce-scatter for TorchRec, so row-wise sharding is for GPUs. A data-parallel table would be trained by
# the dense optimizer and not by the tables': it would make the weights depend on the plan.
CPU_SHARDING_TYPES = (ShardingType.TABLE_WISE, ShardingType.COLUMN_WISE)
GPU_SHARDING_TYPES = (
    *CPU_SHARDING_TYPES,
    ShardingType.ROW_WISE,
    ShardingType.TABLE_ROW_WISE,
    ShardingType.GRID_SHARD,
)

# Of each rank's memory, for what is not a table: the dense and over arch, activations, batches, the allocator's slack.
RESERVED_SHARE = 0.15


def table_sharder(fused_params: Mapping[str, Any]) -> EmbeddingBagCollectionSharder:
    """The sharder of all tables; `fused_params` name the optimizer that runs inside their backward."""
    return EmbeddingBagCollectionSharder(fused_params=dict(fused_params))


def plan_sharding(
    model: nn.Module,
    *,
    topology: Topology,
    sharders: Sequence[ModuleSharder[nn.Module]],
    batch_size_per_rank: int,
    process_group: dist.ProcessGroup | None,
) -> ShardingPlan:
    """The plan that all ranks follow.

    Args:
        model: holds the tables, on the meta device.
        topology: the machine.
        sharders: what can be sharded, and how.
        batch_size_per_rank: rows per step on each rank.
        process_group: rank 0 plans for all; None plans in this process, for a machine that need not be there.

    Raises:
        PlanError: the tables do not fit the machine.
    """
    on_gpu = topology.compute_device == "cuda"
    allowed = GPU_SHARDING_TYPES if on_gpu else CPU_SHARDING_TYPES
    constraints = {
        name.rsplit(".", 1)[-1]: ParameterConstraints(
            sharding_types=[kind.value for kind in allowed],
            compute_kernels=[EmbeddingComputeKernel.FUSED.value],
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.EmbeddingBag)
    }
    planner = EmbeddingShardingPlanner(
        topology=topology,
        batch_size=batch_size_per_rank,
        storage_reservation=FixedPercentageStorageReservation(percentage=RESERVED_SHARE),
        constraints=constraints,
        debug=False,
    )
    try:
        if process_group is None:
            return planner.plan(model, list(sharders))
        return planner.collective_plan(model, list(sharders), process_group)
    except PlannerError as error:
        msg = (
            f"the tables do not fit on {topology.world_size} rank(s): {error}\n"
            "use more ranks, a smaller model.embedding_dim, or fewer rows (dlrm preprocess --min-count, --max-rows); "
            "sharding.host_memory_bytes and sharding.hbm_bytes say what each rank may use"
        )
        raise PlanError(msg) from error


def describe_plan(plan: ShardingPlan) -> dict[str, Any]:
    """The plan as JSON: for each table its sharding type, kernel and shards (rank, offsets, sizes)."""
    tables = {}
    for module_plan in plan.plan.values():
        for table, sharding in module_plan.items():
            tables[table] = {
                "sharding_type": sharding.sharding_type,
                "compute_kernel": sharding.compute_kernel,
                "ranks": sharding.ranks,
                "shards": [
                    {
                        "rank": shard.placement.rank(),
                        "offsets": list(shard.shard_offsets),
                        "sizes": list(shard.shard_sizes),
                    }
                    for shard in (sharding.sharding_spec.shards if sharding.sharding_spec else [])
                ],
            }
    return {"format_version": 1, "tables": tables}


def write_plan(path: Path, plan: ShardingPlan) -> None:
    """Write `describe_plan` as a file."""
    path.write_text(json.dumps(describe_plan(plan), indent=1) + "\n", encoding="utf-8")
