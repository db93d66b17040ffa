"""Clients that mean harm, or know no better, cost the others nothing: bounds in time, memory and places, keyless too.

Short here; TORCHDLRM_ABUSE=20 sends twenty times as much, and takes minutes.  All traffic stays on this machine.
"""

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import time

import httpx
import pytest

from helpers.abused import KEY, KEY_BYTES, ROWS, SCALE, Abused, send_all_of, sent_until_cut, until

GET = b"GET /page/style.css HTTP/1.1\r\nHost: x\r\n\r\n"
RELOAD = b"POST /admin/reload HTTP/1.1\r\nHost: x\r\nX-API-Key: " + KEY_BYTES + b"\r\nContent-Length: 0\r\n\r\n"
OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"


def post(body, headers=b"", path=b"/predict", key=KEY_BYTES):
    head = b"POST %b HTTP/1.1\r\nHost: x\r\nX-API-Key: %b\r\n%bContent-Length: %d\r\n\r\n" % (
        path,
        key,
        headers,
        len(body),
    )
    return head, body


@pytest.fixture(scope="module")
def abused(serve, small_bundle):
    """One for all tests that do not stop it."""
    times = ("--header-timeout-s", 2, "--body-timeout-s", 2, "--keep-alive-s", 4)
    abused = Abused(serve(small_bundle, *times, "--log-level", "warning", DLRM_API_KEY=KEY))
    abused.serves_others()
    yield abused
    assert abused.serves_others()
    abused.good.close()
    code, log = abused.running.stop()
    assert code == 0
    assert [line for line in log if line["level"] == "error"] == []


# Upgrade


@pytest.mark.parametrize("offer", [OFFER, b"Connection: close, Upgrade\r\nUpgrade: h2c\r\n"], ids=["h2c", "and close"])
def test_a_request_that_offers_another_protocol_keeps_its_body(abused, offer):
    head, body = post(ROWS, offer)
    ask_and_end = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    for pieces in ([head + body], [head, body], [GET + head + body], [GET + head, body]):
        statuses, answer = abused.exchange(*pieces[:-1], pieces[-1] + ask_and_end)
        assert statuses == [200] * (pieces[0].startswith(GET) + 2 - (b"close" in offer))
        assert answer.count(b'{"predictions":[') == 1


def test_a_body_is_never_read_as_a_request(abused):
    for filling in (b"", b"\r\n" * 12_000):
        head, body = post(filling + RELOAD, OFFER)
        for pieces in ([head + body], [head, body], [head, filling, RELOAD]):
            statuses, answer = abused.exchange(*pieces, is_half_closed=True)
            assert statuses == [400], answer
            assert b"not JSON" in answer


def test_other_protocols_are_refused(abused):
    assert abused.exchange(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\n" + RELOAD)[0] == [405]
    assert abused.exchange(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))[0] == [505]
    assert abused.exchange(b"\x16\x03\x01\x02\x00\x01")[0] == [400]


def test_curl_that_offers_http2_gets_its_prediction(abused):
    curl = shutil.which("curl")
    version = subprocess.run([curl, "--version"], capture_output=True, text=True, check=True).stdout if curl else ""
    if "HTTP2" not in version:
        pytest.skip("needs a curl that speaks HTTP/2")
    command = [curl, "--silent", "--http2", "--header", f"X-API-Key: {KEY}", "--data", "[{}]"]
    done = subprocess.run(
        [*command, f"{abused.running.url}/predict"], capture_output=True, text=True, check=True, timeout=30
    )
    assert len(json.loads(done.stdout)["predictions"]) == 1


NGINX = """
user root;  # as which tests may run: then the folders below are root's; anybody else's nginx ignores it
daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  map $http_upgrade $connection_upgrade {{ default upgrade; '' close; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://{host}:{upstream_port};
      proxy_http_version 1.1;
      proxy_set_header Upgrade $http_upgrade;
      proxy_set_header Connection $connection_upgrade;
    }}
    location /admin/ {{ return 403; }}
  }}
}}
"""


