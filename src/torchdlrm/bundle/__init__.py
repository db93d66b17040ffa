"""The folder that predicts: its format, its files, and the model as served."""

from typing import Literal

from torchdlrm.errors import ConfigError, shown

# Of the tables, and of the matrix products. Here, because the command line reads them before torch is loaded.
TablePrecision = Literal["float32", "float16", "int8", "int4"]
DensePrecision = Literal["float32", "bfloat16"]


def check_model_name(name: str) -> None:
    """See that a model's name can stand in an address, as servers have it there; needs nothing that takes time to load.

    Raises:
        ConfigError: it cannot.
    """
    if not name or "/" in name or not name.isprintable():
        msg = f"name: {shown(name)} cannot stand in /v2/models/NAME: give one of printable characters without a slash"
        raise ConfigError(msg)
