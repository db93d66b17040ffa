"""What a job of several processes says when one of them fails, without starting any."""

import json
import os
import re

import pytest
from torch import distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from torchdlrm.errors import LostProcessError, PlanError, TorchDLRMError, TrainingError
from torchdlrm.training.processes import launch as module
from torchdlrm.training.processes.launch import Processes, _reported_error, _why_it_failed


def report(folder, rank, kind, message):
    record = {"module": "torchdlrm.errors", "class": kind, "message": message}
    (folder / f"error-{rank}.json").write_text(json.dumps(record))


LOST = ("LostProcessError", "has lost another one")


@pytest.mark.parametrize(
    ("reports", "kind", "said"),
    [
        ([], type(None), "None"),
        ([("PlanError", "the tables do not fit")], PlanError, "the tables do not fit"),  # its exit code comes back too
        ([LOST], LostProcessError, "has lost another one"),
        ([LOST, ("TrainingError", "the loss is nan")], TrainingError, "the loss is nan"),
        ([("NoSuchError", "of another version")], TorchDLRMError, "of another version"),
    ],
)
def test_what_a_process_has_said_comes_back_as_itself_and_a_lost_one_only_where_no_other_says_why(
    reports, kind, said, tmp_path
):
    for rank, (name, message) in enumerate(reports):
        report(tmp_path, rank, name, message)
    found = _reported_error(tmp_path)
    assert type(found) is kind
    assert str(found) == said


def failure(exitcode, message=None, timestamp=0):
    found = ProcessFailure(local_rank=1, pid=7, exitcode=exitcode, error_file="<N/A>")
    found.message, found.timestamp = message or found.message, timestamp
    return found


@pytest.mark.parametrize(
    ("exitcode", "message", "told"),
    [
        (1, {"message": "ZeroDivisionError: by zero"}, r"ZeroDivisionError: by zero$"),
        (3, None, r"exit code 3$"),  # and not where torch documents its tracebacks
        (-9, None, r"it was ended by SIGKILL: Linux does so to a process when memory runs out"),
        (-6, None, r"it was ended by SIGABRT: NCCL does so .* has not answered for train.timeout_s"),
        (-11, None, r"it was ended by SIGSEGV$"),
        (-99, None, r"it was ended by signal 99$"),
    ],
)
def test_a_process_that_said_nothing_is_named_with_what_the_system_said(exitcode, message, told, tmp_path):
    failures = {1: failure(exitcode, message)}
    error = _why_it_failed(ChildFailedError("work", failures), tmp_path, Processes(2))
    assert type(error) is TrainingError
    assert re.match(f"process 1 of 2 failed: {told}", str(error))
    after = _why_it_failed(ChildFailedError("work", failures), tmp_path, Processes(2, max_restarts=3))
    assert str(after).startswith("process 1 of 2 failed (after 3 restarts): ")


def test_the_process_that_a_signal_has_ended_is_told_rather_than_that_another_has_lost_it(tmp_path):
    report(tmp_path, 0, *LOST)
    killed, lost = (ChildFailedError("work", {rank: failure(code)}) for rank, code in ((1, -9), (0, 1)))
    assert "process 1 of 2 failed: it was ended by SIGKILL" in str(_why_it_failed(killed, tmp_path, Processes(2)))
    assert type(_why_it_failed(lost, tmp_path, Processes(2))) is LostProcessError  # one that hangs has not died


def test_more_processes_than_cores_are_crowded_and_gpus_count_as_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert Processes(2, nnodes=9).crowding == ""
    assert Processes(3).crowding.startswith("this machine has 2 cores, ")
    assert Processes(3).crowding.endswith("2 or fewer fit")
    assert "100 s or more until all have loaded torch" in Processes(40).crowding
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert Processes(4).crowding == ""
    assert Processes(2, nnodes=3).world_size == 6


def test_a_failure_is_that_of_the_process_that_failed_first(tmp_path):
    failures = {0: failure(4, timestamp=2), 1: failure(5, timestamp=1)}
    error = _why_it_failed(ChildFailedError("work", failures), tmp_path, Processes(2))
    assert str(error) == "process 1 of 2 failed: exit code 5"


def test_what_nobody_expected_is_told_rather_than_that_a_process_was_lost_by_it(tmp_path):
    said = {"message": "ZeroDivisionError: by zero", "traceback": "Traceback ...\n"}
    (tmp_path / "unexpected-0").write_text(json.dumps(said))
    report(tmp_path, 1, *LOST)
    error = ChildFailedError("work", {1: failure(1)})
    found = _why_it_failed(error, tmp_path, Processes(2))
    assert str(found) == "process 0 of 2 failed: ZeroDivisionError: by zero"
    assert found.__notes__ == ["Traceback ..."]
    report(tmp_path, 1, "PlanError", "the tables do not fit")
    assert type(_why_it_failed(error, tmp_path, Processes(2))) is PlanError


def test_machines_that_lose_each_other_while_they_meet_are_told_to_start_again(monkeypatch):
    def lose(*_):
        message = "wait timeout after 60000ms, keys: /torch.rendezvous.r5.1/MASTER_ADDR"
        raise dist.DistStoreError(message)

    monkeypatch.setattr(module, "elastic_launch", lambda *_: lose)
    with pytest.raises(LostProcessError, match=r"met at here:29500 .* start it again on all: it resumes from the last"):
        module.launch(print, processes=Processes(1, nnodes=2, rdzv_endpoint="here:29500"))
