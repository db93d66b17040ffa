"""The server as a function of Python, and what a process that serves loads."""

import json
import os
import signal
import subprocess
import sys

import httpx
import pytest

from helpers.command_server import shared_server

SCRIPT = """
import sys
from pathlib import Path

from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.server import serve

if __name__ == "__main__":
    options = ServeOptions(port=0, workers=int(sys.argv[2]), api_keys=("secret",), allowed_hosts=("x.example",))
    sys.exit(serve(Path(sys.argv[1]), options=options, started=lambda at: print(at.url, at.model, flush=True)))
"""


def test_what_serves_loads_nothing_that_trains():
    """Whatever it imports: a server starts without TorchRec, and in the memory of what it needs."""
    code = """
import sys
import torchdlrm.serving.worker
roots = ("torchrec", "torchdlrm.training", "torchdlrm.sharding", "torchdlrm.tables", "torchdlrm.loader")
print([name for name in sys.modules if any(name == root or name.startswith(root + ".") for root in roots)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_server_started_from_python_serves_until_it_is_told_to_stop(small_bundle, tmp_path, workers):
    script = tmp_path / "serve_it.py"
    script.write_text(SCRIPT)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    server = shared_server().start([script, small_bundle, workers], **options)
    url, model = server.stdout.readline().split()
    assert httpx.post(f"{url}/predict", json=[{}]).status_code == 401
    answer = httpx.post(f"{url}/predict", json=[{}, {}], headers={"X-API-Key": "secret"}).json()
    assert (len(answer["predictions"]), answer["model"], model) == (2, "small", "small")
    os.kill(server.pid, signal.SIGTERM)
    _, log = server.communicate(timeout=60)
    assert server.returncode == 0, log
    assert [json.loads(line)["event"] for line in log.splitlines()].count("stopped") == workers
