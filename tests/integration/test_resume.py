"""Nothing lost: runs that are killed, stopped, or taken up by another number of processes."""

import json
import os
import random
import shutil
import signal
import subprocess
import threading
from contextlib import suppress

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.trainings import CONFIG, OPTIONS, STEPS, Process, checkpoints, logged_steps, state, two_nodes, wait_until
from torchdlrm import load_config, train
from torchdlrm.errors import TrainingError
from torchdlrm.files import sha256_of
from torchdlrm.training.processes.process_group import StopRequest
from torchdlrm.training.trainer import Trainer

NUM_KILLS = int(os.environ.get("TORCHDLRM_NUM_KILLS", "2"))  # CONTRIBUTING.md says when to ask for more
# What a job of two processes adds: more state of the tables, per weight and per row, and a counter of steps.
ADAM = (
    *("--table-optimizer.name", "adam", "--table-optimizer.learning-rate", 0.001),
    *("--table-optimizer.weight-decay", 0.1, "--table-optimizer.weight-decay-mode", "lazy"),
)
OPTIONS_OF = {1: OPTIONS, 2: (*OPTIONS, *ADAM, "--nproc-per-node", 2)}


def assert_same_bytes(run, expected, tmp_path):
    found = state(run, tmp_path)
    assert found.keys() == expected.keys()
    different = [
        name for name in found if not torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))
    ]
    assert different == []


