"""`dlrm config`: the keys of a config with their defaults, or a config to start from."""

import sys

from torchdlrm.cli.terminal import Json, print_json, print_table, say
from torchdlrm.config import find_config, load_config, settings, shipped_config_names
from torchdlrm.toml import toml_value


def config(name: str | None = None, *, as_json: Json = False) -> None:
    """List every key of a config with its default and meaning; with NAME, print that config to start one of your own.

    Args:
        name: A config that comes with torchdlrm, as in `dlrm config criteo-small > my.toml`.
        as_json: Print one JSON object on standard output.
    """
    if name is not None:
        load_config(name)  # nothing but a config is printed
        path = find_config(name)
        text = path.read_text(encoding="utf-8")
        if as_json:
            print_json({"name": name, "path": str(path), "toml": text})
        else:
            sys.stdout.write(text)
        return
    if as_json:
        keys = {key: {"default": field.default, "description": field.description} for key, field in settings()}
        print_json({"configs": shipped_config_names(), "keys": keys})
        return
    rows = [
        {
            "key": key,
            "default": "not set" if field.default is None else toml_value(field.default),
            "meaning": field.description or "",
        }
        for key, field in settings()
    ]
    print_table("", rows, left_aligned=("default", "meaning"))
    say(f"to start from: dlrm config NAME > my.toml, with one of {', '.join(shipped_config_names())}")
