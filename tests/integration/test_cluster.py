"""Trainings on several machines (two launchers on loopback), and launchers that are killed."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from helpers.trainings import CONFIG, OPTIONS, STEPS, Process, checkpoints, logged_steps, two_nodes, wait_until


@pytest.mark.slow
def test_machines_that_were_started_with_different_settings_refuse_alike(small_dataset, tmp_path):
    arguments = ("--dataset", small_dataset.path, "--run", tmp_path / "run", *OPTIONS)
    other = ("--table-optimizer.learning-rate", 0.5, "--train.timeout-s", 7, "--train.batch-size-global", 128)
    nodes = two_nodes(*arguments, second=(*other, "--max-restarts", 3))
    for code, output in (node.wait() for node in nodes):
        assert code == 2, output
        for name, before, now in (
            ("table_optimizer.learning_rate", 0.05, 0.5),
            ("train.timeout_s", 600.0, 7.0),
            ("train.batch_size_global", 64, 128),
            ("--max-restarts", 0, 3),
        ):
            (line,) = (line for line in output.splitlines() if f" {name}: " in line)
            assert f" {before} on node " in line
            assert f" {now} on node " in line
        assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_one_machine_refuses_before_it_starts_ends_the_other(small_dataset, tmp_path):
    nodes = two_nodes(
        *("--run", tmp_path / "run", *OPTIONS),
        first=("--dataset", small_dataset.path),
        second=("--dataset", tmp_path / "nowhere"),
    )
    for code, output in (node.wait() for node in nodes):
        assert code == 2, output
        assert f"{tmp_path}/nowhere: is not a folder" in output
        assert "Traceback" not in output
    assert checkpoints(tmp_path / "run") == []


def events(run):
    """Every (step, name) that TensorBoard shows of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return [(event.step, name) for name in found.Tags()["scalars"] for event in found.Scalars(name)]


@pytest.mark.slow
def test_after_a_launcher_is_killed_nothing_of_it_lives_on_and_each_step_is_logged_once(small_dataset, tmp_path, dlrm):
    """Twice: the first start leaves a run at step 0, the second one beyond its checkpoint."""
    run = tmp_path / "run"
    arguments = ("--dataset", small_dataset.path, "--run", run, *OPTIONS, "--checkpoint.every-steps", 50)
    arguments = (*arguments, "--logging.every-steps", 1, "--logging.tensorboard", "true", "--nproc-per-node", 2)
    for least_step in (30, 80):
        process = Process(*arguments)
        wait_until(lambda step=least_step: max(logged_steps(run), default=0) >= step, process)
        workers = [psutil.Process(pid) for pid in process.workers()]
        workers[1].suspend()  # one that is stopped, or hangs in a driver, must not outlive its launcher either
        process.process.kill()
        process.wait()
        gone, alive = psutil.wait_procs(workers, timeout=20)
        assert (len(gone), alive) == (2, [])
    (run / "checkpoints" / ".step-00000040.old").mkdir()
    (run / "checkpoints" / ".step-00000099.partial").mkdir()
    (run / "checkpoints" / ".step-00000099.partial" / "__0_0.distcp").write_text("half")
    for name in ("config.toml", "plan.json", "metrics.jsonl", "trackers.json"):
        (run / f".{name}.partial").write_text("half")
    done = dlrm("train", CONFIG, *arguments)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in run.rglob(".*")} == {".lock", ".metadata"}
    steps = [*range(1, STEPS + 1), STEPS]  # the last one of val
    assert logged_steps(run) == steps
    told = events(run)
    assert sorted(told) == sorted(set(told))
    assert sorted(step for step, name in told if name == "train/loss") == steps[:-1]


def is_asked_to_stop(pid):
    """Whether a SIGTERM waits for a process that is stopped."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("ShdPnd:"))
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["process", pytest.param("machine", marks=pytest.mark.thorough)])
def test_a_job_that_was_begun_with_restart_goes_on_when_a_process_or_a_machine_is_replaced(
    lost, small_dataset, tmp_path, dlrm
):
    """What was there before is removed, what the job itself has saved is not.

    Launchers count starts each for itself: one whose process hangs, as in a kernel of NCCL, sees another machine that
    waits, and starts again without counting; that of a new machine begins to count.
    """
    run = tmp_path / "run"
    arguments = ("--dataset", small_dataset.path, "--run", run, *OPTIONS)
    assert dlrm("train", CONFIG, *arguments, "--seed", 9, "--train.max-steps", 5).returncode == 0
    nodes = two_nodes(*arguments, "--restart", "--max-restarts", 6)
    wait_until(lambda: max(checkpoints(run), default=0) >= 10, nodes[0])
    hangs = nodes[0].workers()[0]
    if lost == "process":
        os.kill(hangs, signal.SIGSTOP)
        os.kill(nodes[1].workers()[0], signal.SIGKILL)
        wait_until(lambda: is_asked_to_stop(hangs), nodes[0])
        os.kill(hangs, signal.SIGCONT)
    else:
        nodes[1].kill_all()
        nodes[1] = nodes[1].again()
    outputs = []
    for node in nodes:
        code, output = node.wait()
        assert code == 0, output
        outputs.append(output)
    assert "resumed after" in "".join(outputs)
    assert logged_steps(run) == [*range(10, STEPS, 10), STEPS, STEPS]  # the last one of val


@pytest.mark.slow
def test_when_one_machine_loses_its_launcher_the_others_end_with_a_message(small_dataset, tmp_path):
    run = tmp_path / "run"
    options = (*OPTIONS, "--train.epochs", 50, "--train.timeout-s", 300)
    nodes = two_nodes("--dataset", small_dataset.path, "--run", run, *options)
    wait_until(lambda: len(logged_steps(run)) >= 2, nodes[0])
    workers = [psutil.Process(pid) for pid in nodes[0].workers()]
    nodes[0].process.kill()
    nodes[0].wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert alive == []
    code, output = nodes[1].wait(timeout_s=60)  # long before the timeout, which is for processes that say nothing
    assert code == 1, output
    assert "has lost another one, which died" in output
    assert "Traceback" not in output