@pytest.fixture(scope="module")
def uninterrupted(small_dataset, dlrm, tmp_path_factory):
    """The state at the end of runs without an interruption, by number of processes."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    states = {}
    for nproc in (1, 2):
        run = folder / f"run-{nproc}"
        options = (*OPTIONS_OF[nproc], "--checkpoint.every-steps", 0)  # the last step alone is looked at
        done = dlrm("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *options)
        assert done.returncode == 0, done.stderr
        states[nproc] = state(run, folder)
    return states


def test_a_checkpoint_holds_model_and_optimizer_state(uninterrupted):
    names = uninterrupted[1].keys()
    assert "model/model.sparse_arch.embedding_bag_collection.embedding_bags.t_cat_0.weight" in names
    assert any(name.startswith("optimizer/") and "momentum1" in name for name in names)
    for kept in ("momentum1", "exp_avg_sq", "prev_iter"):
        assert any(name.startswith("optimizer/") and name.endswith(f".{kept}") for name in uninterrupted[2])
    assert any(name.startswith("optimizer/") and "over_arch" in name and name.endswith("sum") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_killed_runs_end_with_the_bytes_of_an_uninterrupted_one(nproc, small_dataset, uninterrupted, tmp_path, seed):
    """kill -9 of everything, or of any one process, at random moments, also while a checkpoint is written."""
    rng = random.Random(seed + nproc)
    kills, run = 0, tmp_path / "run-0"
    while True:
        left_over = half_written(run)  # by the kill before: is not what this process writes
        process = Process("--dataset", small_dataset.path, "--run", run, *OPTIONS_OF[nproc])
        done = max(checkpoints(run), default=0)
        if kills < NUM_KILLS and done < STEPS - 30:
            if rng.random() < 0.5:
                target = done + rng.choice((10, 20))
                wait_until(lambda run=run, target=target: max(logged_steps(run), default=0) >= target, process)
                threading.Event().wait(rng.random() * 0.1)  # anywhere between two lines of the log
            else:
                # Or just after, where the write fell between two looks.
                wait_until(
                    lambda run=run, before=left_over, done=done: (
                        half_written(run) - before or max(checkpoints(run), default=0) > done
                    ),
                    process,
                )
            workers = process.workers()
            if workers and rng.random() < 0.5:
                os.kill(rng.choice(workers), signal.SIGKILL)
                code, output = process.wait()
                assert code == 1, output
            else:
                process.kill_all()
            kills += 1
            continue
        code, output = process.wait()
        assert code == 0, output
        assert_same_bytes(run, uninterrupted[nproc], tmp_path)
        steps = logged_steps(run)
        assert steps == sorted(steps)  # lines beyond the checkpoint were taken back
        assert steps.count(STEPS) == 2  # one of train, one of val
        if kills >= NUM_KILLS:
            break
        run = tmp_path / f"run-{kills}"


def half_written(run):
    """The checkpoints that are being written, or were when their writer was killed."""
    folders = set()
    for path in (run / "checkpoints").glob(".step-*.partial"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            folders.add((path.name, path.stat().st_ino))
    return folders


@pytest.mark.slow
def test_a_run_goes_on_on_another_number_of_processes_and_reads_the_same_rows(small_dataset, dlrm, tmp_path):
    """2 -> 1 -> 3 processes over two epochs: rows, losses and weights of a run that one process made without a break.

    Few and large steps: each adds rounding, which the optimizer's first steps on a row magnify.
    """
    run, whole = tmp_path / "run", tmp_path / "whole"
    options = (*ADAM, "--train.batch-size-global", 256, "--train.epochs", 2, "--logging.every-steps", 1)
    arguments = ("train", CONFIG, "--dataset", small_dataset.path, *options)
    assert dlrm(*arguments, "--run", whole).returncode == 0
    for nproc, max_steps in ((2, 10), (1, 23), (3, 34)):
        done = dlrm(*arguments, "--run", run, "--nproc-per-node", nproc, "--train.max-steps", max_steps)
        assert done.returncode == 0, done.stderr
    found, expected = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()] for path in (run, whole)
    )
    found, expected = ([line for line in lines if line["split"] == "train"] for lines in (found, expected))
    assert [(line["step"], line["rows"]) for line in found] == [(line["step"], line["rows"]) for line in expected]
    assert found[-1]["rows"] == 2 * small_dataset.splits["train"].rows
    assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], abs=1e-4)
    weights = state(whole, tmp_path, 34)
    for name, value in state(run, tmp_path, 34).items():
        if name.startswith("model/"):
            torch.testing.assert_close(value, weights[name], atol=1e-3, rtol=0, msg=name)


@pytest.mark.parametrize(
    ("number", "nproc"),
    [(signal.SIGTERM, 1), (signal.SIGINT, 1), pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow)],
)
def test_a_signal_saves_and_exits_and_the_same_command_goes_on(
    number, nproc, small_dataset, uninterrupted, dlrm, tmp_path
):
    run = tmp_path / "run"
    arguments = ("--dataset", small_dataset.path, "--run", run, *OPTIONS_OF[nproc], "--checkpoint.every-steps", 0)
    process = Process(*arguments)
    wait_until(lambda: len(logged_steps(run)) >= 2, process)
    process.process.send_signal(number)
    code, output = process.wait()
    assert code == 130, output
    assert "saved: the same command resumes there" in output
    assert "Traceback" not in output
    saved = checkpoints(run)[-1]
    assert 20 <= saved < STEPS
    done = dlrm("train", CONFIG, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"resumed after {saved}" in done.stderr
    assert_same_bytes(run, uninterrupted[nproc], tmp_path)


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_the_job_ends_by_itself(small_dataset, uninterrupted, tmp_path):
    run = tmp_path / "run"
    process = Process("--dataset", small_dataset.path, "--run", run, *OPTIONS_OF[2], "--max-restarts", 2)
    wait_until(lambda: max(checkpoints(run), default=0) >= 10, process)
    os.kill(process.workers()[1], signal.SIGKILL)
    code, output = process.wait()
    assert code == 0, output
    assert "resumed after" in output
    assert_same_bytes(run, uninterrupted[2], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("after_start_s", [0, 1, 2])
def test_ctrl_c_before_the_first_step_says_that_nothing_was_saved(after_start_s, small_dataset, tmp_path):
    """As from a terminal: all processes of the job get it, in whatever they are just doing."""
    run = tmp_path / "run"
    options = (*OPTIONS, "--train.epochs", 50)
    process = Process("--dataset", small_dataset.path, "--run", run, *options, "--nproc-per-node", 2)
    wait_until(lambda: len(process.workers()) == 2, process)
    threading.Event().wait(after_start_s)
    os.killpg(process.process.pid, signal.SIGINT)
    code, output = process.wait()
    assert code == 130, output
    assert "Traceback" not in output
    assert "KeyboardInterrupt" not in output
    if checkpoints(run):
        assert "saved: the same command resumes there" in output
    else:
        assert "interrupted; nothing was saved after the last checkpoint, if any" in output


@pytest.mark.slow
def test_a_hung_process_ends_the_job_with_a_message(small_dataset, tmp_path):
    run = tmp_path / "run"
    options = (*OPTIONS, "--nproc-per-node", 2, "--train.timeout-s", 5, "--train.epochs", 50)
    process = Process("--dataset", small_dataset.path, "--run", run, *options)
    wait_until(lambda: len(logged_steps(run)) >= 2, process)
    hung = process.workers()[1]
    os.kill(hung, signal.SIGSTOP)
    poll = threading.Event()
    try:
        for _ in range(2000):
            if len(process.workers()) < 2 or process.process.poll() is not None:
                break
            poll.wait(0.05)
    finally:
        os.kill(hung, signal.SIGCONT)  # lets the agent's SIGTERM through, in place of its SIGKILL much later
    code, output = process.wait()
    assert code == 1, output
    assert "has lost another one, which died or has not answered for 5 s (train.timeout_s)" in output


@pytest.mark.slow
def test_two_nodes_find_each_other_and_train_as_one(small_dataset, uninterrupted, tmp_path):
    run = tmp_path / "run"
    options = (*OPTIONS, *ADAM, "--checkpoint.every-steps", 50)
    for node in two_nodes("--dataset", small_dataset.path, "--run", run, *options):
        code, output = node.wait()
        assert code == 0, output
    assert_same_bytes(run, uninterrupted[2], tmp_path)


def test_a_second_run_on_the_same_folder_is_refused(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    arguments = ("--dataset", small_dataset.path, "--run", run, *OPTIONS, "--train.epochs", 200)
    process = Process(*arguments)
    try:
        wait_until(lambda: logged_steps(run), process)
        done = dlrm("train", CONFIG, *arguments)
        assert done.returncode == 2
        assert "another process is training in" in done.stderr
    finally:
        process.kill_all()


def test_changes_of_the_config_are_told_key_by_key(small_dataset, dlrm, tmp_path):
    run = tmp_path / "run"
    arguments = ("train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--train.max-steps", 5)
    assert dlrm(*arguments).returncode == 0
    done = dlrm(*arguments, "--seed", 9, "--table-optimizer.name", "sgd", "--logging.every-steps", 7)
    assert done.returncode == 2
    for text in (
        "seed: was 0, is 9; the saved state",
        "table_optimizer.name: was rowwise_adagrad, is sgd; the saved state",
        "logging.every_steps: was 100, is 7; would do no harm",
        "--restart",
    ):
        assert text in done.stderr
    done = dlrm(*arguments, "--logging.every-steps", 7, "--dry-run")
    assert done.returncode == 0
    assert "changed since the run was started: logging.every_steps: was 100, is 7" in done.stderr
    assert dlrm(*arguments, "--seed", 9, "--restart").returncode == 0
    assert "seed = 9" in (run / "config.toml").read_text()
    assert checkpoints(run) == [5]


def test_a_damaged_checkpoint_is_found_and_the_one_before_is_used(small_dataset, uninterrupted, dlrm, tmp_path):
    run = tmp_path / "run"
    arguments = ("train", CONFIG, "--dataset", small_dataset.path, "--run", run, *OPTIONS)
    assert dlrm(*arguments, "--train.max-steps", 55).returncode == 0
    assert checkpoints(run) == [50, 55]
    path = run / "checkpoints" / "step-00000055" / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    done = dlrm("evaluate", run)
    assert done.returncode == 2
    assert "__0_0.distcp: damaged, its sha256 is not that in checkpoint.json" in done.stderr
    done = dlrm(*arguments)
    assert done.returncode == 0, done.stderr
    assert "going back to the checkpoint before" in done.stderr
    assert "resumed after 50" in done.stderr
    assert_same_bytes(run, uninterrupted[1], tmp_path)


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 7 MB."""
    folder = tmp_path / "run"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", folder]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_during_a_checkpoint_keeps_the_ones_before_and_the_run_going(
    small_disk, small_dataset, uninterrupted, dlrm, tmp_path
):
    arguments = ("train", CONFIG, "--dataset", small_dataset.path, "--run", small_disk, *OPTIONS)
    done = dlrm(*arguments, "--checkpoint.keep-last", 100)
    assert done.returncode == 1
    assert "could not be written, training continues without it" in done.stderr
    assert "No space left" in done.stderr
    assert f"trained to step {STEPS}, but it could not be saved" in done.stderr
    assert "Traceback" not in done.stderr
    saved = checkpoints(small_disk)
    assert saved[:1] == [10]
    assert saved[-1] < STEPS
    subprocess.run(["mount", "-o", "remount,size=100m", small_disk], check=True)
    done = dlrm(*arguments)
    assert done.returncode == 0, done.stderr
    assert f"resumed after {saved[-1]}" in done.stderr
    assert_same_bytes(small_disk, uninterrupted[1], tmp_path)


