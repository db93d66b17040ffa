"""What whoever runs a server relies on: swaps, limits, keys, processes, the log of predictions."""

import asyncio
import gc
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path

import httpx
import numpy as np
import polars as pl
import pytest
import tritonclient.grpc as triton_grpc

from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.verification import BlockVerifier
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import BundleError
from torchdlrm.features.schema import criteo_schema
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.serving.front.app import build_app
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service import request_log
from torchdlrm.serving.service.bundles import rows_as_logged
from torchdlrm.serving.service.service import Service

ROOT = Path(__file__).parents[2]
KEY = "correct horse battery staple"


@pytest.fixture(scope="module")
def other_bundle(small_run, small_dataset, tmp_path_factory):
    """The same run with coarser tables: other predictions, and so another version."""
    from torchdlrm.exporting.export import export
    from torchdlrm.exporting.options import ExportOptions

    path = tmp_path_factory.mktemp("bundle") / "coarse"
    export(small_run, path, options=ExportOptions(name="small", precision="int4"), dataset=small_dataset)
    return path


@pytest.fixture(scope="module")
def rows(small_bundle):
    predictor = Predictor.open(small_bundle)
    frame = predictor.bundle.sample()[0].head(50)
    return rows_as_logged(frame, predictor.schema)


@pytest.fixture
def link(small_bundle, tmp_path):
    """A symbolic link to the bundle, and what moves it."""
    path = tmp_path / "current"
    path.symlink_to(small_bundle)

    def move(target):
        beside = tmp_path / "beside"
        beside.symlink_to(target)
        beside.replace(path)

    return path, move


def expected(bundle, rows):
    predictor = Predictor.open(bundle)
    return predictor.bundle.version, predictor.predict(predictor.parse_rows(rows))


@pytest.mark.slow
def test_ten_thousand_requests_while_two_bundles_are_swapped(serve, link, small_bundle, other_bundle, rows):
    path, move = link
    server = serve(path, "--log-level", "warning", "--deadline-ms", 10_000)
    wanted = dict(expected(bundle, rows) for bundle in (small_bundle, other_bundle))
    first, second = wanted.values()
    assert np.abs(first - second).max() > 1e-3, "the bundles must differ for the test to say anything"
    bodies = [json.dumps(rows[start : start + 2]).encode() for start in range(len(rows) - 1)]
    host, port = server.url.removeprefix("http://").split(":")
    answers = []

    async def ask(numbers):
        """A plain client: httpx would take most of the time of this test."""
        reader, writer = await asyncio.open_connection(host, int(port))
        for number in numbers:
            body = bodies[number % len(bodies)]
            writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
            answers.append((number % len(bodies), int(head[9:12]), await reader.readexactly(length)))
        writer.close()

    async def swap(done):
        bundles = [other_bundle, small_bundle]
        while not done.is_set():
            move(bundles[0])
            bundles.reverse()
            server.process.send_signal(signal.SIGHUP)
            await asyncio.sleep(0.3)

    async def main():
        done = asyncio.Event()
        swapping = asyncio.create_task(swap(done))
        numbers = iter(range(10_000))
        await asyncio.gather(*(ask(numbers) for _ in range(16)))
        done.set()
        await swapping

    asyncio.run(main())
    code, log = server.stop()
    assert code == 0
    assert len(answers) == 10_000
    seen = set()
    for start, status, content in answers:
        assert status == 200, content
        told = json.loads(content)
        seen.add(told["version"])
        assert told["predictions"] == pytest.approx(wanted[told["version"]][start : start + 2], abs=1e-6)
    assert seen == set(wanted)
    assert sum(line["event"] == "bundle swapped" for line in log) >= 4


