"""Somebody else's run is data to every command."""

import hashlib
import json
import pickle
import shutil

import pytest


class Trap:
    """Unpickles to the real thing, and says on the way that it was unpickled."""

    def __init__(self, path, real):
        self._code = f"(__import__('os').mkdir({str(path)!r}), __import__('pickle').loads({real!r}))[1]"

    def __reduce__(self):
        return eval, (self._code,)


@pytest.fixture
def trap(small_run, tmp_path):
    """A copy of a run whose description of its checkpoint is a program, and the folder which that program makes."""
    run, sprung = tmp_path / small_run.name, tmp_path / "sprung"
    shutil.copytree(small_run, run)
    (checkpoint,) = (run / "checkpoints").iterdir()
    path, record_path = checkpoint / ".metadata", checkpoint / "checkpoint.json"
    path.write_bytes(pickle.dumps(Trap(sprung, path.read_bytes())))
    record = json.loads(record_path.read_text())
    record["sha256"][".metadata"] = hashlib.sha256(path.read_bytes()).hexdigest()
    record_path.write_text(json.dumps(record))
    pickle.loads(path.read_bytes())
    assert sprung.exists(), "or this tests nothing"
    sprung.rmdir()
    return run, sprung


@pytest.mark.slow
def test_no_command_runs_what_a_run_brought(trap, small_dataset, small_log, small_bundle, dlrm, tmp_path):
    run, sprung = trap
    bundle = shutil.copytree(small_bundle, tmp_path / "bundle")  # verify finds the run beside it by itself
    for command in (
        ("evaluate", run),
        ("export", run, "--out", tmp_path / "out"),
        ("verify", bundle, small_log, "--dataset", small_dataset.path),
        ("inspect", run),
        ("report", run, "--out", tmp_path / "report.html"),
    ):
        done = dlrm(*command)
        assert not sprung.exists(), command
        assert "Traceback" not in done.stderr, (command, done.stderr)
        if command[0] in {"evaluate", "export", "verify"}:
            assert done.returncode == 2, (command, done.stderr)
            assert ".metadata: cannot be read: it names builtins.eval" in done.stderr.replace("\n", " "), command


@pytest.mark.slow
def test_a_resumed_training_does_not_run_what_a_run_brought(trap, small_dataset, dlrm):
    run, sprung = trap
    done = dlrm("train", run / "config.toml", "--dataset", small_dataset.path, "--run", run, "--train.epochs", 2)
    assert not sprung.exists()
    assert done.returncode == 2
    assert "it names builtins.eval" in done.stderr
    assert "Traceback" not in done.stderr
