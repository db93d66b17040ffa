"""What a process of a job raises reaches whoever started the job, as it was."""

import atexit
import gc
import multiprocessing.util
import os
import shutil
import signal
import time

import psutil
import pytest
import torch

from helpers.command_server import spawn_from_nothing
from torchdlrm.errors import ConfigError, Interrupted, LostProcessError, TrainingError
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group


def note_at_the_end(path):
    atexit.register(lambda: path.write_text(str(gc.get_freeze_count())))


def test_a_process_ends_without_looking_through_what_it_has_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_from_nothing)
    launch(note_at_the_end, tmp_path / "frozen", processes=Processes(1, max_restarts=1))
    assert int((tmp_path / "frozen").read_text()) > 100_000  # objects of torch


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_processes_are_started_leaves_none_behind_that_prints_a_traceback(number, monkeypatch, capfd):
    """The first one exists then and waits to be told what to do, and the second one does not exist."""
    started = []

    def spawn_and_interrupt(path, args, descriptors):
        pid = spawn_from_nothing(path, args, descriptors)
        if "spawn_main" in str(args):
            started.append(pid)
            os.kill(os.getpid(), number)
        return pid

    monkeypatch.setattr(multiprocessing.util, "spawnv_passfds", spawn_and_interrupt)
    with pytest.raises(Interrupted, match="nothing was saved"):
        launch(mix, processes=Processes(2))
    assert started
    assert not any(map(psutil.pid_exists, started))
    assert capfd.readouterr().err == ""


def test_the_end_of_the_terminal_does_not_end_a_job_under_nohup(monkeypatch):
    def hang_up(*_):
        signal.raise_signal(signal.SIGHUP)
        return {0: "done"}

    monkeypatch.setattr("torchdlrm.training.processes.launch.elastic_launch", lambda *_: hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert launch(mix, processes=Processes(2)) == "done"
    finally:
        signal.signal(signal.SIGHUP, before)


class UnknownColourError(TrainingError):
    """Of a module of one's own, and made of something else than its message."""

    def __init__(self, colour, rank):
        super().__init__(f"{colour} on rank {rank}")
        self.colour = colour


def mix():
    raise UnknownColourError("mauve", 3)


def test_an_exception_of_any_module_comes_back_from_a_process_as_itself(monkeypatch):
    """And torch's launcher does not read the source of all modules, which it does for records that are not kept."""
    monkeypatch.setattr("inspect.stack", None)
    with pytest.raises(UnknownColourError, match=r"^mauve on rank 3$"):
        launch(mix, processes=Processes(2))


def break_down_among_others():
    with join_process_group(timeout_s=60) as ranks:
        if ranks.rank == 1:
            raise ZeroDivisionError("by the second process")
        torch.distributed.barrier()


def test_what_nobody_expects_is_told_with_its_traceback_and_not_that_another_process_has_lost_it():
    with pytest.raises(TrainingError) as caught:
        launch(break_down_among_others, processes=Processes(2))
    assert str(caught.value) == "process 1 of 2 failed: ZeroDivisionError: by the second process"
    (traceback,) = caught.value.__notes__
    assert traceback.startswith("Traceback")
    assert 'raise ZeroDivisionError("by the second process")' in traceback


def run_out_of_memory(folder):
    with join_process_group(timeout_s=60) as ranks:
        with (folder / f"rank-{ranks.rank}").open("a") as file:
            file.write("started ")
        if ranks.rank == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")
        torch.distributed.barrier()


def test_a_process_without_memory_says_what_helps_and_is_not_started_again(tmp_path):
    with pytest.raises(
        TrainingError, match=r"^process 1 of 2 has too little memory: it asked for 2.50 GiB; it has held up to "
    ):
        launch(run_out_of_memory, tmp_path, processes=Processes(2, max_restarts=1))
    assert {path.read_text() for path in tmp_path.iterdir()} == {"started "}


def kill_the_second():
    with join_process_group(timeout_s=60) as ranks:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        torch.distributed.barrier()


def test_a_process_that_was_killed_is_told_and_not_that_another_has_lost_it():
    with pytest.raises(TrainingError, match=r"^process 1 of 2 failed: it was ended by SIGKILL: "):
        launch(kill_the_second, processes=Processes(2))


def join_but_one():
    if os.environ["RANK"] == "1":
        time.sleep(120)  # until it is told to end
    with join_process_group(timeout_s=2):
        pass


@pytest.mark.slow
def test_a_process_that_never_joins_the_others_is_told_as_a_lost_one():
    with pytest.raises(LostProcessError, match="has lost another one, which died or has not answered for 2 s"):
        launch(join_but_one, processes=Processes(2))


def join_as_a_node():
    """What the second of two machines says that has been told to use GPUs and has none, and what the first hears."""
    os.environ |= {"LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "GROUP_RANK": os.environ["RANK"]}
    os.environ |= {"GROUP_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}
    is_second = os.environ["RANK"] == "1"
    with pytest.raises(ConfigError) as told, join_process_group(timeout_s=60, device="cuda" if is_second else "auto"):
        pass
    problem = f"{told.value} {told.value.is_everywhere}"
    return problem if not is_second else None


def test_a_machine_without_its_gpus_ends_the_others_with_its_reason_before_they_choose_how_to_talk():
    told = launch(join_as_a_node, processes=Processes(2))
    assert "another machine of this training cannot start:" in told
    assert "node 1 (" in told
    assert "train.device = cuda: " in told
    assert told.endswith("True")


def test_tables_that_do_not_fit_are_wrong_input_also_where_a_child_process_finds_out(small_run, dlrm, tmp_path):
    run = shutil.copytree(small_run, tmp_path / "run")
    done = dlrm("evaluate", run, "--nproc-per-node", 2, "--sharding.host-memory-bytes", 1000)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "do not fit" in done.stderr
