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


def bfloat16_unit() -> str | None:
    """The processor's unit that multiplies bfloat16 faster than float32; None where it has none."""
    capabilities = torch.cpu.get_capabilities()
    units = (("AMX", "amx_bf16"), ("AVX512-BF16", "avx512_bf16"))
    return next((unit for unit, key in units if capabilities.get(key)), None)


def precision_of_processor() -> Precision:
    """bfloat16 where the processor has a unit for it; elsewhere it would be slower."""
    unit = bfloat16_unit()
    if unit is None:
        return Precision(torch.float32, "the processor has neither AVX512-BF16 nor AMX")
    return Precision(torch.bfloat16, f"the processor has {unit}")
