"""Reads and writes bytes and counts as people write them: GB is 10^9 bytes, GiB is 2^30."""

import math
import re
from contextlib import suppress
from typing import Annotated

from pydantic import (
    ByteSize,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)

from torchdlrm.errors import ConfigError, shown
from torchdlrm.toml import explain


def _read_size(value: object, read: ValidatorFunctionWrapHandler) -> object:
    """Read a size, but not as ByteSize alone would: it leaves what it cannot read and takes `80,000GB` for 80 bytes."""
    with suppress(ValidationError):
        if not isinstance(value, str) or re.fullmatch(r"\s*\d*\.?\d+\s*[A-Za-z]*\s*", value):
            return read(value)
    raise ValueError(f"must be a size above zero such as 80GB, 79GiB or a number of bytes, got {shown(value)}")


# `80GB`, `79.1GiB` or a plain number of bytes, in config files and on the command line.
Size = Annotated[ByteSize, Field(gt=0), WrapValidator(_read_size)]


def parse_bytes(text: str, argument: str) -> int:
    """Read a size such as `80GB`, `79.1GiB` or a plain number of bytes.

    Args:
        text: what was given.
        argument: what it was given for, as the message calls it.

    Raises:
        ConfigError: it is none, or not above zero.
    """
    try:
        return int(TypeAdapter(Size, config=ConfigDict(strict=True)).validate_python(text))
    except ValidationError as error:
        raise ConfigError(f"`{argument}`: {explain(error.errors()[0])}") from error


def show_bytes(size_bytes: float) -> str:
    """Write a size in decimal units with three digits or so, for example `532.5 GB`."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if abs(size_bytes) >= size:
            value = size_bytes / size
            return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"
    return f"{size_bytes:.0f} B"


def show_count(count: float) -> str:
    """Write a number of things, from a million on with four digits: `257,143`, `39.29M`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if count >= size:
            return f"{count / size:.4g}{unit}"
    return f"{count:,.0f}"


def show_number(value: float | None, digits: int = 5) -> str:
    """Write a number with `digits` digits after the point; `-` where it is not defined, which is None or NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:,.{digits}f}"


def show_p_value(p_value: float) -> str:
    """Write how often chance makes as large a difference: `0.0312`, `<0.0001`."""
    return "<0.0001" if p_value < 1e-4 else show_number(p_value, 4)


def show_duration(seconds: float) -> str:
    """Show a duration by its two largest units: 45 s, 3 min 12 s, 2 h 5 min, 4 d 1 h."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, rest_min = divmod(minutes, 60)
    days, rest_h = divmod(hours, 24)
    if days:
        return f"{days} d {rest_h} h"
    return f"{hours} h {rest_min} min" if hours else f"{minutes} min {rest_s} s" if minutes else f"{rest_s} s"
