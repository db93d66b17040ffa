"""In which precision the dense parts compute: asked of the processor, not assumed.

Weights, tables, optimizer state, loss and metrics are float32 whatever this says; bfloat16 is for the matrix products
of the dense arch, the interaction arch and the over arch, forward and backward.
"""

from dataclasses import dataclass

import torch

from torchdlrm.config import Config
from torchdlrm.training.threads import step_flops

# Below this a step spends its time between kernels, and casting costs more than faster products save: a step of
# configs/criteo-small.toml (0.06e9) is slower in bfloat16, one of configs/quickstart.toml (0.45e9) a third faster.
MIN_BFLOAT16_FLOPS = 0.3e9


@dataclass(frozen=True)
class Precision:
    """What the dense parts compute in, and why.

    Attributes:
        dtype: float32 or bfloat16.
        reason: for people.
    """

    dtype: torch.dtype
    reason: str

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} ({self.reason})"


def choose_precision(
    config: Config, *, num_dense_features: int, num_sparse_features: int, device: torch.device
) -> Precision:
    """What `train.precision` says; `auto` takes bfloat16 where the device multiplies it faster and the work is enough.

    Args:
        config: of the run.
        num_dense_features: number of dense features.
        num_sparse_features: F.
        device: where this rank computes.
    """
    if config.train.precision != "auto":
        return Precision(getattr(torch, config.train.precision), "as asked")
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "the GPU has it")
        return Precision(torch.float32, "the GPU has no bfloat16")
    units = [name for name, has in _bfloat16_units().items() if has]
    if not units:
        return Precision(torch.float32, "the processor has neither AVX512-BF16 nor AMX")
    # Of the global batch: a run must not change its precision with the number of processes.
    if step_flops(config, num_dense_features, num_sparse_features, 1) < MIN_BFLOAT16_FLOPS:
        return Precision(torch.float32, "steps are too short for bfloat16 to pay")
    return Precision(torch.bfloat16, f"the processor has {units[0]}")


def _bfloat16_units() -> dict[str, bool]:
    capabilities = torch.cpu.get_capabilities()
    return {"AMX": bool(capabilities.get("amx_bf16")), "AVX512-BF16": bool(capabilities.get("avx512_bf16"))}
