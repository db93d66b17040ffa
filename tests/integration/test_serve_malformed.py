"""Whatever is sent to a server, it answers with a reason, and goes on."""

import json
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
from torchdlrm.serving.open_inference.messages import CLASSES


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


def exchange(server, sent, wait_s=5.0):
    """What the server answers to bytes, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait_s) as connection:
        connection.sendall(sent)
        answer = b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


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
from torchdlrm.serving.exchange import Exchange
from torchdlrm.serving.framing import Head

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"1\\r\\nset-cookie: 2")]})
    await send({"type": "http.response.body", "body": b"{}"})

sent, nothing = [], lambda *_: None
connection = SimpleNamespace(server=None, client=None, is_gone=nothing, write=sent.append, answered=nothing)
asyncio.run(Exchange(Head("GET", b"/", "1.1", [], True, False), connection, []).run(app))
print(b"".join(sent).decode())
"""


@pytest.mark.parametrize("options", [(), ("-O",)])
def test_a_header_of_two_lines_is_never_sent_also_without_asserts(options):
    """Ours have one line each; what a header repeats of a request must not become a header or an answer itself."""
    command = [sys.executable, *options, "-c", SENDS_A_HEADER_OF_TWO_LINES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("HTTP/1.1 500 ")
    assert "set-cookie" not in done.stdout
    assert "a header of the answer has more than one line" in done.stderr
