"""What a model may be called; by itself, so that a server can ask before it loads anything."""

from torchdlrm.errors import ConfigError, shown


def check_model_name(name: str) -> None:
    """See that a model's name can stand in an address, as servers have it there.

    Raises:
        ConfigError: it cannot.
    """
    if not name or "/" in name or not name.isprintable():
        msg = f"name: {shown(name)} cannot stand in /v2/models/NAME: give one of printable characters without a slash"
        raise ConfigError(msg)
