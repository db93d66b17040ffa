"""Reads TOML files, writes values as TOML, explains errors in documents, and tells names of presets from paths.

In: a value or a document; or a problem that pydantic found.  Out: text.
"""

import difflib
import logging
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import tomli_w

from torchdlrm.errors import UserError

_log = logging.getLogger(__name__)
_MAX_VALUE_CHARACTERS = 80


def read_toml(path: Path, error: type[UserError]) -> dict[str, Any]:
    """Read a document; raises an error of the class that is given where the file cannot be read, or is no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise error(f"{path}: cannot be read: {cause.strerror or cause}") from cause
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as cause:
        raise error(f"{path}: not a TOML file: {cause}") from cause


def toml_text(document: Mapping[str, object]) -> str:
    """Write a document as TOML, every list in one line."""
    text = tomli_w.dumps(document, indent=0)
    # tomli-w writes a line for each item of a list. Strings hold no line breaks, so these are all of lists.
    return text.replace("[\n", "[").replace(",\n]", "]").replace(",\n", ", ")


def toml_value(value: object) -> str:
    """Write a string, a number, a truth value or a list of these as TOML has it, in one line."""
    return toml_text({"_": value}).removeprefix("_ = ").rstrip("\n")


def did_you_mean(text: str, known: Iterable[str]) -> str:
    """Return a question that ends a message, where something known is much like `text`; otherwise nothing."""
    close = difflib.get_close_matches(text, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_preset(given: str | Path, presets: Collection[str]) -> bool:
    """Whether this is the name of a preset and no path: a bare name that is one means it, whatever lies in the folder.

    A path has a `/` or an extension. Where a file or folder has the name too, a line of the log says what was taken.
    """
    name = str(given)
    if name in presets and Path(name).exists():
        _say_which(name, Path(name).absolute())
    return name in presets


@cache  # a command may ask several times, and says it once
def _say_which(name: str, path: Path) -> None:
    kind = "folder" if path.is_dir() else "file"
    _log.warning("%s: taken as the preset of that name; the %s of that name is ./%s", name, kind, name)


def explain(item: Any) -> str:
    """Say what is wrong with a value, which value it is and what would be right; the caller names the key.

    Args:
        item: one of the `errors()` of a pydantic `ValidationError`; for an unknown key the caller knows better.
    """
    kind, context = item["type"], item.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(item["msg"]).removeprefix("Value error, ")
    if kind == "union_tag_not_found":
        return f"has no {context['discriminator'].strip(chr(39))}"
    value = item["input"]
    if kind in {"literal_error", "union_tag_invalid"}:
        tags = context.get("expected") or context["expected_tags"]
        value = context.get("tag", value)
        hint = did_you_mean(str(value), re.findall(r"'(.*?)'", tags))
        return f"must be one of {tags.replace(' or ', ', ')}, not {_shown(value)}{hint}"
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return f"must be a table {{ key = value, ... }}, got {_shown(value)}"
    message = re.sub(r"^\w+ should ", "must ", item["msg"]).replace("valid tuple", "list")
    return f"{message[0].lower()}{message[1:]}, got {_shown(value)}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_CHARACTERS else text[:_MAX_VALUE_CHARACTERS] + "..."