def test_an_interruption_on_a_full_disk_does_not_say_that_it_was_saved(small_disk, small_dataset):
    subprocess.run(["mount", "-o", "remount,size=200k", small_disk], check=True)
    process = Process(
        *("--dataset", small_dataset.path, "--run", small_disk / "run", *OPTIONS, "--train.epochs", 50),
        *("--checkpoint.every-steps", 0, "--logging.tensorboard", "true"),
    )
    wait_until(lambda: len(logged_steps(small_disk / "run")) >= 2, process)
    process.process.send_signal(signal.SIGTERM)
    code, output = process.wait()
    assert code == 130, output
    assert "but it could not be saved (see above)" in output
    assert "saved: the same command" not in output
    assert "Traceback" not in output
    assert checkpoints(small_disk / "run") == []


def test_a_loss_that_is_not_finite_stops_with_step_and_rows(small_dataset, dlrm, tmp_path):
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", tmp_path / "run", *OPTIONS),
        *("--dense-optimizer.name", "sgd", "--dense-optimizer.learning-rate", 1e12),
    )
    assert done.returncode == 1
    assert "the loss is" in done.stderr
    assert "(training rows " in done.stderr
    assert "try a lower table_optimizer.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["asynchronous", "synchronous", "signal"])
def test_no_checkpoint_holds_what_is_not_finite_where_the_loss_is_seldom_looked_at(
    when, small_dataset, tmp_path, monkeypatch
):
    """As on a GPU, where the loss is not looked at between two lines of the log."""
    monkeypatch.setattr(Trainer, "_refuse_if_not_finite", lambda *_: None)
    if when == "signal":
        monkeypatch.setattr(StopRequest, "poll", lambda _, step, *, save_is_due: (step == 30, save_is_due))
    settings = {
        "train.epochs": "2",
        "train.precision": "float32",
        "dense_optimizer.name": "sgd",
        "dense_optimizer.learning_rate": "1e12",
        "logging.every_steps": "50",
        "logging.tensorboard": "false",
        "checkpoint.every_steps": "100" if when == "signal" else "1",
        "checkpoint.asynchronous": str(when != "synchronous").lower(),
    }
    with pytest.raises(TrainingError, match=r"^after step \d+ there is NaN or infinity in "):
        train(load_config(CONFIG, settings), small_dataset, tmp_path / "run")
    saved = checkpoints(tmp_path / "run")
    assert saved == ([] if when == "signal" else [1])
    for step in saved:
        weights = state(tmp_path / "run", tmp_path, step)
        assert all(torch.isfinite(value).all() for name, value in weights.items() if name.startswith("model/"))


