"""What is written down while a machine is examined, and what is made of it when that ends before its time."""

import json

import pytest

from torchdlrm.doctor.diagnose import read_findings
from torchdlrm.doctor.findings import Diagnosis
from torchdlrm.doctor.probe import Findings, describe, why_no_import
from torchdlrm.errors import TrainingError


@pytest.fixture
def findings(tmp_path):
    return Findings(tmp_path / "findings.jsonl")


def diagnosis(tmp_path, ended=""):
    found = Diagnosis()
    read_findings((tmp_path / "findings.jsonl").read_text().splitlines(), ended, found)
    return found


def fail():
    raise OSError("cannot") from ValueError("a reason\nin two lines")


def test_a_failure_has_its_causes_and_a_remedy_and_what_needs_it_is_not_run(findings, tmp_path):
    findings.try_out("a", lambda: "fine", "")
    findings.try_out("b", fail, "do this", "a")
    findings.try_out("c", fail, "do that", "b")
    findings.tell("machine", {"cores": "2"})
    found = diagnosis(tmp_path)
    assert [(check.name, check.outcome) for check in found.checks] == [("a", "ok"), ("b", "failed"), ("c", "not run")]
    assert found.checks[1].told == "OSError: cannot; caused by ValueError: a reason in two lines"
    assert found.checks[1].remedy == "do this"
    assert found.machine == {"cores": "2"}
    assert not found.as_dict()["works"]
    json.dumps(found.as_dict())


def test_an_error_of_ours_says_itself_what_caused_it():
    error = TrainingError("process 1 of 2 failed: too little memory")
    error.__cause__ = RuntimeError("what the launcher prints")
    assert describe(error) == "process 1 of 2 failed: too little memory"


def test_a_process_that_dies_has_failed_in_what_it_was_doing(findings, tmp_path):
    findings.try_out("a", lambda: "fine", "")
    findings.tell("begun", {"name": "b", "remedy": "do this"})
    found = diagnosis(tmp_path, "the process died by SIGSEGV")
    last = found.checks[-1]
    assert (last.name, last.outcome, last.told, last.remedy) == (
        "b",
        "failed",
        "the process died by SIGSEGV",
        "do this",
    )


@pytest.mark.parametrize("library", ["libnvidia-ml.so.1", "libcuda.so.1"])
def test_a_missing_driver_is_known_by_its_library(library):
    error = OSError("Could not load this library: fbgemm_gpu_config.so")
    error.__cause__ = OSError(f"{library}: cannot open shared object file")
    assert library in describe(error)
    assert "needs NVIDIA's driver" in why_no_import(error)
    assert "needs NVIDIA's driver" not in why_no_import(OSError("undefined symbol: _ZN3c10"))
