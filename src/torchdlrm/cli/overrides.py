"""Knobs of the config on the command line: every `--section.key VALUE` that a verb does not know itself.

The config knows its keys and types, not the parser: so that a wrong key in a file and one on the command line are
found by the same code and told in the same message.
"""

from typing import Annotated

from cyclopts import Parameter

from torchdlrm.errors import ConfigError

Overrides = Annotated[str, Parameter(allow_leading_hyphen=True)]


def split_config(tokens: tuple[str, ...]) -> tuple[str | None, dict[str, str]]:
    """The config's file or name, if the first token is one, and the keys that the others override.

    An optional positional of its own would leave the parser no place for `--train.epochs 2` without a config.

    Raises:
        ConfigError: a token is neither.
    """
    if tokens and not tokens[0].startswith("--"):
        return tokens[0], parse_overrides(tokens[1:])
    return None, parse_overrides(tokens)


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
            msg = f"{token!r}: expected --KEY VALUE; dlrm train --help lists the options, dlrm config the keys"
            raise ConfigError(msg)
        if not equals:
            if not left:
                msg = f"{token}: needs a value"
                raise ConfigError(msg)
            value = left.pop(0)
        overrides[name] = value
    return overrides
