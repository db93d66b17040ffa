"""`dlrm doctor`: what this machine has, what will be used, and whether it works."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torchdlrm.cli.terminal import Json, console, print_json, say

if TYPE_CHECKING:
    from torchdlrm.doctor.findings import Check

_COLOURS = {"ok": "green", "failed": "red bold", "not run": "yellow"}


def doctor(*, as_json: Json = False) -> None:
    """Show what this machine has and what torchdlrm will use of it, and try it on a few hundred rows.

    Takes about 18 seconds of a core, and works where packages or drivers are missing or broken. Exit code 0 when
    everything works, 1 when something failed; each failure says what to do.

    Args:
        as_json: Print one JSON object on standard output.
    """
    from torchdlrm.doctor.diagnose import diagnose

    say("examining this machine (some 15 seconds, longer where it is busy) ...")
    diagnosis = diagnose()
    _show("this machine", diagnosis.machine)
    versions = {name: version for name, version in diagnosis.packages.items() if version is not None}
    _show("packages", versions)
    _show("what a training will use here", diagnosis.uses)
    say("checks")
    for check in diagnosis.checks:
        _show_check(check)
    if as_json:
        print_json(diagnosis.as_dict())
    if diagnosis.failed:
        say(f"{len(diagnosis.failed)} of {len(diagnosis.checks)} checks failed")
        sys.exit(1)
    say("everything works")


def _show(title: str, facts: Mapping[str, str]) -> None:
    if not facts:
        return
    say(title)
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        first, *others = value.splitlines() or [""]
        say(f"  {name:<{width}}{first}")
        for line in others:
            say(f"  {'':<{width}}{line}")


def _show_check(check: "Check") -> None:
    console.print(f"  [{_COLOURS[check.outcome]}]{check.outcome:<8}[/]", end="")
    took = "" if check.seconds is None else f" ({check.seconds:.1f} s)"
    say(f"{check.name}{took}: {check.told}")
    if check.remedy:
        say(f"          what to do: {check.remedy}")
