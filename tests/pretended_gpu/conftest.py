"""The tests of this folder run on a pretended GPU, and only where they are asked to: `make test-pretended-gpu`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IS_PRETENDED = "PRETENDED_GPUS" in os.environ  # libraries.py sets it
if IS_PRETENDED:
    import pretend  # noqa: F401 - first, so that what follows sees the changed TorchRec


def pytest_collection_modifyitems(items):
    if IS_PRETENDED:
        return
    skip = pytest.mark.skip(reason="runs on a pretended GPU, in a venv of its own: make test-pretended-gpu")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def on_gpus():
    """Runs `dlrm` in a process of its own: on_gpus(2, "train", config, "--run", path) -> completed."""

    def run(num_gpus, *args, cwd=None, timeout_s=600):
        return _run(args, cwd, timeout_s, {"PRETENDED_GPUS": str(num_gpus)})

    return run


@pytest.fixture(scope="session")
def without_driver():
    """Runs `dlrm` as on a host that has the CUDA builds and no driver."""
    from libraries import BUILT

    left_out = {
        "LD_PRELOAD": "",
        "LD_LIBRARY_PATH": ":".join(p for p in os.environ["LD_LIBRARY_PATH"].split(":") if p != str(BUILT)),
    }
    loads = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libnvidia-ml.so.1')"]
    if not subprocess.run(loads, env={**os.environ, **left_out}, capture_output=True, check=False).returncode:
        pytest.skip("this host has a driver")

    def run(*args, cwd=None, timeout_s=600):
        command = [str(Path(sys.executable).with_name("dlrm"))]
        return _run(args, cwd, timeout_s, left_out, command)

    run.environment = left_out
    return run


def _run(args, cwd, timeout_s, environment, command=(sys.executable, str(HERE / "command.py"))):
    return subprocess.run(
        [*command, *map(str, args)],
        cwd=cwd,
        timeout=timeout_s,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="session")
def train_args():
    """The words of a short training: train_args(dataset, run, num_gpus)."""

    def words(dataset, run, num_gpus, max_steps=20):
        return (
            *("train", "criteo-small", "--dataset", dataset.path, "--run", run, "--nproc-per-node", num_gpus),
            *("--train.max-steps", max_steps, "--checkpoint.every-steps", 8, "--logging.every-steps", 5),
            *("--validation.every-steps", 10, "--checkpoint.keep-last", 2),
        )

    return words


@pytest.fixture(scope="session")
def gpu_runs(on_gpus, train_args, small_dataset, tmp_path_factory):
    """The folder of a run on so many GPUs that has saved itself while it trained, and what the command said."""
    trained = {}

    def run_on(num_gpus):
        if num_gpus not in trained:
            path = tmp_path_factory.mktemp("run") / f"on-{num_gpus}"
            trained[num_gpus] = path, on_gpus(num_gpus, *train_args(small_dataset, path, num_gpus), "--json")
        path, done = trained[num_gpus]
        assert done.returncode == 0, done.stderr
        return path, json.loads(done.stdout.splitlines()[-1]), done

    return run_on
