"""Whatever is sent to a server, it answers with a reason, and goes on."""

import json
import random
import socket
import struct
import subprocess
import sys
import time

import grpc
import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.abused import SCALE
from torchdlrm.serving.front.open_inference.messages import CLASSES


@pytest.fixture(scope="module")
def server(serve, small_bundle):
    server = serve(
        small_bundle, "--grpc-port", 0, "--max-body-bytes", 1_000_000, "--max-rows-per-request", 100,
        "--header-timeout-s", 1, "--body-timeout-s", 1, "--log-level", "warning",
    )  # fmt: skip
    yield server
    code, log = server.stop()
    assert code == 0
    assert [line for line in log if line["level"] == "error"] == []


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=10) as client:
        yield client


@pytest.fixture(autouse=True)
def still_there(client):
    yield
    assert client.post("/predict", json=[{}]).status_code == 200


def infer(client, server, header, data=b"", length=None):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    headers = {"Inference-Header-Content-Length": str(len(head) if length is None else length)}
    return client.post(f"/v2/models/{server.model}/infer", content=head + data, headers=headers)


def dense(**changes):
    return {"inputs": [{"name": "dense", "datatype": "FP32", "shape": [1, 13], **changes}]}


def binary(size, **changes):
    return dense(parameters={"binary_data_size": size}, **changes)


