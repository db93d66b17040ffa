"""Checks that the installed packages fit together, without importing any of them.

In: their metadata.  Out: their versions, and a check for each way in which they do not fit.
"""

import platform
from collections.abc import Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from torchdlrm.doctor.findings import AFRESH, Check
from torchdlrm.versions import BUILDS, find_misfit, how_to_predict, how_to_train, installed

SHOWN = ("torchdlrm", "torch", "fbgemm-gpu-cpu", "fbgemm-gpu", "torchrec", "polars", "pyarrow", "numpy")
_ENGINE = {"torch", "torchrec", *BUILDS}  # they come in sets, see `torchdlrm.versions`


def installed_versions() -> dict[str, str | None]:
    """The version of each package that computes, and of Python; None where a package is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in SHOWN}


def requirements(lines: list[str] | None, extra: str = "") -> dict[str, SpecifierSet]:
    """The versions that torchdlrm requires of each package besides the engine.

    Args:
        lines: of the metadata, as in `tqdm>=4.66; extra == "train"`.
        extra: whose requirements to give with those that have none.
    """
    return {
        required.name: required.specifier
        for required in map(Requirement, lines or [])
        if required.name not in _ENGINE
        if not (mark := required.marker) or mark.evaluate({"extra": extra})
    }


def check_packages(
    versions: Mapping[str, str | None],
    required: Mapping[str, SpecifierSet],
    for_training: Mapping[str, SpecifierSet],
) -> Iterator[Check]:
    """Whether versions and builds fit together.

    Args:
        versions: by name of the distribution, None where it is missing; also of packages that the others have.
        required: as `requirements` gives it.
        for_training: likewise, with the extra `train`.
    """
    torch, builds = versions.get("torch"), [name for name in BUILDS if versions.get(name)]
    trains = any(versions.get(name) for name in ("torchrec", *(for_training.keys() - required.keys())))
    wanted = for_training if trains else required
    wrong = [
        f"{name} {version} (wanted: {fitting})" if version else f"{name} is missing"
        for name, fitting in wanted.items()
        if not (version := versions.get(name)) or not fitting.contains(version, prereleases=True)
    ]
    if wrong:
        yield Check("versions", "failed", "; ".join(wrong), AFRESH)
    else:
        yield Check("versions", "ok", f"{len(wanted)} packages have the versions that torchdlrm needs")
    misfit = find_misfit(versions)
    if misfit is not None:
        yield Check("builds", "failed", misfit.why, misfit.remedy)
    elif torch is None:
        yield Check("builds", "failed", "torch is missing", AFRESH)
    elif not builds:
        why = "fbgemm-gpu-cpu or fbgemm-gpu is missing: without it nothing predicts and nothing trains"
        yield Check("builds", "failed", why, how_to_predict(torch))
    elif "+cpu" in torch and BUILDS[builds[0]] == "gpu":  # the other way round works, on the processor
        why = f"torch {torch} is the CPU build and {builds[0]} the CUDA build, which needs PyTorch's"
        yield Check("builds", "failed", why, AFRESH)
    else:
        yield Check("builds", "ok", f"torch {torch} with {builds[0]} {versions[builds[0]]}")
    if not versions.get("torchrec"):
        line = how_to_train(torch)
        why = "TorchRec is not installed: this set-up predicts and serves, and cannot train"
        yield (
            Check("training", "failed", "torchrec is missing", line)
            if trains
            else Check("training", "not run", why, line)
        )


def check_installed() -> tuple[dict[str, str | None], list[Check]]:
    """The versions that are installed here, and whether they fit together."""
    try:
        lines = metadata.requires("torchdlrm")
    except metadata.PackageNotFoundError:
        lines = []
    required, for_training = requirements(lines), requirements(lines, "train")
    versions = installed_versions()
    everything = {name: installed(name) for name in for_training} | versions
    return versions, list(check_packages(everything, required, for_training)) if required else []
