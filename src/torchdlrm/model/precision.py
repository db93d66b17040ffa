"""Chooses the precision of the dense parts: training and serving ask the processor the same question.

A file of its own, because a server must be able to ask without loading what trains.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """What the dense parts compute in, and why.

    Attributes:
        dtype: float32 or bfloat16.
        reason: for people.
    """

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """The name of the type, as in a config."""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})"


def precision_of_processor() -> Precision:
    """bfloat16 where the processor has units that multiply it faster than float32; elsewhere it would be slower."""
    capabilities = torch.cpu.get_capabilities()
    for unit, key in (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16")):
        if capabilities.get(key):
            return Precision(torch.bfloat16, f"the processor has {unit}")
    return Precision(torch.float32, "the processor has neither AVX512-BF16 nor AMX")