def test_a_bundle_that_fails_is_not_served(serve, link, small_bundle, other_bundle, rows, tmp_path):
    path, move = link
    server = serve(path, "--follow-s", 0, DLRM_API_KEY=KEY)
    damaged = tmp_path / "damaged"
    shutil.copytree(other_bundle, damaged)
    weights = damaged / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=30) as client:
        move(damaged)
        refused = client.post("/admin/reload")
        assert refused.status_code == 409
        assert client.post("/predict", json=rows).json()["version"] == server.version
        assert client.get("/v2/health/ready").status_code == 200
        move(other_bundle)
        version, wanted = expected(other_bundle, rows)
        assert client.post("/admin/reload").json() == {"outcome": "swapped", "model": "small", "version": version}
        answer = client.post("/predict", json=rows).json()
        assert answer["version"] == version
        assert answer["predictions"] == pytest.approx(wanted, abs=1e-6)
        assert client.post("/admin/reload").json()["outcome"] == "unchanged"
        assert client.get(f"/v2/models/small/versions/{server.version}").status_code == 404
    _, log = server.stop()
    failed = [line for line in log if line["event"] == "swap failed"]
    assert len(failed) == 1
    assert "sha256" in failed[0]["message"] or "damaged" in failed[0]["message"]


def test_a_block_found_damaged_while_it_is_served_ends_the_predictions(small_bundle, rows, tmp_path, monkeypatch):
    """Lazily checked, a server may have been ready before the damage was met: then nothing more is predicted by it."""
    grow = runpy.run_path(str(ROOT / "benchmarks" / "lazy_bundle.py"))["grow"]
    bundle = tmp_path / "current"
    tables = BundleManifest.read(small_bundle).sparse
    num_rows = {name: record.num_embeddings for name, record in tables.items()} | {"cat_25": 1_000_000}
    bundle.symlink_to(grow(small_bundle, tmp_path, num_rows))
    shutil.copytree(bundle, tmp_path / "again")
    with (bundle / "weights.safetensors").open("r+b") as file:
        file.seek(-1_000, os.SEEK_END)  # far behind the rows that have an id
        bit = bytes([file.read(1)[0] ^ 1])
        file.seek(-1_000, os.SEEK_END)
        file.write(bit)
    with pytest.raises(BundleError, match="damaged"):
        Predictor.open(bundle)
    check, may_check = BlockVerifier._check_quietly, threading.Event()
    monkeypatch.setattr(BlockVerifier, "_check_quietly", lambda verifier: may_check.wait(30) and check(verifier))

    async def main():
        service = Service(bundle, ServeOptions(verify="lazy"), lambda: None)
        await service.start()
        first = weakref.ref(service.bundles.current)
        transport = httpx.ASGITransport(build_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            assert (await client.post("/predict", json=rows)).status_code == 200
            may_check.set()
            await asyncio.to_thread(service.bundles.current.bundle.verifier.wait)
            for _ in range(2):
                answer = await client.post("/predict", json=rows)
                assert (answer.status_code, answer.json()["error"][:37]) == (
                    503,
                    "the model on this server is damaged, ",
                )
            assert (await client.get("/v2/health/ready")).status_code == 503
            assert (await client.get("/v2/health/live")).status_code == 200
            bundle.unlink()
            bundle.symlink_to(tmp_path / "again")  # as the message says: the same version, copied again
            version = service.bundles.current.version
            assert (await service.reload())["outcome"] == "swapped"
            assert service.bundles.current.version == version
            assert (await client.get("/v2/health/ready")).status_code == 200
            assert (await client.post("/predict", json=rows)).status_code == 200
        gc.collect()
        assert first() is None, "what was swapped away must not stay in memory"
        service.close()

    asyncio.run(main())


def test_slow_bodies_do_not_take_the_place_of_others(serve, small_bundle, rows):
    server = serve(small_bundle, "--max-concurrent-requests", 4, "--log-level", "warning")
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n"
    with ExitStack() as open_until_the_end, httpx.Client(base_url=server.url, timeout=30) as client:
        slow = []
        for number in range(33):  # 8 times as many may
            connection = open_until_the_end.enter_context(socket.create_connection((host, int(port)), timeout=10))
            connection.sendall(head + b"[" * (number % 2))
            slow.append(connection)
        assert b"408 Request Timeout" in slow[0].recv(4096)  # the oldest has to go
        for _ in range(10):  # this client sends head and body apart, and so each of its requests gives up another one
            assert client.post("/predict", json=rows[:2]).status_code == 200
        slow[-1].sendall(b"[]")
        slow[-2].sendall(b"]")
        assert all(b"200 OK" in connection.recv(4096) for connection in slow[-2:])
    code, _ = server.stop()
    assert code == 0


def test_the_time_of_a_request_begins_when_its_body_has_come(serve, small_bundle):
    """Also where all of it comes at once, but late: the deadline is for what the server does."""
    server = serve(small_bundle, "--deadline-ms", 300)
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n\r\n")
        client.settimeout(0.6)
        with pytest.raises(TimeoutError):
            client.recv(1)
        client.settimeout(20)
        client.sendall(b"[{}]")
        assert client.recv(100).startswith(b"HTTP/1.1 200 ")


def test_without_its_key_a_request_gets_nothing_but_health_and_the_page(serve, small_bundle, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\nanother\n")
    server = serve(small_bundle, "--api-key-file", keys, "--grpc-port", 0)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for path in ("/v2/health/live", "/v2/health/ready", "/"):
            assert client.get(path).status_code == 200
        for path in ("/schema", "/metrics", "/openapi.json", "/v2", "/v2/models/small", "/nothing"):
            assert client.get(path).status_code == 401
        for headers in ({}, {"X-API-Key": "wrong"}, {"X-API-Key": ""}, {"Authorization": f"Basic {KEY}"}):
            refused = client.post("/predict", json=[{}], headers=headers)
            assert refused.status_code == 401
            assert "API key" in refused.json()["error"]
        for headers in ({"X-API-Key": KEY}, {"Authorization": f"Bearer {KEY}"}, {"X-API-Key": "another"}):
            assert client.post("/predict", json=[{}], headers=headers).status_code == 200
    client = triton_grpc.InferenceServerClient(server.grpc)
    assert client.is_server_ready()
    with pytest.raises(triton_grpc.InferenceServerException, match="UNAUTHENTICATED"):
        client.get_model_metadata("small")
    assert client.get_model_metadata("small", headers={"x-api-key": KEY}).name == "small"


def test_more_than_can_be_done_is_refused_and_the_rest_answered(serve, small_bundle, rows):
    server = serve(
        small_bundle, "--max-queue-rows", 50, "--max-rows-per-request", 50, "--max-concurrent-requests", 8
    )  # fmt: skip
    # One for each thread: of a client that threads share, one may close the connection that another reads.
    with ExitStack() as stack, ThreadPoolExecutor(32) as pool:
        clients = [stack.enter_context(httpx.Client(base_url=server.url, timeout=30)) for _ in range(32)]
        asked = pool.map(lambda client: [client.post("/predict", json=rows) for _ in range(13)], clients)
        answers = [answer for some in asked for answer in some]
        codes = [answer.status_code for answer in answers]
        assert set(codes) == {200, 503}
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in answers if answer.status_code == 503)
        wanted = expected(small_bundle, rows)[1]
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["predictions"] == pytest.approx(wanted, abs=1e-6)
        assert clients[0].post("/predict", json=rows).status_code == 200


def test_a_deadline_that_cannot_be_kept_is_told(serve, small_bundle, rows):
    server = serve(small_bundle, "--deadline-ms", 0.001)
    answer = httpx.post(f"{server.url}/predict", json=rows, timeout=30)
    assert answer.status_code == 504
    assert "deadline" in answer.json()["error"]


@pytest.mark.slow
def test_several_processes_share_a_port_and_their_figures(serve, link, small_bundle, other_bundle, rows):
    path, move = link
    server = serve(path, "--workers", 2, "--grpc-port", 0, "--log-level", "warning", DLRM_API_KEY=KEY)
    headers = {"X-API-Key": KEY, "Connection": "close"}  # each request may meet another process

    def ask(_):
        return httpx.post(f"{server.url}/predict", json=rows, headers=headers, timeout=30)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(60)))
        processes = {answer.headers["X-Request-Id"].split("-")[0] for answer in answers}
        assert len(processes) == 2, "both processes answer"
        assert {answer.status_code for answer in answers} == {200}
        metrics = httpx.get(f"{server.url}/metrics", headers=headers, timeout=30).text
        assert 'dlrm_requests_total{code="200",route="/predict"} 60.0' in metrics
        assert f"dlrm_rows_total {60.0 * len(rows)}" in metrics
        move(other_bundle)
        version = httpx.post(f"{server.url}/admin/reload", headers=headers, timeout=30).json()["version"]
        deadline_s = time.monotonic() + 20
        while {answer.json()["version"] for answer in pool.map(ask, range(20))} != {version}:
            assert time.monotonic() < deadline_s, "both processes swap"
        victim = int(sorted(processes)[0], 16)
        os.kill(victim, signal.SIGKILL)
        while len({answer.headers["X-Request-Id"].split("-")[0] for answer in map(ask, range(10))}) < 2:
            assert time.monotonic() < deadline_s + 20, "a process that has died is started again"
    code, _ = server.stop()
    assert code == 0