HUGE = 2**40
ZEROS = bytes(52)
MALFORMED = {
    "no JSON": (b"hello", b""),
    "nothing": (b"", b""),
    "a list": ([], b""),
    "a number": (1, b""),
    "deep": (b"[" * 100_000, b""),
    "no inputs": ({}, b""),
    "inputs null": ({"inputs": None}, b""),
    "inputs empty": ({"inputs": []}, b""),
    "an input null": ({"inputs": [None]}, b""),
    "no name": ({"inputs": [{"datatype": "FP32", "shape": [1], "data": [1]}]}, b""),
    "no data": (dense(), b""),
    "data null": (dense(data=None), b""),
    "data too short": (dense(data=[1.0]), b""),
    "data ragged": (dense(data=[[1.0] * 13, [1.0]], shape=[2, 13]), b""),
    "data text": (dense(data=["1"] * 13), b""),
    "data objects": (dense(data=[{}] * 13), b""),
    "a number beyond int64": ({"inputs": [{"name": "int_0", "datatype": "INT64", "shape": [1], "data": [2**63]}]}, b""),
    "a number beyond uint8": ({"inputs": [{"name": "int_0", "datatype": "UINT8", "shape": [1], "data": [300]}]}, b""),
    "half a number": ({"inputs": [{"name": "int_0", "datatype": "INT64", "shape": [1], "data": [1.5]}]}, b""),
    "datatype unknown": (dense(datatype="COMPLEX", data=[1] * 13), b""),
    "datatype BOOL": (dense(datatype="BOOL", data=[True] * 13), b""),
    "shape negative": (binary(52, shape=[-1, 13]), ZEROS),
    "shape twice negative": (binary(52, shape=[-1, -13]), ZEROS),
    "shape empty": (binary(52, shape=[]), ZEROS),
    "shape of three": (binary(52, shape=[1, 13, 1]), ZEROS),
    "shape of text": (binary(52, shape="13"), ZEROS),
    "shape of floats": (binary(52, shape=[1.0, 13.0]), ZEROS),
    "shape of booleans": (binary(52, shape=[True, 13]), ZEROS),
    "2^40 rows": (binary(52, shape=[HUGE, 13]), ZEROS),
    "2^40 rows of nothing": ({"inputs": [{"name": "int_0", "datatype": "INT64", "shape": [HUGE, 0], "data": []}]}, b""),
    "2^70 rows": (binary(52, shape=[2**63 - 1, 13]), ZEROS),
    "2^40 rows of texts": ({"inputs": [{"name": "cat_0", "datatype": "BYTES", "shape": [HUGE], "data": []}]}, b""),
    "no columns": (binary(0, shape=[1, 0]), b""),
    "wrong number of columns": (binary(48, shape=[1, 12]), bytes(48)),
    "too many bytes": (binary(52), ZEROS + b"x"),
    "too few bytes": (binary(52), ZEROS[:-1]),
    "size too small": (binary(51), ZEROS),
    "size negative": (binary(-52), ZEROS),
    "size 2^40": (binary(HUGE), ZEROS),
    "size text": (binary("52"), ZEROS),
    "infinite": (binary(52), np.full(13, np.inf, "<f4").tobytes()),
    "unknown input": ({"inputs": [{"name": "nope", "datatype": "FP32", "shape": [1], "data": [1.0]}]}, b""),
    "given twice": ({"inputs": [{"name": "int_0", "datatype": "INT64", "shape": [1], "data": [1]}] * 2}, b""),
    "different rows": (
        {
            "inputs": [
                {"name": "int_0", "datatype": "INT64", "shape": [1], "data": [1]},
                {"name": "int_1", "datatype": "INT64", "shape": [2], "data": [1, 2]},
            ]
        },
        b"",
    ),
    "hex too long": ({"inputs": [{"name": "cat_0", "datatype": "BYTES", "shape": [1], "data": ["123456789"]}]}, b""),
    "hex beyond 32 bits": ({"inputs": [{"name": "cat_0", "datatype": "INT64", "shape": [1], "data": [2**32]}]}, b""),
    "hex negative": ({"inputs": [{"name": "cat_0", "datatype": "INT64", "shape": [1], "data": [-1]}]}, b""),
    "hex as float": ({"inputs": [{"name": "cat_0", "datatype": "FP32", "shape": [1], "data": [1.0]}]}, b""),
    "unknown output": ({**dense(data=[1.0] * 13), "outputs": [{"name": "score"}]}, b""),
    "outputs text": ({**dense(data=[1.0] * 13), "outputs": "prediction"}, b""),
    "classification": (
        {**dense(data=[1.0] * 13), "outputs": [{"name": "prediction", "parameters": {"classification": 3}}]},
        b"",
    ),
    "shared memory": (dense(parameters={"shared_memory_region": "a", "shared_memory_byte_size": 52}), b""),
    "id a number": ({**dense(data=[1.0] * 13), "id": 7}, b""),
    "101 rows": (dense(shape=[101, 13], data=[1.0] * 1313), b""),
}
TEXTS = {"name": "cat_0", "datatype": "BYTES", "shape": [2]}
MALFORMED_TEXTS = {
    "length beyond the end": struct.pack("<I", 100) + b"ab",
    "length 2^32 - 1": struct.pack("<I", 2**32 - 1) + b"ab" + bytes(8),
    "one text for two": struct.pack("<I", 2) + b"ab",
    "three texts for two": (struct.pack("<I", 2) + b"ab") * 3,
    "not UTF-8": (struct.pack("<I", 2) + b"\xff\xfe") * 2,
    "nothing": b"",
}


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_tensors_get_a_reason(client, server, what):
    answer = infer(client, server, *MALFORMED[what])
    assert answer.status_code in ({400, 413} if "rows" in what else {400}), answer.text
    assert len(answer.json()["error"]) > 10


@pytest.mark.parametrize("what", MALFORMED_TEXTS)
def test_malformed_texts_get_a_reason(client, server, what):
    data = MALFORMED_TEXTS[what]
    answer = infer(client, server, {"inputs": [{**TEXTS, "parameters": {"binary_data_size": len(data)}}]}, data)
    assert answer.status_code == 400
    assert "'cat_0'" in answer.json()["error"]


@pytest.mark.parametrize("length", ["-1", "9" * 30, "1e3", "x", "", "1000000"])
def test_a_wrong_length_of_the_json_gets_a_reason(client, server, length):
    answer = infer(client, server, binary(52), ZEROS, length=length)
    assert answer.status_code == 400
    assert "Inference-Header-Content-Length" in answer.json()["error"]


def test_nan_is_a_missing_value_and_no_rows_are_no_predictions(client, server):
    missing = infer(client, server, binary(52), np.full(13, np.nan, "<f4").tobytes()).json()
    assert missing["outputs"][0]["data"] == client.post("/predict", json=[{}]).json()["predictions"]
    nothing = infer(client, server, binary(0, shape=[0, 13])).json()
    assert (nothing["outputs"][0]["shape"], nothing["outputs"][0]["data"]) == ([0], [])


