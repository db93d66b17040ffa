"""docs/configuration.md, from the descriptions of the settings."""

from pydantic import BaseModel

from torchdlrm.config.sections import Config, settings
from torchdlrm.toml import toml_value

_DOCUMENT_HEAD = """
# Configuration

A run is described by one TOML file. Some come with torchdlrm and go by their names: `dlrm train criteo-small ...`, and
`dlrm config criteo-small > my.toml` to start from one. Keys that a file leaves out have the defaults below, which are
the paper's Criteo model; `dlrm config` prints them. Any key can be overridden on the command line by its dotted name,
with `-` or `_`: `--train.batch-size-global 8192`, `--model.dense-arch-layer-sizes 512,256,64`. All mistakes, in the
file and on the command line, are reported together. (Made by `make docs` from `src/torchdlrm/config/sections.py`.)
"""


def configuration_markdown() -> str:
    """docs/configuration.md: every setting with its default and meaning."""
    lines = [_DOCUMENT_HEAD.strip(), "", "| key | default | meaning |", "| --- | --- | --- |"]
    for name, field in settings():
        default = "not set" if field.default is None else f"`{toml_value(field.default)}`"
        lines.append(f"| `{name}` | {default} | {field.description} |")
    for name, field in Config.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            text = " ".join((field.annotation.__doc__ or "").split())
            lines += ["", f"`[{name}]`: {text}"]
    return "\n".join(lines) + "\n"
