"""What tests share: seeds, a small click log whose labels can be learnt, and the dataset that it becomes."""

import asyncio
import gc
import json
import multiprocessing.util
import os
import random
import shutil
import signal
import socket
import subprocess
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
# Tests and what they start share the cores: a team of threads would wait for whichever of them has none. Those that
# are about threads, and jobs that divide the cores among their processes, set their number themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """The suite computes on the processor wherever it runs; only `pytest tests/gpu`, by itself, sees the GPUs.

    What `multiprocessing` spawns need not load torch either, except with TORCHDLRM_REAL_PROCESSES=1.
    """
    if not all("gpu" in Path(arg.partition("::")[0]).as_posix() for arg in config.args):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        if not REAL_PROCESSES:
            multiprocessing.util.spawnv_passfds = lambda *arguments: shared_server().spawn(*arguments)


def pytest_collection_finish():
    """No later collection of garbage looks through the modules and tests that are there now."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """For `-n auto`: three processes for two cores. Tests often wait, for a process to end or for time to pass."""
    return len(os.sched_getaffinity(0)) * 3 // 2 or 1


from helpers.buckets import BUCKET, s3_server
from helpers.command_server import DLRM, REAL_PROCESSES, shared_server
from helpers.interactions import INTERACTIONS, overrides_of
from helpers.raw_logs import learnable_rows
from torchdlrm.data.dataset import Dataset
from torchdlrm.features.columns import LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, SplitRule, criteo_schema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess


@pytest.fixture
def seed():
    return 20_061_109


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
def two_labels(small_log, tmp_path_factory):
    """2,000 rows with a click and a purchase, which some clicks lead to: by what makes clicks, and chance."""
    path, rng = tmp_path_factory.mktemp("dataset") / "two", random.Random(0)
    rows = [line.partition("\t") for line in small_log.read_text().splitlines()[:2_000]]
    bought = [int(click == "1" and rng.random() < (0.7 if "0000001" in rest else 0.3)) for click, _, rest in rows]
    lines = [f"{click}\t{purchase}\t{rest}\n" for (click, _, rest), purchase in zip(rows, bought, strict=True)]
    (path.parent / "two.tsv").write_text("".join(lines))
    schema = criteo_schema()
    columns = (LabelColumn(name="click"), LabelColumn(name="purchase"), *schema.columns[1:])
    preprocess([path.parent / "two.tsv"], path, schema.with_columns(columns), PreprocessOptions(min_count=2))
    return Dataset.open(path)


@pytest.fixture(scope="session")
def histories(tmp_path_factory):
    """2,000 rows with an item and what was looked at before, which share a table; clicked where it is among these."""
    path, rng = tmp_path_factory.mktemp("dataset") / "histories", random.Random(0)
    rows = [(rng.randrange(9), rng.choices(range(9), k=rng.randrange(5))) for _ in range(2_000)]
    lines = [f"{int(rng.random() < 0.2 + 0.6 * (i in seen))}\t{i}\t{','.join(map(str, seen))}\n" for i, seen in rows]
    (path.parent / "log.tsv").write_text("".join(lines))
    history = {"value_separator": ",", "max_values": 4, "keep": "last", "table": "item"}
    columns = (SparseColumn(name="item", kind="int"), SparseColumn(name="history", kind="int", **history))
    schema = FeatureSchema(name="shop", columns=(LabelColumn(name="click"), *columns), split=SplitRule(rule="order"))
    return preprocess([path.parent / "log.tsv"], path, schema)


@pytest.fixture(scope="session")
def many_groups(small_log, tmp_path_factory):
    """4,286 training rows in part files, which are row groups, of 500 rows at most on average."""
    path = tmp_path_factory.mktemp("dataset") / "parts"
    return preprocess([small_log], path, criteo_schema(), PreprocessOptions(min_count=2, part_rows=500))


@pytest.fixture(scope="session")
def dlrm():
    """Runs the real `dlrm` command in a process of its own: dlrm("train", config, "--run", path) -> completed.

    With environment variables, which libraries read when they are loaded, the process starts from nothing.
    """

    def run(*args, cwd=None, timeout_s=240, **environment):
        command = [DLRM, *map(str, args)]
        whole = {**os.environ, "COLUMNS": "200", **environment}
        if not environment:
            return shared_server().run(command, cwd=cwd, env=whole, timeout_s=timeout_s)
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
    from starlette.applications import Starlette

    from torchdlrm.serving.front.http_server import HttpServer
    from torchdlrm.serving.options import ServeOptions
    from torchdlrm.serving.page.routes import page_routes

    listener, is_over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    async def main():
        server = HttpServer(Starlette(routes=page_routes()), ServeOptions())
        await server.start(listener)
        await asyncio.to_thread(is_over.wait)
        await server.stop(5)

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    is_over.set()
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


@pytest.fixture(scope="session", params=[name for name in INTERACTIONS if name != "dot"])
def interaction_run(request, small_dataset, tmp_path_factory):
    """The folder of a run of 30 steps on `small_dataset`, of each architecture besides `dot`; batch 301 is odd."""
    from torchdlrm.config import load_config
    from torchdlrm.training.job import train

    settings = {"train.batch_size_global": "301", "train.epochs": "2", "logging.every_steps": "1"}
    settings["train.precision"] = "float32"  # else the processor at hand decides, and bfloat16 rounds rank by rank
    path = tmp_path_factory.mktemp("run") / "run"
    config = load_config("criteo-small", settings | {"logging.tensorboard": "false"} | overrides_of(request.param))
    train(config, small_dataset, path)
    return path


@pytest.fixture(scope="session")
def small_bundle(small_run, small_dataset, tmp_path_factory):
    """The folder of a float32 bundle of `small_run`; not to be changed."""
    from torchdlrm.exporting.export import export

    path = tmp_path_factory.mktemp("bundle") / "small"
    export(small_run, path)
    return path


class RunningServer:
    """A `dlrm serve` process: where it is, and its end."""

    def __init__(self, process, told):
        self.process, self.url, self.grpc = process, told["url"], told["grpc"]
        self.model, self.version = told["model"], told["version"]
        self.period = told["period"]

    def stop(self, number=signal.SIGTERM):
        """The exit code after a signal, and the lines of the log."""
        self.process.send_signal(number)
        _, log = self.process.communicate(timeout=60)
        return self.process.returncode, [json.loads(line) for line in log.splitlines()]


@pytest.fixture(scope="module")
def serve():
    """Starts the real server on free ports, until the module ends: serve(bundle, "--workers", 2) -> RunningServer."""
    started = []

    def start(bundle, *args, max_open_files=None, **environment):
        options = {"env": {**os.environ, **environment}, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        command = [DLRM, "serve", str(bundle), "--json", "--port", "0", *map(str, args)]
        if max_open_files:  # set in the server's process alone: this one may already have more files open
            command = ["sh", "-c", f'ulimit -S -n {max_open_files}; exec "$@"', "sh", *command]
            process = subprocess.Popen(command, text=True, **options)
        else:
            process = shared_server().start(command, **options)
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


@pytest.fixture(scope="session")
def s3():
    """A real S3 server with the bucket `clicks`."""
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3, tmp_path, monkeypatch):
    """The URL of a prefix of its own in a bucket; this process and the commands that it starts can reach it.

    Their cache, as of a host that has read nothing yet, is `tmp_path / "cache"`.
    """
    for name, value in (s3.environment | {"TORCHDLRM_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{tmp_path.name}"
