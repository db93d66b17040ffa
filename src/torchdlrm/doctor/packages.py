"""Checks that the installed packages fit together, without importing any of them.

In: their metadata.  Out: their versions, and a check for each way in which they do not fit.
"""

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from torchdlrm.doctor.findings import AFRESH, Check

SHOWN = ("torchdlrm", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "polars", "pyarrow", "numpy")
BUILDS = {"fbgemm-gpu-cpu": "cpu", "fbgemm-gpu": "gpu"}
# Extras whose packages compute; an optional tracker of another version is for its user to know.
_COMPUTING_EXTRAS = ("cpu", "gpu")


def installed_versions() -> dict[str, str | None]:
    """The version of each package that computes, and of Python; None where a package is not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in SHOWN}


def requirements(lines: list[str] | None) -> dict[str, SpecifierSet]:
    """The versions that torchdlrm requires of each package that computes.

    Args:
        lines: of the metadata, as in `torch<2.14,>=2.13; extra == "gpu"`.
    """
    return {
        required.name: required.specifier
        for required in map(Requirement, lines or [])
        if not (mark := required.marker) or any(mark.evaluate({"extra": extra}) for extra in _COMPUTING_EXTRAS)
    }


def check_packages(versions: Mapping[str, str | None], required: Mapping[str, SpecifierSet]) -> Iterator[Check]:
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
        f"{name} {version} (wanted: {wanted})" if version else f"{name} is missing"
        for name, wanted in required.items()
        if name not in BUILDS or name in builds
        if not (version := versions.get(name)) or not wanted.contains(version, prereleases=True)
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
