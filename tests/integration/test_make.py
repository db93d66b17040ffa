"""Targets of the Makefile: what they refuse, and the report of `make gpu-check`."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu_check():
    """The module behind `make gpu-check`."""
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "benchmarks" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("extra", "other"), [("gpu", "fbgemm_gpu_cpu-1.8.0"), ("cpu", "fbgemm_gpu-1.8.0")])
def test_one_build_of_fbgemm_is_not_installed_over_the_other(extra, other, tmp_path):
    """They have the same files: pip installs one over the other without a word, and what is left is neither."""
    (tmp_path / "lib" / "python3.11" / "site-packages" / f"{other}.dist-info").mkdir(parents=True)
    done = subprocess.run(
        ["make", "install", f"EXTRA={extra}", f"VENV={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stdout
    assert f"make install EXTRA={extra} VENV=.venv-{extra}" in done.stderr
    assert not (tmp_path / "bin").exists()


@pytest.mark.parametrize(
    ("settings", "installs"),
    [
        ((), "uv sync --quiet --python python3 --extra cpu --extra dev"),
        (("EXTRA=gpu",), "uv sync --quiet --python python3 --extra gpu --extra dev"),
        (
            ("PIP_FLAGS=--no-index",),
            "pip install --quiet --disable-pip-version-check --no-index --editable '.[cpu,dev]'",
        ),
        (("VERSIONS=newest", "PYTHON=python3.14"), "UV_PROJECT_ENVIRONMENT=.venv-newest"),
    ],
)
def test_uv_installs_where_it_is_there_and_pip_where_pip_is_given_flags(settings, installs, tmp_path):
    (tmp_path / "uv").write_text("")
    (tmp_path / "uv").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    for name in ("UV", "VERSIONS", "MAKEFLAGS"):  # by which CI asks for pip, and of the make that runs the tests
        environment.pop(name, None)
    command = ["make", "--dry-run", "--always-make", "install", *settings]
    said = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    assert installs in said
    assert ("uv sync" in said) != ("pip install" in said)


@pytest.mark.parametrize("num_gpus", [pytest.param(0, marks=pytest.mark.thorough), 2])
def test_the_report_has_all_three_and_measures_one_gpu_and_all(num_gpus, gpu_check, monkeypatch, tmp_path, capsys):
    """With a `dlrm` that says what is asked of it; without a GPU the tests are the real ones, which skip."""
    device = f"{num_gpus} x cuda (--nproc-per-node {num_gpus})" if num_gpus else "cpu"
    said = {"uses": {"device": device}, "rows_per_s": 1234.5}
    dlrm = tmp_path / "dlrm"
    dlrm.write_text(f"#!/bin/sh\necho to people >&2\ncat <<'E'\n{json.dumps(said)}\nE\n")
    dlrm.chmod(0o755)
    monkeypatch.setattr(gpu_check, "DLRM", str(dlrm))
    if num_gpus:
        monkeypatch.setattr(gpu_check, "TESTS", ["echo", "8 skipped"])
    monkeypatch.chdir(ROOT)
    assert gpu_check.check(tmp_path / "report.json", budget_s=200)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["works"]
    assert report["num_gpus"] == num_gpus
    assert "skipped" in report["tests"]["out"]
    assert list(report["bench_step_by_num_processes"]) == (["1", "2"] if num_gpus else ["1"])
    shown = capsys.readouterr().out
    assert ("there is no GPU" in shown) == (not num_gpus)
    assert "1,234 rows/s" in shown


def test_a_part_that_hangs_ends_in_time_and_one_without_a_result_has_none(gpu_check):
    hanging = gpu_check.run([sys.executable, "-c", "import time; print('begun', flush=True); time.sleep(60)"], 1.0)
    assert hanging["exit_code"] == -9
    assert hanging["seconds"] < 30
    broken = gpu_check.run_for_json([sys.executable, "-c", "import sys; sys.exit('no')"], 30)
    assert (broken["exit_code"], broken["result"], broken["said"]) == (1, None, "no\n")