@settings(max_examples=150 * SCALE, deadline=None, suppress_health_check=list(HealthCheck))
@given(header=st.binary(max_size=40) | st.just(json.dumps(binary(52)).encode()), data=st.binary(max_size=80))
def test_any_bytes_get_an_answer(client, server, header, data):
    assert infer(client, server, header, data).status_code in {200, 400}
    assert client.post("/predict", content=header + data).status_code in {200, 400}


CELLS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.lists(st.integers(), max_size=2)
)


@settings(max_examples=150 * SCALE, deadline=None, suppress_health_check=list(HealthCheck))
@given(rows=st.lists(st.dictionaries(st.sampled_from(["int_0", "cat_0", "cat_1", "label", "x"]), CELLS), max_size=4))
def test_any_cells_get_an_answer(client, rows):
    answer = client.post("/predict", content=json.dumps(rows))
    assert answer.status_code in {200, 400}
    assert len(answer.json().get("predictions", rows)) == len(rows)


def test_malformed_messages_over_grpc_get_a_reason(server):
    request = CLASSES["ModelInferRequest"]
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        requests = [b"\xff\xff\xff", request(model_name=server.model).SerializeToString()]
        for shape in ([HUGE, 13], [-1, 13], [], [1, 13]):
            asked = request(model_name=server.model)
            asked.inputs.add(name="dense", datatype="FP32", shape=shape)
            requests.append(asked.SerializeToString())
            asked.raw_input_contents.extend([b"x"] * 2)
            requests.append(asked.SerializeToString())
        for sent in requests:
            with pytest.raises(grpc.RpcError) as refused:
                call(sent, timeout=5)
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_bodies_and_rows_have_limits(client):
    for sent in ({"content": b" " * 1_000_001}, {"content": iter([b" " * 400_000] * 3)}, {"json": [{}] * 101}):
        answer = client.post("/predict", **sent)
        assert answer.status_code == 413
        assert "1,000,000" in answer.json()["error"] or "101 rows" in answer.json()["error"]
    assert client.post("/predict", content=b"x", headers={"Content-Encoding": "gzip"}).status_code == 415


