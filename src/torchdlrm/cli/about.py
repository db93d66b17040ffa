"""`dlrm config`: the keys of a config, or one to start from; `dlrm doctor`: what this machine has, and if it works."""

import sys

from torchdlrm.cli.options import Json
from torchdlrm.cli.terminal import console, print_json, print_table, say, say_facts
from torchdlrm.config import find_config, load_config, settings, shipped_config_names
from torchdlrm.toml import toml_value

_COLOURS = {"ok": "green", "failed": "red bold", "not run": "yellow"}


def config(name: str | None = None, *, as_json: Json = False) -> None:
    """List every key of a config with its default and meaning; with NAME, print that config to start one of your own.

    Args:
        name: A config that comes with torchdlrm, as in `dlrm config criteo-small > my.toml`.
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
        {"key": key, "default": "not set" if field.default is None else toml_value(field.default)}
        | {"meaning": field.description or ""}
        for key, field in settings()
    ]
    print_table("", rows, left_aligned=("default", "meaning"))
    say(f"to start from: dlrm config NAME > my.toml, with one of {', '.join(shipped_config_names())}")


def doctor(*, as_json: Json = False) -> None:
    """Show what this machine has and what torchdlrm will use of it, and try it on a few hundred rows.

    Takes about 18 seconds of a core, and works where packages or drivers are missing or broken. Exit code 0 when
    everything works, 1 when something failed; each failure says what to do.
    """
    from torchdlrm.doctor.diagnose import diagnose

    say("examining this machine (some 15 seconds, longer where it is busy) ...")
    diagnosis = diagnose()
    say_facts("this machine", diagnosis.machine)
    versions = {name: version for name, version in diagnosis.packages.items() if version is not None}
    say_facts("packages", versions)
    say_facts("what a training will use here", diagnosis.uses)
    say("checks")
    for check in diagnosis.checks:
        console.print(f"  [{_COLOURS[check.outcome]}]{check.outcome:<8}[/]", end="")
        took = "" if check.seconds is None else f" ({check.seconds:.1f} s)"
        say(f"{check.name}{took}: {check.told}")
        if check.remedy:
            say(f"          what to do: {check.remedy}")
    if as_json:
        print_json(diagnosis.as_dict())
    if diagnosis.failed:
        say(f"{len(diagnosis.failed)} of {len(diagnosis.checks)} checks failed")
        sys.exit(1)
    say("everything works")
