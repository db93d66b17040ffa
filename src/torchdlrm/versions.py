"""Which versions of torch, FBGEMM and TorchRec fit together, and what to type where those that are installed do not.

No installer finds out: FBGEMM's wheels do not say for which torch they were built, and TorchRec's ask for any version
of FBGEMM's CUDA build. `SETS` is the one table of it, to which tests hold pyproject.toml, requirements/ and documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Literal


@dataclass(frozen=True)
class VersionSet:
    """Minor versions that were built and tested together, as in `2.14`."""

    torch: str
    fbgemm: str
    torchrec: str


@dataclass(frozen=True)
class Misfit:
    """Installed versions that do not fit together.

    Attributes:
        why: what is wrong, in a sentence.
        remedy: what to type.
        is_fatal: nothing can be expected of a training with them; of others its user may know better than the table.
    """

    why: str
    remedy: str
    is_fatal: bool = False


SETS = (VersionSet("2.13", fbgemm="1.8", torchrec="1.8"), VersionSet("2.14", fbgemm="1.9", torchrec="1.9"))
BUILDS: Mapping[str, Literal["cpu", "gpu"]] = {"fbgemm-gpu-cpu": "cpu", "fbgemm-gpu": "gpu"}
# What TorchRec imports besides FBGEMM, by the name of its module: the extra `train` brings it.
_NEEDS_OF_TORCHREC = {"tensordict", "torchmetrics", "tqdm", "pyre_extensions"}


def installed(name: str) -> str | None:
    """The version of a distribution that is installed; None where it is not."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def minor(version: str) -> str:
    """The first two numbers of a version: 2.13 of 2.13.0+cpu."""
    return ".".join(version.partition("+")[0].split(".")[:2])


def set_for(torch: str | None) -> VersionSet | None:
    """The set of a version of torch; None where there is none."""
    return next((versions for versions in SETS if torch is not None and versions.torch == minor(torch)), None)


def how_to_predict(torch: str | None, build: str = "fbgemm-gpu-cpu") -> str:
    """What to type where FBGEMM is missing, or is one of another set.

    Args:
        torch: the version that is installed; of one without a set the newest that has one takes its place.
        build: of FBGEMM.
    """
    versions = set_for(torch) or SETS[-1]
    other_torch = "" if set_for(torch) else f"'torch=={versions.torch}.*' "
    return f"pip install {other_torch}'{build}=={versions.fbgemm}.*'"


def how_to_train(torch: str | None) -> str:
    """What to type where TorchRec or what it needs is missing: its own needs would bring FBGEMM's CUDA build."""
    versions = set_for(torch) or SETS[-1]
    return f"pip install 'torchdlrm[train]' && pip install --no-deps 'torchrec=={versions.torchrec}.*'"


def how_to_get(module: str) -> str | None:
    """What to type to get a module that pip does not bring by itself, or an extra does; None of others."""
    if module == "fbgemm_gpu":
        return f"{how_to_predict(installed('torch'))} (fbgemm-gpu in place of fbgemm-gpu-cpu where there is a GPU)"
    if module in {"torchrec", "tensorboard", *_NEEDS_OF_TORCHREC}:
        return how_to_train(installed("torch"))
    extra = {"onnx": "onnx", "onnxruntime": "onnx", "optuna": "sweep"}.get(module)
    return f"pip install 'torchdlrm[{extra}]'" if extra is not None else None


def find_misfit(versions: Mapping[str, str | None]) -> Misfit | None:
    """How versions or builds do not fit together; None where they do, or where one is missing.

    Args:
        versions: by name of the distribution, None where it is missing.
    """
    torch, torchrec = versions.get("torch"), versions.get("torchrec")
    builds = [name for name in BUILDS if versions.get(name)]
    if len(builds) == 2:
        return Misfit(
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed: they have the same files, and one lies over the other",
            f"pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu && {how_to_predict(torch)} "
            "(or fbgemm-gpu, where there is a GPU); each build needs a venv of its own "
            "(docs/faq.md#two-builds-of-fbgemm)",
            is_fatal=True,
        )
    if torch is None or not builds:
        return None
    (build,) = builds
    fbgemm, fitting = str(versions[build]), set_for(torch)
    if fitting is None:
        known = ", ".join(f"{one.torch} (with FBGEMM {one.fbgemm}, TorchRec {one.torchrec})" for one in SETS)
        why = f"torch {torch}: torchdlrm knows no FBGEMM that is built for it; those of torch {known} fit together"
    elif minor(fbgemm) != fitting.fbgemm:
        why = f"torch {torch} and {build} {fbgemm} do not fit together: FBGEMM {fitting.fbgemm} is for this torch"
    elif torchrec is not None and minor(torchrec) != fitting.torchrec:
        why = (
            f"torch {torch} and torchrec {torchrec} do not fit together: TorchRec {fitting.torchrec} is for this torch"
        )
        return Misfit(why, how_to_train(torch))
    else:
        return None
    return Misfit(why, f"{how_to_predict(torch, build)} && {how_to_train(torch).rpartition(' && ')[2]}")


def find_installed_misfit() -> Misfit | None:
    """How what is installed here does not fit together; None where it does."""
    return find_misfit({name: installed(name) for name in ("torch", "torchrec", *BUILDS)})
