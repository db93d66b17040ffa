"""Bytes and counts as people write and read them: GB is 10^9 bytes, GiB is 2^30."""

import re

from torchdlrm.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, option: str) -> int:
    """A size such as `80GB`, `79.1GiB` or a plain number of bytes.

    Raises:
        ConfigError: it is none, or not above zero.
    """
    match = re.fullmatch(r"\s*(-?[\d_]*\.?\d+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        msg = f"{option}: expected a size such as 80GB, 79GiB or a number of bytes, got {text!r}"
        raise ConfigError(msg)
    size_bytes = round(float(match[1]) * _UNITS[match[2].upper()])
    if size_bytes <= 0:
        msg = f"{option}: must be above zero, got {text!r}"
        raise ConfigError(msg)
    return size_bytes


def show_bytes(size_bytes: float) -> str:
    """A size in decimal units with three digits or so, for example `532.5 GB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size_bytes) >= size:
            value = size_bytes / size
            return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"
    return f"{size_bytes:.0f} B"


def show_count(count: float) -> str:
    """A number of things, from a million on with four digits: `257,143`, `39.29M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,.0f}"