def test_logged_predictions_are_a_log_to_preprocess(serve, small_bundle, rows, tmp_path):
    folder = tmp_path / "log"
    server = serve(small_bundle, "--log-predictions", folder)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for start in range(0, 50, 10):
            answer = client.post("/predict", json=rows[start : start + 10], headers={"X-Request-Id": f"r{start}"})
            assert answer.headers["X-Request-Id"] == f"r{start}"
    assert server.stop()[0] == 0
    files = sorted(folder.glob("*.parquet"))
    assert len(files) == 1
    assert len(list(folder.iterdir())) == 1
    logged = pl.read_parquet(files[0])
    assert logged["prediction"].to_numpy() == pytest.approx(expected(small_bundle, rows)[1], abs=1e-6)
    assert logged.select("request_id", "request_row").rows() == [(f"r{i - i % 10}", i % 10) for i in range(50)]
    assert logged["cat_3"].to_list() == [row["cat_3"] for row in rows]
    labels = pl.DataFrame(
        {"request_id": [f"r{i - i % 10}" for i in range(50)], "request_row": [i % 10 for i in range(50)]}
    )
    labels = labels.with_columns(label=pl.int_range(50, dtype=pl.Int8) % 2)
    joined = logged.join(labels, on=["request_id", "request_row"], maintain_order="left")
    joined.write_parquet(tmp_path / "joined.parquet")
    preprocess([tmp_path / "joined.parquet"], tmp_path / "again", criteo_schema(), PreprocessOptions(min_count=1))
    dataset = Dataset.open(tmp_path / "again")
    assert sum(split.rows for split in dataset.manifest.splits.values()) == 50


