"""Describes the machine to the planner: the memory that it really has, and how fast data moves.

TorchRec assumes 32 GiB of GPU memory and 128 GiB of host memory if these are not given.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torchrec.distributed.planner import Topology

from torchdlrm.config import ShardingConfig
from torchdlrm.errors import PlanError
from torchdlrm.sharding.devices import DEVICES, Device, device_of_gpu
from torchdlrm.sharding.gpu_memory import memory_of_others_bytes
from torchdlrm.units import show_bytes


@dataclass(frozen=True)
class Machine:
    """The ranks that share a model; rates are bytes or operations per second of one rank, in one direction.

    Attributes:
        device: what it is called.
        kind: `cuda` or `cpu`.
        num_devices: ranks.
        num_hosts: hosts that they are spread over evenly.
        hbm_bytes: memory of each device; 0 on CPU.
        host_memory_bytes: host memory of each rank.
        memory_bytes_per_s: reading the memory where tables live.
        host_link_bytes_per_s: between host memory and device.
        intra_host_bytes_per_s: to the other ranks of the host.
        inter_host_bytes_per_s: to other hosts.
        float32_flops_per_s: matrix products in float32.
        bfloat16_flops_per_s: matrix products in bfloat16.
        backward_multiplier: a table's backward with its update, over its forward.
        source: where the rates come from.
    """

    device: str
    kind: str
    num_devices: int
    num_hosts: int
    hbm_bytes: int
    host_memory_bytes: int
    memory_bytes_per_s: float
    host_link_bytes_per_s: float
    intra_host_bytes_per_s: float
    inter_host_bytes_per_s: float
    float32_flops_per_s: float
    bfloat16_flops_per_s: float
    backward_multiplier: float = 2.0  # TorchRec's own default
    source: str = ""

    @property
    def devices_per_host(self) -> int:
        """Ranks of each host."""
        return self.num_devices // self.num_hosts

    @property
    def memory_bytes(self) -> int:
        """Memory of each rank where its tables live."""
        return self.hbm_bytes if self.kind == "cuda" else self.host_memory_bytes

    @property
    def usual_devices_per_host(self) -> int:
        """Ranks of a host that is full: GPUs are rented by eight, processes on CPU as they are now."""
        return max(self.devices_per_host, 8) if self.kind == "cuda" else self.devices_per_host

    def product_flops_per_s(self, precision: str, *, tf32: bool) -> float:
        """Rate of the matrix products of a training with this `train.precision` and `train.tf32`.

        On CPU `auto` may be float32, so that is planned for; GPUs multiply in TF32 half as fast as in bfloat16.
        """
        if self.kind == "cuda" and precision != "float32":
            return self.bfloat16_flops_per_s
        if self.kind == "cuda" and tf32:
            return self.bfloat16_flops_per_s / 2
        return self.float32_flops_per_s

    def resized(self, num_devices: int) -> "Machine":
        """Return the machine with another number of devices, on as many hosts as they need.

        Raises:
            PlanError: they cannot be spread evenly.
        """
        per_host = self.usual_devices_per_host
        hosts = max(1, -(-num_devices // per_host))
        if num_devices % hosts:
            msg = f"{num_devices} devices cannot be spread evenly over {hosts} hosts of {per_host}"
            raise PlanError(msg)
        return replace(self, num_devices=num_devices, num_hosts=hosts)

    def topology(self) -> Topology:
        """The machine in TorchRec's words; its rates are bytes per millisecond."""
        # "The topology was constructed directly": its factory adds nothing but presets of Meta's own machines.
        logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
        return Topology(
            world_size=self.num_devices,
            local_world_size=self.devices_per_host,
            compute_device=self.kind,
            hbm_cap=self.hbm_bytes,
            ddr_cap=self.host_memory_bytes,
            hbm_mem_bw=self.memory_bytes_per_s / 1000,
            ddr_mem_bw=self.memory_bytes_per_s / 1000,
            hbm_to_ddr_mem_bw=self.host_link_bytes_per_s / 1000,
            intra_host_bw=self.intra_host_bytes_per_s / 1000,
            inter_host_bw=self.inter_host_bytes_per_s / 1000,
            bwd_compute_multiplier=self.backward_multiplier,
        )


