"""Several processes that serve: what happens when one dies or none can start, and a server's first and last seconds."""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import httpx
import pytest

from helpers.command_server import shared_server, spawned_by


def wait_for(condition, timeout_s=120):
    """What a condition says once it says anything."""
    deadline_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)
    return found


def workers(server, *but):
    """The process ids of its workers, but for some."""
    return [pid for pid in spawned_by(server.process.pid) if pid not in but]


def ready_workers(server, metrics="dlrm_bundle_workers"):
    """How many processes serve, as /metrics says."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        answer = client.get("/metrics")
    assert answer.status_code == 200
    return sum(float(line.split()[-1]) for line in answer.text.splitlines() if line.startswith(metrics))


@pytest.mark.slow
def test_workers_that_die_are_replaced_and_logged_while_the_others_serve(serve, small_bundle):
    server = serve(small_bundle, "--workers", 2)
    first, second = workers(server)

    def predict():
        with httpx.Client(base_url=server.url, timeout=30) as client:
            return client.post("/predict", json=[{}]).status_code

    killed = [first]
    os.kill(first, signal.SIGKILL)
    for _ in range(2):  # as soon as the next one is there, in less than a second
        wait_for(partial(workers, server, second, *killed))
        killed += workers(server, second, *killed)
        os.kill(killed[-1], signal.SIGKILL)
        assert predict() == 200
    wait_for(lambda: ready_workers(server) == 2)
    assert predict() == 200

    maps = Path(f"/proc/{second}/maps").read_text()
    metrics = Path(re.search(r"(/\S*/dlrm-metrics-[^/]+)/", maps)[1])
    shutil.rmtree(metrics)  # as one who cleans the temporary folder does
    wait_for(lambda: ready_workers(server) == 2)
    assert predict() == 200
    assert ready_workers(server, 'dlrm_requests_total{code="200",route="/predict"}') == 1
    shutil.rmtree(metrics)
    os.kill(second, signal.SIGKILL)
    killed.append(second)
    wait_for(lambda: len(workers(server, *killed)) == 2 and ready_workers(server) == 2)

    code, log = server.stop()
    assert code == 0
    died = [line for line in log if line["event"] == "worker died"]
    assert [(line["pid"], line["signal"], line["level"]) for line in died] == [
        (pid, "SIGKILL", "error") for pid in killed
    ]
    assert [line["replaced_in_s"] for line in died[:3]] == [0, 1, 2], "the delay grows while they die young"


@pytest.mark.slow
def test_a_service_of_which_no_worker_can_start_ends_and_says_why(serve, small_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(small_bundle, bundle)
    server = serve(bundle, "--workers", 2)
    (bundle / "bundle.json").unlink()
    for pid in workers(server):
        os.kill(pid, signal.SIGKILL)
    _, log = server.process.communicate(timeout=240)
    assert server.process.returncode == 1
    lines = [json.loads(line) for line in log.splitlines()]
    assert (lines[-1]["event"], lines[-1]["failed_starts"]) == ("no worker can start", 4)
    failed = [line for line in lines if line["event"] == "worker died" and "exit_code" in line]
    assert len(failed) == 4
    assert all("bundle.json" in line["message"] for line in failed)
    assert [line["replaced_in_s"] for line in failed] == sorted(line["replaced_in_s"] for line in failed)


def test_what_a_worker_finds_wrong_at_the_start_is_one_line(dlrm, small_bundle):
    done = dlrm("serve", small_bundle, "--port", 0, "--workers", 2, "--log-predictions", "/proc/nothing")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert errors == ["error: --log-predictions /proc/nothing: cannot be written to: No such file or directory"]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("option", ["--port", "--grpc-port"])
def test_a_port_in_use_is_one_line(dlrm, small_bundle, option, num_workers):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = {"--port": 0, option: port}
        done = dlrm("serve", small_bundle, "--workers", num_workers, *(text for pair in ports.items() for text in pair))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --host 127.0.0.1 {option} {port}: cannot listen there: Address already in use; choose another\n"
    )


def test_the_port_of_another_server_is_in_use_also_where_workers_share_it(dlrm, small_bundle):
    with socket.socket() as other:  # as a server with several workers keeps it
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        done = dlrm("serve", small_bundle, "--port", 0, "--workers", 2, "--grpc-port", port)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert f"--grpc-port {port}: cannot listen there: Address already in use" in done.stderr


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_signal_to_swap_in_the_first_seconds_waits(small_bundle, num_workers):
    command = [str(Path(sys.executable).with_name("dlrm")), "serve", str(small_bundle), "--json", "--port", "0"]
    with subprocess.Popen(
        [*command, "--workers", str(num_workers)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:

        def blocks_the_signal():
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(re.search(r"SigBlk:\s+(\w+)", status)[1], 16) >> (signal.SIGHUP - 1) & 1

        wait_for(blocks_the_signal)
        process.send_signal(signal.SIGHUP)
        told = json.loads(process.stdout.readline())
        assert httpx.get(f"{told['url']}/v2/health/ready", timeout=30).status_code == 200
        process.send_signal(signal.SIGHUP)
        events = []
        for line in process.stderr:
            events.append(json.loads(line)["event"])
            if events[-1] == "bundle unchanged" and events.count("bundle unchanged") == 1:
                process.terminate()
    assert process.returncode == 0
    assert set(events) == {"serving", "bundle unchanged", "draining", "stopped"}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_while_a_server_stops_new_connections_are_refused(serve, small_bundle, num_workers):
    """Not queued where nobody will accept them."""
    server = serve(small_bundle, "--workers", num_workers, "--shutdown-timeout-s", 20)
    host, port = server.url.removeprefix("http://").split(":")
    slow = []
    while len(slow) < 8:  # keep their processes from ending
        slow.append(socket.create_connection((host, int(port)), timeout=30))
        slow[-1].sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n[{")
    wait_for(lambda: ready_workers(server) == num_workers)
    server.process.terminate()

    def is_refused():
        try:
            with socket.create_connection((host, int(port)), timeout=30):
                return False
        except ConnectionRefusedError:
            return True

    wait_for(is_refused)
    assert server.process.poll() is None
    for one in slow:
        with one:
            one.sendall(b"}]")
            assert b"200 OK" in one.recv(4096)
    code, _ = server.stop()
    assert code == 0


@pytest.mark.parametrize(("num_workers", "drain_s"), [(1, 0), (1, 0.5), (2, 0)])
def test_clients_that_ask_without_a_pause_lose_no_request_when_a_server_stops(
    serve, small_bundle, num_workers, drain_s
):
    """What has arrived is answered: half of them connect anew for each request, half only where they are told to."""
    server = serve(small_bundle, "--workers", num_workers, "--drain-s", drain_s, "--deadline-ms", 20_000)
    host, port = server.url.removeprefix("http://").split(":")
    ends, num_answers = [], [0] * 32

    async def ask(number):
        close = b"Connection: close\r\n" if number % 2 else b""
        request = b"POST /predict HTTP/1.1\r\nHost: x\r\n%bContent-Length: 4\r\n\r\n[{}]" % close
        while True:
            try:
                reader, writer = await asyncio.open_connection(host, int(port))
            except OSError as error:
                return type(error)
            is_open = True
            try:
                while is_open:
                    writer.write(request)
                    head = await reader.readuntil(b"\r\n\r\n")
                    assert head.startswith(b"HTTP/1.1 200 "), head
                    await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))
                    num_answers[number] += 1
                    is_open = b"connection: close" not in head
            except (OSError, EOFError) as error:
                return f"lost: {error!r}"
            finally:
                writer.close()

    async def ask_and_stop():
        clients = [asyncio.create_task(ask(number)) for number in range(32)]
        while min(num_answers) < 3:
            await asyncio.sleep(0.01)
        server.process.terminate()
        ends.extend(await asyncio.gather(*clients))

    with asyncio.Runner() as runner:
        runner.run(asyncio.wait_for(ask_and_stop(), 60))
    assert ends == [ConnectionRefusedError] * 32
    code, _ = server.stop()
    assert code == 0


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
