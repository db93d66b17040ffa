"""What tests share: seeds, a small click log whose labels can be learnt, and the dataset that it becomes."""

import json
import math
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import hypothesis
import pytest

# A suite that was started in the background or by nohup ignores these, and so would every command that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# An example may take long because another test has the core.
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # as the command does; read when torch loads


def pytest_configure(config):
    """The suite computes on the processor wherever it runs; only `pytest tests/gpu`, by itself, sees the GPUs."""
    if not all("gpu" in Path(arg.partition("::")[0]).as_posix() for arg in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


from command_server import CommandServer
from torchdlrm.data.dataset import Dataset
from torchdlrm.features.schema import criteo_schema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess

REAL_ROWS = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture
def seed():
    return 20_061_109


def real_log(name):
    """The path of a file of real Criteo rows; skips the test where it is missing."""
    path = REAL_ROWS / name
    if not path.is_file():
        pytest.skip(f"needs real Criteo rows at {path.parent}, which may not be passed on")
    return path


def learnable_rows(num_rows, seed=0):
    """Lines of a log in the Criteo layout; clicks depend on int_0, cat_0 and the pair (cat_1, cat_2)."""
    rng = random.Random(seed)
    lines = []
    for _ in range(num_rows):
        ints = ["" if rng.random() < 0.2 else str(int(rng.expovariate(0.1))) for _ in range(13)]
        cats = ["" if rng.random() < 0.05 else f"{int(rng.paretovariate(1.0)) % 997:08x}" for _ in range(26)]
        score = 0.4 * math.log1p(int(ints[0] or 0)) - 1.5 + (len(cats[0]) and 1.2 * math.cos(int(cats[0], 16)))
        score += 1.0 if cats[1] == cats[2] else 0.0
        label = "1" if rng.random() < 1 / (1 + math.exp(-score)) else "0"
        lines.append("\t".join([label, *ints, *cats]))
    return lines


@pytest.fixture(scope="session")
def small_log(tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "small.tsv"
    path.write_text("\n".join(learnable_rows(5_000)) + "\n")
    return path


@pytest.fixture(scope="session")
def small_dataset(small_log, tmp_path_factory):
    """5,000 rows, of which 4,286 train, in row groups of 16,384: one row group a split."""
    path = tmp_path_factory.mktemp("dataset") / "small"
    preprocess([small_log], path, criteo_schema(), PreprocessOptions(min_count=2))
    return Dataset.open(path)


@pytest.fixture(scope="session")
def command_server():
    server = CommandServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def dlrm(request):
    """Runs the real `dlrm` command in a process of its own: dlrm("train", config, "--run", path) -> completed.

    With environment variables, which libraries read when they are loaded, the process starts from nothing.
    """

    def run(*args, cwd=None, timeout_s=240, **environment):
        command = [str(Path(sys.executable).with_name("dlrm")), *map(str, args)]
        whole = {**os.environ, "COLUMNS": "200", **environment}
        if not environment:
            server = request.getfixturevalue("command_server")
            return server.run(command, cwd=cwd, environment=whole, timeout_s=timeout_s)
        return subprocess.run(
            command, cwd=cwd, timeout=timeout_s, env=whole, capture_output=True, text=True, check=False
        )

    return run


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium; skips where none is installed. Of a module: while it runs, this thread has an event loop."""
    names = ("chromium", "chromium-browser", "google-chrome")
    program = next((path for path in map(shutil.which, names) if path), None)
    if program is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is on the path")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root, which CI often is, Chromium starts without its sandbox alone. It sees no page but ours.
        # Names that end in .example, which nobody has, lead to this machine: for tests of other people's pages.
        args = ["--host-resolver-rules=MAP *.example 127.0.0.1", *["--no-sandbox"] * (os.geteuid() == 0)]
        browser = playwright.chromium.launch(executable_path=program, args=args)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_server():
    """The page's files on a server of their own, without model or bundle: its address."""
    import uvicorn
    from starlette.applications import Starlette

    from torchdlrm.serving.page_routes import page_routes

    app = Starlette(routes=page_routes())
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a file system of its own with 16 kB; skips where a test may not mount one."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a small file system, which only root may")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture(scope="session")
def small_run(small_dataset, tmp_path_factory):
    """The folder of a run on `small_dataset`."""
    from torchdlrm.config import load_config
    from torchdlrm.training.job import train

    path = tmp_path_factory.mktemp("run") / "run"
    train(load_config("criteo-small", {"logging.tensorboard": "false"}), small_dataset, path)
    return path


@pytest.fixture(scope="session")
def small_bundle(small_run, small_dataset, tmp_path_factory):
    """The folder of a float32 bundle of `small_run`; not to be changed."""
    from torchdlrm.exporting.export import export

    path = tmp_path_factory.mktemp("bundle") / "small"
    export(small_run, path)
    return path


def evaluated(run, dataset, split):
    """Probabilities by the sharded model that `dlrm evaluate` builds, float32 [rows]."""
    import torch

    from torchdlrm.loader.loader import Loader
    from torchdlrm.training.checkpoint import find_checkpoint
    from torchdlrm.training.checkpointer import Checkpointer
    from torchdlrm.training.processes.process_group import join_process_group
    from torchdlrm.training.run import Run
    from torchdlrm.training.sharded import build_sharded_model

    run = Run.open(run)
    with join_process_group() as ranks:
        model = build_sharded_model(
            run.config,
            run.shape(dataset),
            num_embeddings=dataset.num_embeddings,
            dense_sample=None,
            ranks=ranks,
        ).module
        checkpointer = Checkpointer(run.checkpoints, model, None, ranks)
        checkpointer.load(find_checkpoint(run.checkpoints).step)
        checkpointer.close()
        model.eval()
        with torch.no_grad():
            logits = [model(batch)[1][1] for batch in Loader(dataset, split, batch_size_global=500)]
    return torch.cat(logits).sigmoid().numpy()


def rows_of_request(tensors, schema, max_rows):
    """The rows of a request of the Open Inference Protocol that holds these tensors."""
    from torchdlrm.serving.open_inference.columns import Inputs, rows_of_tensors

    inputs = Inputs(schema, max_rows, len(tensors))
    for tensor in tensors:
        inputs.place(tensor.name, tensor.datatype, tensor.shape)
    return rows_of_tensors(tensors, inputs)


class RunningServer:
    """A `dlrm serve` process: where it is, and its end."""

    def __init__(self, process, told):
        self.process, self.url, self.grpc = process, told["url"], told["grpc"]
        self.model, self.version = told["model"], told["version"]

    def stop(self, number=signal.SIGTERM):
        """The exit code after a signal, and the lines of the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@pytest.fixture(scope="session")
def serve():
    """Starts the real server on free ports, until the session ends: serve(bundle, "--workers", 2) -> RunningServer."""
    started = []

    def start(bundle, *args, max_open_files=None, **environment):
        command = [str(Path(sys.executable).with_name("dlrm")), "serve", str(bundle), "--json", "--port", "0"]
        if max_open_files:  # set in the server's process alone: this one may already have more files open
            command = ["sh", "-c", f'ulimit -S -n {max_open_files}; exec "$@"', "sh", *command]
        process = subprocess.Popen(
            [*command, *map(str, args)],
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        told = process.stdout.readline()
        assert told, process.communicate(timeout=60)[1]
        return RunningServer(process, json.loads(told))

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        if not process.stderr.closed:
            process.communicate(timeout=60)
