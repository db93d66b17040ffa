"""What PyTorch sees of the GPUs, and whether a training would use them."""

import torch

from torchdlrm.doctor.probe import Findings
from torchdlrm.training.processes.device import VISIBLE_VARIABLE, SeenGPUs, choose_device_type
from torchdlrm.units import show_bytes


def see_device(findings: Findings) -> str:
    """Write down what is seen; give where `train.device = auto` computes.

    Raises:
        ConfigError: it would refuse.
    """
    seen = SeenGPUs.now()
    build = f"CUDA {seen.cuda}" if seen.cuda else "CPU"
    facts = {"PyTorch's build": f"{build}, kernels for {torch.backends.cpu.get_cpu_capability()}"}
    facts["driver"] = seen.driver or "none"
    for index, gpu in enumerate(seen.gpus):
        capability = ".".join(map(str, gpu.capability))
        facts[f"cuda:{index}"] = f"{gpu.name}, {show_bytes(gpu.memory_bytes)}, compute capability {capability}"
    if seen.gpus:
        facts["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["peer access"] = _peer_access(len(seen.gpus))
    findings.tell("machine", facts)
    kind = choose_device_type("auto", seen, num_processes=max(1, len(seen.gpus)))
    findings.num_gpus = len(seen.gpus) if kind == "cuda" else 0
    if kind == "cuda":
        return f"{seen.num_gpus}, one for each process"
    if not seen.is_cpu_set_up:
        return f"the processor, since {VISIBLE_VARIABLE} is empty"
    hint = ", though there is a driver for GPUs (make install EXTRA=gpu VENV=.venv-gpu)" if seen.driver else ""
    return f"the processor: this is the CPU set-up{hint}"


def _peer_access(num_gpus: int) -> str:
    """Whether GPUs can read each other's memory."""
    pairs = [(one, other) for one in range(num_gpus) for other in range(one + 1, num_gpus)]
    lacking = [f"{a}-{b}" for a, b in pairs if not torch.cuda.can_device_access_peer(a, b)]
    return "between all" if not lacking else f"not between {', '.join(lacking)}"