@pytest.fixture
def nginx(abused, tmp_path):
    """A proxy in front of the server, set up for WebSockets as nginx documents it, that keeps /admin/ to itself."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/usr/local/sbin")
    if program is None:
        pytest.skip("needs nginx, which is not installed")
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = free.getsockname()
    host, upstream_port = abused.address
    config = tmp_path / "nginx.conf"
    config.write_text(NGINX.format(folder=tmp_path, port=address[1], host=host, upstream_port=upstream_port))
    process = subprocess.Popen([program, "-c", config, "-p", tmp_path, "-e", tmp_path / "error.log"])

    def answers():
        assert process.poll() is None, (tmp_path / "error.log").read_text()
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=1):
            return True

    until(answers, 10)
    yield address
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)


def test_nothing_is_smuggled_past_a_proxy(abused, nginx):
    with httpx.Client(base_url=f"http://{nginx[0]}:{nginx[1]}", headers={"X-API-Key": KEY}, timeout=10) as client:
        offer = {"Connection": "Upgrade", "Upgrade": "h2c"}
        assert client.post("/admin/reload", headers=offer).status_code == 403, "of the proxy"
        assert client.post("/predict", content=ROWS, headers=offer).status_code == 200
        before = abused.good.get("/metrics").text
        for filling in (b"", b"\r\n" * 12_000):
            for _ in range(3 * SCALE):
                answer = client.post("/predict", content=filling + RELOAD, headers=offer)
                assert answer.status_code == 400
                assert "not JSON" in answer.json()["error"]
        after = abused.good.get("/metrics").text
    assert "/admin/reload" not in before + after, "counted by route"


# Clients that do not read


def test_clients_that_do_not_read_take_no_place_and_are_cut_off(abused):
    before_mb = abused.memory_mb()
    with contextlib.ExitStack() as until_the_end:
        connections = []
        for _ in range(130 * min(SCALE, 5)):  # more than requests may be under way
            connection = until_the_end.enter_context(abused.connect(receive_bytes=2048))
            connection.settimeout(0)
            send_all_of(connection, GET * 550)
            connections.append(connection)
        assert abused.serves_others()
        assert abused.memory_mb() - before_mb < 0.5 * len(connections)
        # The time for an answer is body_timeout_s: then nothing of them is left.
        until(lambda: len(abused.process.net_connections()) < 10, 15)
    assert abused.memory_mb() - before_mb < 50


def test_a_stop_does_not_wait_for_clients_that_do_not_read(serve, small_bundle):
    abused = Abused(serve(small_bundle, "--body-timeout-s", 60, "--log-level", "warning", DLRM_API_KEY=KEY))
    with contextlib.ExitStack() as until_the_end:
        for _ in range(20):
            connection = until_the_end.enter_context(abused.connect(receive_bytes=2048))
            connection.settimeout(0)
            send_all_of(connection, GET * 550)
        assert abused.serves_others()
        abused.good.close()
        started_s = time.monotonic()
        code, _ = abused.running.stop()
    assert code == 0
    assert time.monotonic() - started_s < 15, "shutdown_timeout_s is 30"


def test_who_reads_slowly_gets_all_answers(abused):
    num_requests = 200
    with abused.connect(receive_bytes=2048) as connection:
        connection.sendall(GET * num_requests + b"garbage\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(2048), b""))
    assert answer.count(b"HTTP/1.1 200 OK") == num_requests
    assert answer.count(b"HTTP/1.1 400 Bad Request") == 1


# Headers, trailers, pipelining


@pytest.mark.parametrize("path", [b"/", b"/predict", b"/v2/health/live"])
def test_trailers_have_an_end(abused, path):
    before_mb = abused.memory_mb()
    with abused.connect() as connection:
        connection.sendall(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
        assert sent_until_cut(connection, b"a1: b\r\n" * 5_000) < 50e6
    assert abused.memory_mb() - before_mb < 20


def test_trailers_have_a_time(abused):
    with abused.connect() as connection:
        connection.sendall(post(b"", key=KEY_BYTES)[0].replace(b"Content-Length: 0", b"Transfer-Encoding: chunked"))
        connection.sendall(b"4\r\n[{}]\r\n0\r\na: b\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 408 ")
        until(lambda: not send_all_of(connection, b"a: b\r\n"), 12)


def test_a_trailer_opens_nothing(abused):
    for name in (b"X-API-Key: " + KEY_BYTES, b"Authorization: Bearer " + KEY_BYTES):
        sent = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\n[{}]\r\n0\r\n" + name
        assert abused.exchange(sent + b"\r\n\r\n", is_half_closed=True)[0] == [401]


def test_headers_are_limited_whether_or_not_they_come_at_once(abused):
    for sent in (b"A: " + b"a" * 33_000 + b"\r\n\r\n", b"A: " + b"a" * 33_000, b"a: b\r\n" * 6_000 + b"\r\n"):
        assert abused.exchange(b"GET /v2 HTTP/1.1\r\nHost: x\r\n" + sent)[0] == [431]


def test_the_next_headers_have_their_time_also_where_they_begin_in_one_segment(abused):
    started_s = time.monotonic()
    assert abused.exchange(GET + b"GET /v2 HTT")[0] == [200, 408]
    assert 1.5 < time.monotonic() - started_s < 3.9, "less than a silent connection has"


def test_empty_lines_have_an_end(abused):
    with abused.connect() as connection:
        assert sent_until_cut(connection, b"\r\n" * 100_000) < 50e6
    assert abused.exchange(GET + b"\r\n" + GET + b"\r\n\r\n")[0] == [200, 200, 400]


def test_many_requests_sent_ahead_are_looked_at_one_by_one(abused):
    before_mb = abused.memory_mb()
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    with contextlib.ExitStack() as until_the_end:
        connections = [until_the_end.enter_context(abused.connect()) for _ in range(100 * min(SCALE, 5))]
        for connection in connections:
            connection.settimeout(0)
        num_bytes, num_taken = 0, 1
        while num_taken and num_bytes < 30e6 * SCALE:
            num_taken = sum(send_all_of(connection, request * 2_500) for connection in connections)
            num_bytes += num_taken
            time.sleep(0.05)
        assert abused.memory_mb() - before_mb < len(connections), "what has been read ahead, for each 320 KiB"
        assert abused.good.get("/v2/health/ready").status_code == 200
    assert num_bytes > 15e6


def test_a_bad_request_does_not_lose_the_answers_to_the_good_ones_before(abused):
    assert abused.exchange(GET * 3 + b"garbage\r\n\r\n" + GET)[0] == [200, 200, 200, 400]


def test_who_has_closed_its_side_gets_its_answers(abused):
    head, body = post(ROWS)
    assert abused.exchange(head + body, is_half_closed=True)[0] == [200]
    assert abused.exchange((head + body) * 3, is_half_closed=True)[0] == [200] * 3
    assert abused.exchange(head + body[:1], is_half_closed=True)[0] == [400]


# Bodies behind early answers

EARLY = {
    "no key": (b"POST", b"/predict", b"", 401),
    "no route": (b"POST", b"/nothing", b"X-API-Key: " + KEY_BYTES + b"\r\n", 404),
    "compressed": (b"POST", b"/predict", b"Content-Encoding: gzip\r\nX-API-Key: " + KEY_BYTES + b"\r\n", 415),
    "GET": (b"GET", b"/", b"", 200),
}


LENGTHS = {
    b"Content-Length: 9000000000": b"x" * 65536,
    b"Transfer-Encoding: chunked": b"10000\r\n" + b"x" * 65536 + b"\r\n",
}


def answered_early(abused, what, length):
    """A connection whose body is still to come, and whose answer is there."""
    method, path, headers, status = EARLY[what]
    connection = abused.connect()
    connection.sendall(method + b" " + path + b" HTTP/1.1\r\nHost: x\r\n" + headers + length + b"\r\n\r\n")
    answer = connection.recv(65536)
    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close" in answer
    return connection


@pytest.mark.parametrize("what", EARLY)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_body_behind_its_answer_has_a_size(abused, what, length):
    before_mb = abused.memory_mb()
    with answered_early(abused, what, length) as connection:
        assert sent_until_cut(connection, LENGTHS[length]) < 16e6 + 30e6, "a body's worth, and what lies between"
    assert abused.memory_mb() - before_mb < 20


def test_a_body_behind_its_answer_has_a_time(abused):
    with contextlib.ExitStack() as until_the_end:
        slow = [until_the_end.enter_context(answered_early(abused, what, of)) for what in EARLY for of in LENGTHS]
        until(lambda: sum(send_all_of(connection, b"x") for connection in slow) == 0, 12)


def test_who_sends_all_of_a_body_that_is_not_wanted_still_reads_why(abused):
    body = b"x" * 10_000_000
    for key, path in ((b"wrong", b"/predict"), (KEY_BYTES, b"/nothing")):
        head, _ = post(body, path=path, key=key)
        statuses, _ = abused.exchange(head, body)
        assert statuses == [401 if key == b"wrong" else 404]


def test_tiny_chunks_do_not_hold_up_the_others(abused):
    size = 400_000
    head = post(b"")[0].replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    with abused.connect() as connection:
        connection.sendall(head + b"1\r\n \r\n" * size)
        assert abused.serves_others()
        connection.sendall(b"4\r\n[{}]\r\n0\r\n\r\n")
        assert connection.recv(65536)[9:12] in {b"200", b"408"}, "in time or too late, as fast as the machine is"


# File descriptors


def test_few_file_descriptors_are_shared_fairly_and_told(serve, small_bundle):
    running = serve(small_bundle, "--log-level", "warning", max_open_files=256, DLRM_API_KEY=KEY)
    abused = Abused(running)

    def is_answered():
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{running.url}/v2/health/ready", timeout=10).status_code == 200

    with contextlib.ExitStack() as until_the_end:
        for number in range(300 * min(SCALE, 5)):
            connection = until_the_end.enter_context(abused.connect())
            # Some are silent, some send a body slowly that nobody wants, some one that is waited for.
            key = KEY_BYTES if number % 3 == 1 else b"wrong"
            with contextlib.suppress(ConnectionError):
                connection.sendall(post(b"x" * 1000, key=key)[0] if number % 3 else b"")
        until(is_answered, 10)  # all of them came in one moment
        for _ in range(20):
            assert abused.good.get("/v2/health/ready").status_code == 200
            assert abused.good.post("/predict", content=ROWS).status_code == 200
    abused.good.close()
    code, log = running.stop()
    assert code == 0
    told = [line for line in log if line["event"] == "file descriptors are running out"]
    assert 1 <= len(told) <= 10, "not for each connection"
    assert "ulimit" in told[0]["message"]