@pytest.mark.thorough
def test_while_no_file_can_be_written_predictions_go_on_and_no_row_is_lost_uncounted(
    serve, small_bundle, rows, tmp_path
):
    """As on a full disk, but without one: the server may write no file longer than a byte, and later it may."""
    folder = tmp_path / "log"
    server = serve(small_bundle, "--log-predictions", folder, "--log-level", "error", "--deadline-ms", 30_000)

    def dropped_rows(client):
        lines = client.get("/metrics").text.splitlines()
        return next(int(float(line.split()[1])) for line in lines if line.startswith("dlrm_log_dropped_rows_total "))

    body = json.dumps([row for row in rows for _ in range(80)]).encode()  # 4,000 rows

    def predict(client, num_requests):
        for _ in range(num_requests):
            assert client.post("/predict", content=body).status_code == 200

    def memory_bytes():
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) << 10

    with httpx.Client(base_url=server.url, timeout=60) as client:
        predict(client, 2)
        before_bytes = memory_bytes()
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        predict(client, 98)
        assert memory_bytes() - before_bytes < request_log.MAX_WAITING_BYTES + (100 << 20)
        assert dropped_rows(client) > 0
        assert list(folder.iterdir()) == []
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        deadline_s = time.monotonic() + 60
        while not list(folder.glob("*.parquet")):
            assert time.monotonic() < deadline_s, "it is tried again"
            time.sleep(0.05)
        num_dropped = dropped_rows(client)
        predict(client, 4)
        assert dropped_rows(client) == num_dropped
    code, log = server.stop()
    assert code == 0
    assert sum(pl.read_parquet(path).height for path in folder.iterdir()) == 104 * 4000 - num_dropped
    failed = [line for line in log if line["event"] == "predictions not logged"]
    assert {"File too large"} < {line["message"] for line in failed}
    assert sum(line.get("dropped_rows", 0) for line in log) == num_dropped
    for message in {line["message"] for line in failed}:  # a line a minute of each, however long it takes
        times = [datetime.fromisoformat(line["time"]) for line in failed if line["message"] == message]
        assert all(later - earlier > timedelta(seconds=59) for earlier, later in pairwise(times))