def exchange(server, *pieces, wait_s=5.0):
    """What the server answers to bytes, sent piece by piece, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            connection.sendall(piece)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
LONG = b"a" * (32 << 10)
READ_IN_TWO_WAYS = {
    "no Host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two Hosts": (b"GET / HTTP/1.1\r\nHost: x\r\nHost: x\r\n\r\n", 400),
    "two Hosts in HTTP/1.0": (b"GET / HTTP/1.0\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    "a Host that is none": (b"GET / HTTP/1.1\r\nHost: x/y\r\n\r\n", 400),
    "chunked in HTTP/1.0": (CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"), 400),
    "gzip, chunked": (CHUNKED.replace(b": chunked", b": gzip, chunked"), 501),
    "gzip": (CHUNKED.replace(b": chunked", b": gzip"), 501),
    "chunked twice": (CHUNKED[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", 501),
    "length and chunked": (CHUNKED[:-2] + b"Content-Length: 4\r\n\r\n", 400),
    "two different lengths": (POST + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\n", 400),
    "a length that is none": (POST + b"Content-Length: +4\r\n\r\n", 400),
    "no length": (POST + b"Content-Length:\r\n\r\n", 400),
    "a space before the colon": (POST + b"Content-Length : 4\r\n\r\n", 400),
    "NUL": (POST + b"A: \x00\r\n\r\n", 400),
    "a bare CR": (POST + b"A: b\rC: d\r\n\r\n", 400),
    "empty lines": (b"\r\n\r\n", 400),
    "empty lines before a request": (b"\r\n\r\n" + POST + b"\r\n", 400),
    "no size of a chunk": (CHUNKED + b"\r\n", 400),
    "a signed size": (CHUNKED + b"+1\r\na\r\n0\r\n\r\n", 400),
    "a size with a prefix": (CHUNKED + b"0x1\r\na\r\n0\r\n\r\n", 400),
    "a size beyond numbers": (CHUNKED + b"f" * 21 + b"\r\na\r\n0\r\n\r\n", 400),
    "a longer chunk": (CHUNKED + b"1\r\nab\r\n0\r\n\r\n", 400),
    "an LF behind a size": (CHUNKED + b"1;\na\r\n0\r\n\r\n", 400),
    "an endless size": (CHUNKED + b"1;" + LONG, 431),
    "long trailers": (CHUNKED + b"0\r\n" + b"a1: b\r\n" * 6_000 + b"\r\n", 431),
    "trailers that are none": (CHUNKED + b"0\r\nGET / HTTP/1.1\r\n\r\n", 400),
    "endless trailers": (CHUNKED + b"0\r\n" + b"a1: b\r\n" * 6_000, 431),
}


@pytest.mark.parametrize("what", READ_IN_TWO_WAYS)
def test_what_could_be_read_in_two_ways_or_has_no_end_is_refused_once(server, what):
    sent, code = READ_IN_TWO_WAYS[what]
    behind = b"" if "endless" in what else b"GET /v2 HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = exchange(server, sent + behind)
    assert answer.startswith(b"HTTP/1.1 %d " % code)
    assert answer.count(b"HTTP/1.1 ") == 1


def test_requests_are_the_same_however_they_are_cut(server, seed):
    rng = random.Random(seed)
    for _ in range(20 * SCALE):
        sent, sizes = b"", [rng.randint(0, 3) for _ in range(4)]
        for size in sizes:
            body = json.dumps([{}] * size).encode()
            if rng.random() < 0.5:
                sent += POST + b"Content-Length:\t%d \r\n\r\n" % len(body) + body + rng.choice([b"", b"\r\n"])
            else:
                cut = rng.randint(1, len(body))
                chunks = [chunk for chunk in (body[:cut], body[cut:]) if chunk]
                trailers = rng.choice([b"", b"X-API-Key: a\r\n", b"A: b\r\nContent-Length: 7\r\n"])
                sent += CHUNKED + b"".join(b"%x;e=1\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
                sent += b"0\r\n" + trailers + b"\r\n"
        sent += b"GET /v2 HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, Close\r\nUpgrade: h2c\r\n\r\n" + POST
        cuts = sorted(rng.randint(0, len(sent)) for _ in range(rng.choice([0, 3, 60])))
        answer = exchange(server, *(sent[a:b] for a, b in zip([0, *cuts], [*cuts, len(sent)], strict=True)))
        *predicted, last = [part.partition(b"\r\n\r\n") for part in answer.split(b"HTTP/1.1 ")[1:]]
        assert [len(json.loads(body)["predictions"]) for _, _, body in predicted] == sizes
        assert (last[0][:3], b"connection: close" in last[0]) == (b"200", True)


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 100_000, 431),
        (b"GET / HTTP/1.1\r\nHost", 408),
        (b"", 408),
        (b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n[", 408),
    ],
    ids=["no HTTP", "long header", "slow header", "silence", "slow body"],
)
def test_clients_that_are_slow_or_speak_no_http_are_told_and_cut_off(server, sent, code):
    started_s = time.monotonic()
    answer = exchange(server, sent)
    assert answer.startswith(b"HTTP/1.1 %d " % code)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert time.monotonic() - started_s < 3


SENDS_A_HEADER_OF_TWO_LINES = """
import asyncio
from types import SimpleNamespace
import h11
from torchdlrm.serving.front.exchange import Exchange

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"1\\r\\nset-cookie: 2")]})
    await send({"type": "http.response.body", "body": b"{}"})

sent, nothing = [], lambda *_: None
connection = SimpleNamespace(server=None, client=None, is_gone=nothing, write=sent.append, answered=nothing)
head = h11.Request(method="GET", target="/", headers=[("host", "x")])
asyncio.run(Exchange(head, connection, (b"date", b"today")).run(app))
print(b"".join(sent).decode())
"""


def test_a_header_of_two_lines_is_never_sent_also_without_asserts():
    """Ours have one line each; what a header repeats of a request must not become a header or an answer itself."""
    command = [sys.executable, "-O", "-c", SENDS_A_HEADER_OF_TWO_LINES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("HTTP/1.1 500 ")
    assert "set-cookie" not in done.stdout
    assert "a header of the answer has more than one line" in done.stderr
