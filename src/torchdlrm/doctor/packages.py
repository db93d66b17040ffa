"""Checks that the installed packages fit together, without importing any of them.

In: their metadata.  Out: their versions, and a check for each way in which they do not fit.
"""

import platform
import re
from collections.abc import Iterator, Mapping
from importlib import metadata

from torchdlrm.doctor.findings import AFRESH, Check

SHOWN = ("torchdlrm", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "polars", "pyarrow", "numpy")
BUILDS = {"fbgemm-gpu-cpu": "cpu", "fbgemm-gpu": "gpu"}
# Extras whose packages compute; an optional tracker of another version is for its user to know.
_COMPUTING_EXTRAS = ("", "cpu", "gpu")


def installed_versions() -> dict[str, str | None]:
    """The version of each package that computes, and of Python; None where a package is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in SHOWN}


def requirements(lines: list[str] | None) -> dict[str, str]:
    """What torchdlrm requires of each package, as in {"torch": "<2.14,>=2.13"}; of those that compute.

    Args:
        lines: of the metadata, as in `torch<2.14,>=2.13; extra == "gpu"`.
    """
    found = {}
    for line in lines or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra == ['\"](.*?)['\"]", marker)
        name = re.match(r"[\w.-]+", requirement)
        if name is not None and (extra[1] if extra else "") in _COMPUTING_EXTRAS:
            found[name[0]] = re.sub(r"^\[.*?\]", "", requirement[name.end() :].strip())
    return found


def check_packages(versions: Mapping[str, str | None], required: Mapping[str, str]) -> Iterator[Check]:
    """Whether versions and builds fit together.

    Args:
        versions: by name of the distribution, None where it is missing; also of packages that `required` has.
        required: as `requirements` gives it.
    """
    builds = [name for name in BUILDS if versions.get(name)]
    if len(builds) == 2:
        why = "fbgemm-gpu and fbgemm-gpu-cpu are both installed: they have the same files, and one lies over the other"
        yield Check("builds", "failed", why, AFRESH)
        return
    wrong = [
        f"{name} {versions.get(name) or 'is missing'}" + (f" (wanted: {wanted})" if versions.get(name) else "")
        for name, wanted in required.items()
        if name not in BUILDS or name in builds
        if not satisfies(versions.get(name), wanted)
    ]
    if not builds:
        wrong.append("fbgemm-gpu-cpu or fbgemm-gpu is missing")
    yield (
        Check("versions", "failed", "; ".join(wrong), AFRESH)
        if wrong
        else Check("versions", "ok", f"{len(required) - 1} packages have the versions that fit together")
    )
    if not builds:
        return
    torch = versions.get("torch") or ""
    if "+cpu" in torch and BUILDS[builds[0]] == "gpu":  # the other way round works, on the processor
        why = f"torch {torch} is the CPU build and {builds[0]} the CUDA build, which needs PyTorch's"
        yield Check("builds", "failed", why, AFRESH)
    else:
        yield Check("builds", "ok", f"torch {torch} with {builds[0]} {versions[builds[0]]}")


def check_installed() -> tuple[dict[str, str | None], list[Check]]:
    """The versions that are installed here, and whether they fit together."""
    try:
        required = requirements(metadata.requires("torchdlrm"))
    except metadata.PackageNotFoundError:
        required = {}
    versions = installed_versions()
    everything = {name: _version(name) for name in required} | versions
    return versions, list(check_packages(everything, required)) if required else []


def satisfies(version: str | None, wanted: str) -> bool:
    """Whether a version is in a range such as `<2.14,>=2.13`; a local part such as `+cpu` does not count."""
    if version is None:
        return False
    here = _numbers(version)
    for part in filter(None, wanted.split(",")):
        operator, number = re.fullmatch(r"\s*([<>=!~]+)\s*(.*?)\s*", part).groups()  # type: ignore[union-attr]
        there = _numbers(number)
        if not {"<": here < there, "<=": here <= there, ">": here > there, ">=": here >= there, "==": here == there}[
            operator
        ]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version, without zeros at its end: 2.13.0+cpu is (2, 13)."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in release[0].split(".")] if release else []
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
