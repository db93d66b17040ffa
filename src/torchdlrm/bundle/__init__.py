"""The folder that predicts: its format, its files, and the model as served."""

from torchdlrm.bundle.precision import DensePrecision, TablePrecision
from torchdlrm.errors import ConfigError, shown

__all__ = ["DensePrecision", "TablePrecision", "check_model_name"]


def check_model_name(name: str) -> None:
    """See that a model's name can stand in an address, as servers have it there; needs nothing that takes time to load.

    Raises:
        ConfigError: it cannot.
    """
    if not name or "/" in name or not name.isprintable():
        msg = f"name: {shown(name)} cannot stand in /v2/models/NAME: give one of printable characters without a slash"
        raise ConfigError(msg)
