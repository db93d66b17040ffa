"""What the planner is told about the machine: the memory that is really there.

TorchRec assumes 32 GiB of GPU memory and 128 GiB of host memory when it is not told.
"""

import os

import torch
from torchrec.distributed.planner import Topology

from torchdlrm.config import ShardingConfig


def host_memory_bytes() -> int:
    """Physical memory of this host, or the limit of its cgroup where that is lower."""
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:  # noqa: PTH123
            limit = file.read().strip()
    except OSError:
        return physical_bytes
    return physical_bytes if limit == "max" else min(physical_bytes, int(limit))


def local_topology(config: ShardingConfig, *, world_size: int, local_world_size: int, device: torch.device) -> Topology:
    """The machine that this process runs on, as the planner wants it.

    Args:
        config: may give memory sizes that differ from the machine's.
        world_size: number of ranks.
        local_world_size: number of ranks on each host.
        device: where this rank computes; all ranks are taken to have the same.
    """
    host_bytes = config.host_memory_bytes or host_memory_bytes() // local_world_size
    hbm_bytes = 0
    if device.type == "cuda":
        hbm_bytes = config.hbm_bytes or torch.cuda.get_device_properties(device).total_memory
    return Topology(
        world_size=world_size,
        local_world_size=local_world_size,
        compute_device=device.type,
        hbm_cap=hbm_bytes,
        ddr_cap=host_bytes,
    )
