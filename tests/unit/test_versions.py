"""The table of versions that fit together, and the files that repeat it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from torchdlrm.versions import SETS, VersionSet, how_to_get, minor

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]
TORCHREC_LINES = [
    line for line in (ROOT / "requirements" / "torchrec.txt").read_text().splitlines() if not line.startswith("#")
]


def allowed(lines, python):
    """The versions of torch, FBGEMM and TorchRec that requirements allow on a Python, one minor version each."""
    found = {}
    for requirement in map(Requirement, lines):
        if requirement.marker is None or requirement.marker.evaluate(
            {"python_version": python, "platform_machine": "x86_64"}
        ):
            (lower,) = (one.version for one in requirement.specifier if one.operator == ">=")
            upper = ".".join([lower.split(".")[0], str(int(lower.split(".")[1]) + 1)])
            assert str(requirement.specifier) == f"<{upper},>={lower}", requirement
            found[requirement.name.removesuffix("-cpu")] = lower
    return VersionSet(found["torch"], found["fbgemm-gpu"], found["torchrec"])


@pytest.mark.parametrize(("python", "versions"), [("3.11", SETS[0]), ("3.12", SETS[-1]), ("3.14", SETS[-1])])
def test_each_python_has_one_set_by_every_way_of_installing(python, versions):
    engine = [line for line in EXTRAS["gpu"] if not line.startswith("torchdlrm")]
    assert allowed(engine, python) == versions
    assert allowed([*EXTRAS["serve"], *TORCHREC_LINES], python) == versions
    assert EXTRAS["cpu"] == ["torchdlrm[serve,train]"]


def test_uv_installs_what_pip_does_but_for_what_torchrec_asks_for():
    assert PROJECT["dependency-groups"]["torchrec"] == [line.replace('"', "'") for line in TORCHREC_LINES]
    (torchrec,) = PROJECT["tool"]["uv"]["dependency-metadata"]
    needs = {Requirement(line).name for line in torchrec["requires-dist"]}
    assert needs == {Requirement(line).name for line in EXTRAS["train"]} - {"tensorboard"}


def test_the_bounds_of_torch_are_those_of_the_table():
    (torch,) = (line for line in PROJECT["project"]["dependencies"] if line.startswith("torch>"))
    major, last = SETS[-1].torch.split(".")
    assert torch == f"torch>={SETS[0].torch},<{major}.{int(last) + 1}"


@pytest.mark.parametrize("extra", ["cpu", "gpu"])
@pytest.mark.parametrize(("python", "versions"), [("3.11", SETS[0]), ("3.12", SETS[-1]), ("3.14", SETS[-1])])
def test_the_lock_is_whole_for_each_python_and_names_no_host(extra, python, versions):
    text = (ROOT / "requirements" / f"{extra}.lock").read_text()
    assert "http" not in text
    entries = [entry.partition(" \\") for entry in re.split(r"\n(?=\w)", text)]
    assert [line for line, _, hashes in entries if "--hash=sha256:" not in hashes] == []
    here = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_machine": "x86_64",
        "sys_platform": "linux",
    }
    lines = [one for one in (Requirement(line) for line, _, _ in entries) if one.marker.evaluate(here)]
    locked = {one.name: next(iter(one.specifier)).version for one in lines}
    assert len(locked) == len(lines)
    build = {"cpu": "fbgemm-gpu-cpu", "gpu": "fbgemm-gpu"}
    assert VersionSet(*(minor(locked[name]) for name in ("torch", build[extra], "torchrec"))) == versions
    assert ({*build.values()} - {build[extra]}).isdisjoint(locked)
    wanted = [*map(Requirement, [*PROJECT["project"]["dependencies"], *EXTRAS["train"]])]
    assert [str(one) for one in wanted if locked.get(one.name) not in one.specifier] == []  # else: make lock


def test_a_version_has_a_minor_one():
    assert [minor(version) for version in ("2.13.0+cpu", "2.14.1", "1.9.2")] == ["2.13", "2.14", "1.9"]


def test_what_an_extra_brings_names_the_extra():
    for module, extra in (("optuna", "sweep"), ("onnx", "onnx"), ("onnxruntime", "onnx")):
        assert how_to_get(module) == f"pip install 'torchdlrm[{extra}]'"
        assert any(line.startswith(module) for line in EXTRAS[extra])
    assert how_to_get("numpy") is None