def machine_of(device: Device, *, num_devices: int, num_hosts: int | None = None) -> Machine:
    """Make a machine of devices of one kind, evenly on some hosts.

    Args:
        device: what they are.
        num_devices: all of them.
        num_hosts: as many as the device's usual machine makes of them when not given.

    Raises:
        PlanError: the devices cannot be spread evenly.
    """
    per_host = device.devices_per_host if device.kind == "cuda" else num_devices
    hosts = num_hosts if num_hosts is not None else max(1, -(-num_devices // per_host))
    if hosts < 1 or num_devices % hosts:
        msg = (
            f"`hosts`: {num_devices} devices cannot be spread evenly over {hosts} hosts ({per_host} a host is usual "
            f"for {device.name}); give `devices` and `hosts` so that one divides the other"
        )
        raise PlanError(msg)
    local = num_devices // hosts
    host_bytes = device.host_memory_bytes or host_memory_bytes()
    shared = local if device.kind == "cpu" else 1  # processes of a host share its memory and its cores
    return Machine(
        device=device.name,
        kind=device.kind,
        num_devices=num_devices,
        num_hosts=hosts,
        hbm_bytes=device.memory_bytes or 0,
        host_memory_bytes=host_bytes // local,
        memory_bytes_per_s=device.memory_bytes_per_s / shared,
        host_link_bytes_per_s=device.host_link_bytes_per_s / shared,
        intra_host_bytes_per_s=device.intra_host_bytes_per_s / shared,
        inter_host_bytes_per_s=device.inter_host_bytes_per_s,
        float32_flops_per_s=device.float32_flops_per_s / shared,
        bfloat16_flops_per_s=device.bfloat16_flops_per_s / shared,
        source=device.source,
    )


def host_memory_bytes() -> int:
    """Return the physical memory of this host, or the limit of its cgroup where that is lower."""
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:  # noqa: PTH123
            limit = file.read().strip()
    except OSError:
        return physical_bytes
    return physical_bytes if limit == "max" else min(physical_bytes, int(limit))


def local_machine(
    config: ShardingConfig,
    *,
    world_size: int,
    local_world_size: int,
    device: torch.device,
    all_gather: Callable[[int], list[int]] | None = None,
) -> Machine:
    """Return the machine that this process runs on, as training plans for it.

    What other programs hold of its GPUs is not planned for; all ranks have as much as the one with the least.

    Args:
        config: may give memory sizes that differ from the machine's.
        world_size: number of ranks.
        local_world_size: number of ranks on each host.
        device: where this rank computes; all ranks are taken to have the same.
        all_gather: gives the values of all ranks, each of which asks about its own GPU: it alone knows what it holds
            there itself. None where there are no other ranks yet.
    """
    named = DEVICES["cpu"]
    hbm_bytes = 0
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        named = device_of_gpu(properties.name, properties.total_memory)
        hbm_bytes = config.hbm_bytes or properties.total_memory
        others_bytes = 0
        if not config.hbm_bytes and all_gather is not None:
            others_bytes = max(all_gather(memory_of_others_bytes(device.index)))
        elif not config.hbm_bytes:
            others_bytes = max(map(memory_of_others_bytes, range(local_world_size)))
        if others_bytes:
            hbm_bytes -= others_bytes
            named = replace(named, source=f"{named.source}; other programs hold {show_bytes(others_bytes)} of a GPU")
    machine = machine_of(named, num_devices=world_size, num_hosts=max(1, world_size // local_world_size))
    host_bytes = config.host_memory_bytes or host_memory_bytes() // local_world_size
    return replace(machine, hbm_bytes=hbm_bytes, host_memory_bytes=host_bytes)
