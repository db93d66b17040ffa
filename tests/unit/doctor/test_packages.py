"""Whether installed packages fit together, by their versions alone."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from torchdlrm.doctor.packages import check_packages, requirements

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINES = PROJECT["dependencies"] + [f'{line}; extra == "{name}"' for name in EXTRAS for line in EXTRAS[name]]
REQUIRED = requirements(LINES)
FITTING = dict.fromkeys(REQUIRED, "2.13.1") | {"torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "fbgemm-gpu": None}


def test_what_computes_is_required_and_what_is_optional_is_not():
    assert set(REQUIRED) == {Requirement(line).name for line in PROJECT["dependencies"] + EXTRAS["cpu"] + EXTRAS["gpu"]}
    assert REQUIRED["torch"] == SpecifierSet("<2.14,>=2.13")


def checked(**changes):
    versions = FITTING | {name.replace("_", "-"): version for name, version in changes.items()}
    required = {name: REQUIRED[name] for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "polars")}
    versions |= {"torchrec": versions["torchrec"] if "torchrec" in changes else "1.8.0"}
    return {check.name: check for check in check_packages(versions, required)}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"torch": "2.13.0+cu130"},
        {"torch": "2.13.0+cu130", "fbgemm_gpu_cpu": None, "fbgemm_gpu": "1.8.0"},
        {"torch": "2.13.0", "fbgemm_gpu_cpu": None, "fbgemm_gpu": "1.8.0"},
    ],
)
def test_builds_that_work_together_fit(changes):
    found = checked(**changes)
    assert {check.outcome for check in found.values()} == {"ok"}


@pytest.mark.parametrize(
    ("changes", "name", "told"),
    [
        ({"fbgemm_gpu": "1.8.0"}, "builds", "one lies over the other"),
        ({"fbgemm_gpu_cpu": None, "fbgemm_gpu": "1.8.0"}, "builds", "the CUDA build, which needs PyTorch's"),
        ({"fbgemm_gpu_cpu": None}, "versions", "fbgemm-gpu-cpu or fbgemm-gpu is missing"),
        ({"torch": "2.12.1+cpu"}, "versions", "torch 2.12.1+cpu (wanted: <2.14,>=2.13)"),
        ({"fbgemm_gpu_cpu": "1.7.0"}, "versions", "fbgemm-gpu-cpu 1.7.0 (wanted"),
        ({"torchrec": None}, "versions", "torchrec is missing"),
    ],
)
def test_what_does_not_fit_is_told_with_a_remedy(changes, name, told):
    found = checked(**changes)
    assert found[name].outcome == "failed"
    assert told in found[name].told
    assert "make install" in found[name].remedy
