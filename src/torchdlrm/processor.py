"""Names the processor and its vector and matrix units, as /proc/cpuinfo of x86-64 and of aarch64 calls them."""

import platform
from contextlib import suppress
from pathlib import Path

# What makes table look-ups and matrix products fast.
_UNITS = {
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_vnni": "AVX512-VNNI",
    "avx512_bf16": "AVX512-BF16",
    "amx_bf16": "AMX-BF16",
    "asimd": "NEON",
    "sve": "SVE",
    "bf16": "BF16",
}


def processor_name() -> str:
    """The processor's name; empty where the system does not tell."""
    return _cpuinfo("model name") or platform.processor()


def describe_processor() -> str:
    """The processor's name and its units, as people read them."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    units = ", ".join(name for flag, name in _UNITS.items() if flag in flags) or "no vector units that we know"
    return f"{processor_name() or 'unknown'}: {units}"


def _cpuinfo(key: str) -> str:
    with suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8") as file:
        for line in file:
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""