def test_stopping_early_by_target(small_dataset, dlrm, tmp_path):
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", tmp_path / "run", "--json"),
        *("--stop.target-auc", 0.51, "--validation.every-steps", 10, "--train.epochs", 20),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["stopped_because"] == "target_auc"
    assert summary["step"] < 20 * 67
    assert checkpoints(tmp_path / "run")[-1] == summary["step"]
    assert summary["best_step"] in checkpoints(tmp_path / "run")


@pytest.mark.slow
def test_evaluation_and_export_take_the_best_checkpoint_and_say_so(small_log, small_dataset, dlrm, tmp_path):
    """A run that early stopping ended: its last checkpoint is worse, by the validations that stopped it."""
    run = tmp_path / "run"
    done = dlrm(
        *("train", CONFIG, "--dataset", small_dataset.path, "--run", run, "--json", "--checkpoint.keep-last", 1),
        *("--stop.patience-validations", 2, "--validation.every-steps", 10, "--train.epochs", 20),
    )
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    best, last = summary["best_step"], summary["step"]
    assert best < last < 20 * 67
    assert summary["stopped_because"] == "patience"
    assert f"takes step {best}, the best of the val split" in done.stderr
    assert checkpoints(run) == [best, last]
    aucs = {}
    for asked, step, kind in (("", best, "best"), ("last", last, "last"), (best, best, "step")):
        done = dlrm("evaluate", run, "--split", "val", "--json", *(("--checkpoint", asked) if asked else ()))
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert (result["step"], result["checkpoint"]) == (step, kind)
        aucs[kind] = result["auc"]
    assert aucs["best"] == aucs["step"] == pytest.approx(summary["best_auc"])
    assert aucs["last"] < aucs["best"]
    done = dlrm("export", run, "--out", tmp_path / "bundle")
    assert done.returncode == 0, done.stderr
    assert f"at step {best}, the best of the val split" in done.stderr
    source = json.loads((tmp_path / "bundle" / "bundle.json").read_text())["source"]
    assert (source["step"], source["checkpoint"]) == (best, "best")
    done = dlrm("verify", tmp_path / "bundle", small_log, "--dataset", small_dataset.path, "--run", run)
    assert f"at step {best}, the best of the val split" in done.stderr, done.stderr
    shutil.rmtree(run / "checkpoints" / f"step-{best:08d}")
    done = dlrm("evaluate", run)
    assert done.returncode == 2
    assert f"does not have the best of the val split, step {best}; give last, or one of the steps {last}" in done.stderr


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_last_steps_that_were_saved_as_float32_are_read(small_dataset, tmp_path):
    """As they were before, by a resumed run and by one that is started from it; whole numbers count further."""
    overrides = {
        "table_optimizer.weight_decay": "0.01",
        "table_optimizer.weight_decay_mode": "lazy",
        "logging.tensorboard": "false",
        "checkpoint.every_steps": "5",
    }
    short, long = (load_config("criteo-small", overrides | {"train.max_steps": str(steps)}) for steps in (5, 10))
    train(short, small_dataset, tmp_path / "new")
    before = shutil.copytree(tmp_path / "new", tmp_path / "old")
    checkpoint = before / "checkpoints" / "step-00000005"
    _save_last_steps_as_float32(checkpoint)
    found = []
    for name in ("new", "old"):
        train(long, small_dataset, tmp_path / f"from-{name}", from_run=tmp_path / name)
        train(long, small_dataset, tmp_path / name)
        found.append([state(tmp_path / run, tmp_path, 10) for run in (name, f"from-{name}")])
    for new, old in zip(*found, strict=True):
        assert any(name.endswith("prev_iter") for name in new)
        assert all(torch.equal(torch.as_tensor(new[name]), torch.as_tensor(old[name])) for name in new)


def _save_last_steps_as_float32(checkpoint):
    dcp_to_torch_save(checkpoint, checkpoint.parent / "state.pt")
    content = torch.load(checkpoint.parent / "state.pt")
    changed = 0
    for values in content["optimizer"]["state"].values():
        for name in [name for name in values if name.endswith("prev_iter")]:
            assert values[name].dtype == torch.int32
            values[name] = values[name].float()
            changed += 1
    assert changed
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    for name in record["sha256"].keys() - {"checkpoint.json"}:
        (checkpoint / name).unlink()
        del record["sha256"][name]
    save(content, storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    for path in checkpoint.iterdir():
        if path.name != "checkpoint.json":
            record["sha256"][path.name] = sha256_of(path)
    (checkpoint / "checkpoint.json").write_text(json.dumps(record))
