"""Whether installed packages fit together, by their versions alone."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from torchdlrm.doctor.packages import check_packages, requirements

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = PROJECT["dependencies"] + [
    f"{line}{' and' if ';' in line else ';'} extra == {name!r}" for name in EXTRAS for line in EXTRAS[name]
]
REQUIRED, FOR_TRAINING = requirements(LINES), requirements(LINES, "train")
OLDER = {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": None, "torchrec": "1.8.0"}
NEWEST = {"torch": "2.14.1", "fbgemm-gpu-cpu": "1.9.0", "torchrec": "1.9.2"}
CUDA = {"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}


def test_the_engine_comes_in_sets_and_everything_else_by_its_range():
    assert set(REQUIRED) == {Requirement(line).name for line in PROJECT["dependencies"]} - {"torch"}
    assert set(FOR_TRAINING) == {*REQUIRED, *(Requirement(line).name for line in EXTRAS["train"])}
    assert REQUIRED["polars"] == SpecifierSet("<3,>=2.1")


def checked(**changes):
    versions = {"polars": "2.1.0", "tensordict": "0.15.3"} | OLDER
    versions |= {name.replace("_", "-"): version for name, version in changes.items()}
    required = {"polars": REQUIRED["polars"]}
    for_training = required | {"tensordict": FOR_TRAINING["tensordict"]}
    return {check.name: check for check in check_packages(versions, required, for_training)}


@pytest.mark.parametrize(
    "changes", [{}, {"torch": "2.13.0+cu130"}, {"torch": "2.13.0+cu130"} | CUDA, {"torch": "2.13.0"} | CUDA, NEWEST]
)
def test_builds_that_work_together_fit(changes):
    found = checked(**changes)
    assert {check.outcome for check in found.values()} == {"ok"}


def test_what_serves_alone_is_no_failure_and_says_what_training_needs():
    found = checked(torchrec=None, tensordict=None)
    assert {name: check.outcome for name, check in found.items()} == {
        "versions": "ok",
        "builds": "ok",
        "training": "not run",
    }
    assert "pip install --no-deps 'torchrec==1.8.*'" in found["training"].remedy


BUILD, TORCHREC = "pip install 'fbgemm-gpu-cpu==1.9.*'", "pip install --no-deps 'torchrec==1.9.*'"


@pytest.mark.parametrize(
    ("changes", "name", "told", "remedy"),
    [
        ({"fbgemm-gpu": "1.8.0"}, "builds", "one lies over the other", "pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu"),
        (CUDA, "builds", "the CUDA build, which needs PyTorch's", "make install"),
        ({"fbgemm-gpu-cpu": None}, "builds", "fbgemm-gpu-cpu or fbgemm-gpu is missing", "'fbgemm-gpu-cpu==1.8.*'"),
        (
            {"torch": "2.12.1+cpu"},
            "builds",
            "torch 2.12.1+cpu: torchdlrm knows no FBGEMM",
            f"'torch==2.14.*' {BUILD[12:]}",
        ),
        ({"torch": "2.15.0"}, "builds", "torch 2.15.0: torchdlrm knows no FBGEMM", TORCHREC),
        ({"torch": "2.14.1"}, "builds", "FBGEMM 1.9 is for this torch", f"{BUILD} && {TORCHREC}"),
        ({"fbgemm-gpu-cpu": "1.9.0"}, "builds", "FBGEMM 1.8 is for this torch", "'fbgemm-gpu-cpu==1.8.*'"),
        (CUDA | {"torch": "2.14.1"}, "builds", "torch 2.14.1 and fbgemm-gpu 1.8.0", "pip install 'fbgemm-gpu==1.9.*'"),
        (NEWEST | {"torchrec": "1.8.0"}, "builds", "TorchRec 1.9 is for this torch", TORCHREC),
        ({"torchrec": None}, "training", "torchrec is missing", "pip install --no-deps 'torchrec==1.8.*'"),
        ({"tensordict": None}, "versions", "tensordict is missing", "make install"),
        ({"polars": "3.0.0"}, "versions", "polars 3.0.0 (wanted: <3,>=2.1)", "make install"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(changes, name, told, remedy):
    found = checked(**changes)
    assert found[name].outcome == "failed"
    assert told in found[name].told
    assert remedy in found[name].remedy
