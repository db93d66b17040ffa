"""Trainings that run beside a test, which watches them, interrupts them and compares what they leave."""

import json
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from helpers.command_server import DLRM, shared_server, spawned_by

CONFIG = Path(__file__).parents[2] / "configs" / "criteo-small.toml"
STEPS = 134  # two epochs of 67 batches
OPTIONS = (
    *("--train.epochs", 2, "--checkpoint.every-steps", 10),
    *("--logging.every-steps", 10, "--logging.tensorboard", "false"),
)


class Process:
    """A `dlrm train` (or another `verb`) that runs beside the test, in a session of its own."""

    def __init__(self, *args, verb=("train", CONFIG), environment=None):
        self.args, self.verb = args, verb
        self.process = shared_server().start(
            [DLRM, *verb, *args],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "COLUMNS": "200", **(environment or {})},
            start_new_session=True,
        )

    def again(self):
        """The same command once more."""
        return Process(*self.args, verb=self.verb)

    def wait(self, timeout_s=240):
        """The exit code and the output, when all its processes have ended."""
        try:
            output, _ = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise
        return self.process.returncode, output

    def workers(self):
        """Process ids of its children that train."""
        return spawned_by(self.process.pid)

    def kill_all(self):
        with suppress(ProcessLookupError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        return self.wait()


def two_nodes(*arguments, first=(), second=(), verb=("train", CONFIG), environments=(None, None)):
    """Two `dlrm train` of one job (or another `verb`), with arguments of both and of each, and environments.

    The first one is that of the endpoint, as on machines of their own: here either could be, and the job ends with it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = (*arguments, "--nnodes", 2, "--rdzv-endpoint", f"127.0.0.1:{port}")
    node, poll = Process(*shared, *first, verb=verb, environment=environments[0]), threading.Event()
    while node.process.poll() is None and not listens(node.process.pid, port):
        poll.wait(0.02)
    return [node, Process(*shared, *second, verb=verb, environment=environments[1])]


def listens(pid, port):
    """Whether a process waits for connections at a port."""
    try:
        found = psutil.Process(pid).net_connections("tcp")
    except psutil.Error:  # it has ended
        return False
    return any(each.status == psutil.CONN_LISTEN and each.laddr.port == port for each in found)


def wait_until(condition, process, timeout_s=120):
    """Poll a condition on the files of a run, without guessing how long it takes."""
    poll = threading.Event()
    for _ in range(int(timeout_s / 0.02)):
        if condition():
            return
        assert process.process.poll() is None, process.wait()
        poll.wait(0.02)
    message = f"not within {timeout_s} s"
    raise AssertionError(message)


def checkpoints(run):
    return sorted(int(path.parent.name[5:]) for path in (run / "checkpoints").glob("step-*/checkpoint.json"))


def logged(run, *splits):
    """The lines of metrics.jsonl, of some splits or of all."""
    path = run / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [line for line in lines if not splits or line["split"] in splits]


def logged_steps(run):
    return [line["step"] for line in logged(run)]


def losses(run, split="train"):
    return [line["loss"] for line in logged(run, split)]


def state(run, tmp_path, step=STEPS):
    """Every tensor of a checkpoint, model and optimizer, by name."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}", tmp_path / "state.pt")
    flat = {}

    def walk(prefix, value):
        for key, inner in value.items():
            if isinstance(inner, dict):
                walk(f"{prefix}{key}/", inner)
            else:
                flat[f"{prefix}{key}"] = inner

    walk("", torch.load(tmp_path / "state.pt", weights_only=True))
    return flat
