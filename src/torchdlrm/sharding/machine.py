"""Machines to plan for: devices with published rates, how many of them there are, and on how many hosts.

All rates are peak rates of the makers' datasheets, in bytes or floating-point operations per second and in one
direction; real kernels reach a part of them, so times planned from them are too short rather than too long, and
`dlrm plan --measure` replaces them by what this machine reaches.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torchrec.distributed.planner import Topology

from torchdlrm.errors import PlanError
from torchdlrm.toml import did_you_mean


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The ranks that share a model; rates are bytes or operations per second of one rank, in one direction.

    Attributes:
        device: what it is called.
        kind: `cuda`, or `cpu` for processes on hosts without GPUs.
        num_devices: ranks.
        num_hosts: hosts that they are spread over evenly.
        hbm_bytes: memory of each device; 0 on CPU.
        host_memory_bytes: host memory of each rank.
        memory_bytes_per_s: reading the memory where tables live.
        host_link_bytes_per_s: between host memory and device.
        intra_host_bytes_per_s: to the other ranks of the host.
        inter_host_bytes_per_s: to other hosts.
        float32_flops_per_s: matrix products in float32.
        bfloat16_flops_per_s: matrix products in bfloat16 without sparsity; of TF32 these GPUs do half as many.
        backward_multiplier: a table's backward with its update, over its forward.
        source: where the rates come from.
    """

    device: str
    kind: str = "cuda"
    num_devices: int = 8
    num_hosts: int = 1
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

    def spread(self, num_devices: int, num_hosts: int | None = None) -> "Machine":
        """Make a machine of devices like those of one of `DEVICES`.

        Args:
            num_devices: all of them.
            num_hosts: that they are spread over evenly; as many as are usual when not given.

        Raises:
            PlanError: they cannot be spread evenly.
        """
        per_host = self.num_devices if self.kind == "cuda" else num_devices
        hosts = num_hosts if num_hosts is not None else max(1, -(-num_devices // per_host))
        if hosts < 1 or num_devices % hosts:
            raise PlanError(
                f"`hosts`: {num_devices} devices cannot be spread evenly over {hosts} hosts ({per_host} a host is "
                f"usual for {self.device}); give `devices` and `hosts` so that one divides the other"
            )
        local = num_devices // hosts
        shared = local if self.kind == "cpu" else 1  # processes of a host share its memory and its cores
        return replace(
            self,
            num_devices=num_devices,
            num_hosts=hosts,
            host_memory_bytes=(self.host_memory_bytes * self.num_devices or host_memory_bytes()) // local,
            memory_bytes_per_s=self.memory_bytes_per_s / shared,
            host_link_bytes_per_s=self.host_link_bytes_per_s / shared,
            intra_host_bytes_per_s=self.intra_host_bytes_per_s / shared,
            float32_flops_per_s=self.float32_flops_per_s / shared,
            bfloat16_flops_per_s=self.bfloat16_flops_per_s / shared,
        )

    def resized(self, num_devices: int) -> "Machine":
        """Return the machine with another number of devices, on as many hosts as they need.

        Raises:
            PlanError: they cannot be spread evenly.
        """
        per_host = self.usual_devices_per_host
        hosts = max(1, -(-num_devices // per_host))
        if num_devices % hosts:
            raise PlanError(f"{num_devices} devices cannot be spread evenly over {hosts} hosts of {per_host}")
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


def host_memory_bytes() -> int:
    """Return the physical memory of this host, or the limit of its cgroup where that is lower."""
    physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as file:  # noqa: PTH123
            limit = file.read().strip()
    except OSError:
        return physical_bytes
    return physical_bytes if limit == "max" else min(physical_bytes, int(limit))


# Of each GPU, in a usual host of eight. Those without NVLink have no usual one: theirs are hosts that AWS rents.
_COLUMNS = (
    *("hbm_bytes", "host_memory_bytes", "memory_bytes_per_s", "host_link_bytes_per_s"),
    *("intra_host_bytes_per_s", "inter_host_bytes_per_s", "float32_flops_per_s", "bfloat16_flops_per_s"),
)
_GPUS = {
    "a100-40gb": (40 * 10**9, 128 * 10**9, 1555e9, 32e9, 300e9, 25e9, 19.5e12, 312e12),
    "a100-80gb": (80 * 10**9, 256 * 10**9, 2039e9, 32e9, 300e9, 25e9, 19.5e12, 312e12),
    "h100-80gb": (80 * 10**9, 256 * 10**9, 3350e9, 64e9, 450e9, 50e9, 67e12, 989e12),
    "h200": (141 * 10**9, 256 * 10**9, 4800e9, 64e9, 450e9, 50e9, 67e12, 989e12),
    "b200": (180 * 10**9, 256 * 10**9, 8000e9, 64e9, 900e9, 50e9, 75e12, 2250e12),
    "h20": (96 * 10**9, 256 * 10**9, 4000e9, 64e9, 450e9, 50e9, 44e12, 148e12),
    "l40s": (48 * 10**9, 192 * 2**30, 864e9, 32e9, 32e9, 6.25e9, 91.6e12, 362e12),
    "rtx-6000-ada": (48 * 10**9, 192 * 2**30, 960e9, 32e9, 32e9, 6.25e9, 91.1e12, 364e12),
    "a10": (24 * 10**9, 96 * 2**30, 600e9, 32e9, 32e9, 1.5625e9, 31.2e12, 125e12),
    "l4": (24 * 10**9, 96 * 2**30, 300e9, 32e9, 32e9, 1.5625e9, 30.3e12, 121e12),
}
_SOURCES = {
    "a100-40gb": "NVIDIA A100 SXM4 40GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
    "a100-80gb": "NVIDIA A100 SXM4 80GB datasheet; DGX A100: PCIe 4 x16, NVLink 3, HDR InfiniBand 200 Gb/s a GPU",
    "h100-80gb": "NVIDIA H100 SXM5 datasheet; DGX H100: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
    "h200": "NVIDIA H200 SXM datasheet; DGX H200: PCIe 5 x16, NVLink 4, NDR InfiniBand 400 Gb/s a GPU",
    "b200": "NVIDIA DGX B200 datasheet: 1,440 GB and 64 TB/s over 8 GPUs, NVLink 5, 400 Gb/s a GPU",
    "h20": "NVIDIA HGX H20 datasheet: PCIe 5 x16, NVLink 4; 400 Gb/s a GPU as in DGX H100",
    "l40s": "NVIDIA L40S datasheet: PCIe 4 x16; AWS g6e.48xlarge: 400 Gb/s for 8 GPUs",
    "rtx-6000-ada": "NVIDIA RTX 6000 Ada Generation datasheet: PCIe 4 x16; the host of an L40S",
    "a10": "NVIDIA A10 datasheet: PCIe 4 x16; AWS g5.48xlarge: 100 Gb/s for 8 A10G",
    "l4": "NVIDIA L4 datasheet: PCIe 4 x16; AWS g6.48xlarge: 100 Gb/s for 8 GPUs",
}
_CPU = Machine(
    device="cpu",
    kind="cpu",
    num_devices=1,
    hbm_bytes=0,
    host_memory_bytes=0,  # that of the host that plans
    memory_bytes_per_s=204.8e9,
    host_link_bytes_per_s=204.8e9,
    intra_host_bytes_per_s=10e9,
    inter_host_bytes_per_s=3.125e9,
    float32_flops_per_s=2.6e12,
    bfloat16_flops_per_s=2.6e12,
    source="one socket of a server: 8 channels of DDR4-3200, 32 cores with AVX2 and without a unit for bfloat16 at "
    "2.5 GHz, 25 Gb/s Ethernet; memory is that of this machine when not given",
)
DEVICES: Mapping[str, Machine] = {
    name: Machine(device=name, source=_SOURCES[name], **dict(zip(_COLUMNS, values, strict=True)))  # type: ignore[arg-type]
    for name, values in _GPUS.items()
} | {"cpu": _CPU}


_WITHOUT_KERNELS = {"v100": "7.0", "t4": "7.5"}


def device_named(name: str) -> Machine:
    """Find a device by its name.

    Raises:
        PlanError: there is none of this name.
    """
    if name in DEVICES:
        return DEVICES[name]
    model = name.lower().partition("-")[0]
    if model in _WITHOUT_KERNELS:
        raise PlanError(
            f"`device`: {name} has compute capability {_WITHOUT_KERNELS[model]}, and FBGEMM's wheel has kernels "
            f"for 8.0 and above alone; plan for one of {', '.join(DEVICES)}"
        )
    known = f"known are {', '.join(DEVICES)}, and `hbm` and the like change their rates"
    raise PlanError(f"`device`: unknown device {name!r}; {known}{did_you_mean(name.lower(), DEVICES)}")


def device_of_gpu(gpu_name: str, memory_bytes: int) -> Machine:
    """Find a GPU by its driver's name, for example `NVIDIA A100-SXM4-80GB`.

    A GPU that is not listed has the rates of the slowest one that is, and says so.
    """
    words = set(re.split(r"[\s-]+", gpu_name.lower()))
    words |= {word.strip("g") for word in words}  # a GB200 holds B200s, and an A10G is an A10 for AWS
    for device in DEVICES.values():
        model = re.sub(r"-\d+gb$", "", device.device)
        is_size = model == device.device or abs(device.hbm_bytes / memory_bytes - 1) < 0.2
        if is_size and words.issuperset(model.split("-")):
            return device
    slowest = DEVICES["l4"]
    source = f"rates of this GPU are not known; assumed are those of l4, the slowest that is listed: {slowest.source}"
    return replace(slowest, device=gpu_name, hbm_bytes=memory_bytes, source=source)
