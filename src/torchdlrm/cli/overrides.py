"""Knobs of the config on the command line: every `--section.key VALUE` that a verb does not know itself.

The config knows its keys and types, not the parser: so that a wrong key in a file and one on the command line are
found by the same code and told in the same message.
"""

from typing import Annotated

from cyclopts import Parameter

from torchdlrm.errors import ConfigError

Overrides = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


def parse_overrides(tokens: tuple[str, ...]) -> dict[str, str]:
    """Dotted names and the text of their values, from `--name value` and `--name=value`.

    Raises:
        ConfigError: a token is not part of such a pair.
    """
    overrides: dict[str, str] = {}
    left = list(tokens)
    while left:
        token = left.pop(0)
        name, equals, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or not name:
            msg = (
                f"{token!r}: expected --KEY VALUE; dlrm train --help lists the options, docs/configuration.md the keys"
            )
            raise ConfigError(msg)
        if not equals:
            if not left:
                msg = f"{token}: needs a value"
                raise ConfigError(msg)
            value = left.pop(0)
        overrides[name] = value
    return overrides
