"""What is too much is refused at once, and meanwhile everybody else is answered."""

import collections
import json
import threading
import time
from pathlib import Path

import grpc
import httpx
import pytest

from torchdlrm.serving.front.open_inference.messages import CLASSES, PACKAGE, SERVICE

KEY = "only-for-this-test"
HEALTH = ("ServerLive", "ServerReady", "ModelReady")


@pytest.fixture(scope="module")
def server(serve, small_bundle):
    options = ("--grpc-port", 0, "--max-concurrent-requests", 1, "--log-level", "warning")
    server = serve(small_bundle, *options, DLRM_API_KEY=KEY)
    yield server
    code, log = server.stop()
    assert code == 0
    assert [line for line in log if line["level"] == "error"] == []


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=60, headers={"X-API-Key": KEY}) as client:
        yield client


@pytest.fixture(scope="module")
def channel(server):
    with grpc.insecure_channel(server.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        yield channel


def call(channel, method, request, *, key=KEY):
    """The answer; or the code of a refusal, and what it says."""
    ask = channel.unary_unary(f"/{PACKAGE}.{SERVICE}/{method}")
    sent = request if isinstance(request, bytes) else request.SerializeToString()
    try:
        answered = ask(sent, timeout=60, metadata=(("x-api-key", key),) if key else ())
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, CLASSES[f"{method}Response"].FromString(answered)


def infer_request(model, **tensor):
    request = CLASSES["ModelInferRequest"](model_name=model)
    request.inputs.add(**{"name": "int_0", "datatype": "INT64", "shape": [1], **tensor})
    return request


class Health:
    """Asks for a server's health, again and again."""

    def __init__(self, url):
        self._url, self.longest_s, self._is_over = url, 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def _ask(self):
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._is_over.wait(0.002):
                started_s = time.perf_counter()
                assert client.get("/v2/health/live").status_code == 200
                self.longest_s = max(self.longest_s, time.perf_counter() - started_s)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._is_over.set()
        self._thread.join(timeout=60)


def peak_bytes(server):
    status = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in status if line.startswith("VmHWM:"))


def texts(num_texts):
    """As bytes, with the header of JSON in front."""
    size = {"binary_data_size": 4 * num_texts}
    head = {"inputs": [{"name": "cat_0", "datatype": "BYTES", "shape": [num_texts], "parameters": size}]}
    return json.dumps(head).encode(), bytes(4 * num_texts)


BODIES = {
    "shared x candidates": lambda: json.dumps(
        {"shared": {f"k{i}": 0 for i in range(12_000)}, "candidates": [{}] * 20_000}
    ).encode(),
    "5.5 million candidates": lambda: b'{"shared":{},"candidates":[' + b"{}," * 5_500_000 + b"{}]}",
    "5.5 million lists": lambda: b"[" + b"[]," * 5_500_000 + b"{}]",
    "a long name": lambda: json.dumps([{"\U0010ffff" * 1_000_000: 1}], ensure_ascii=False).encode(),
    "a long text": lambda: json.dumps([{"cat_0": "a" * 16_000_000}]).encode(),
    "a deep cell": lambda: b'[{"int_0":' + b"[" * 1_000 + b"]" * 1_000 + b"}]",
}


@pytest.mark.parametrize("what", BODIES)
def test_rows_that_are_too_much_hold_nobody_up(server, client, what):
    body, before_bytes = BODIES[what](), peak_bytes(server)
    with Health(server.url) as health:
        answer = client.post("/predict", content=body)
    assert answer.status_code in {400, 413}
    assert len(answer.content) < 1_000
    assert health.longest_s < 0.5
    assert peak_bytes(server) - before_bytes < 8 * len(body) + (64 << 20)


@pytest.mark.parametrize("what", ["inputs", "texts"])
def test_tensors_that_are_too_much_hold_nobody_up(server, client, what):
    one = b'{"name":"x","datatype":"INT64","shape":[0],"data":[]}'
    head, data = (b'{"inputs":[' + b",".join([one] * 250_000) + b"]}", b"") if what == "inputs" else texts(4_000_000)
    with Health(server.url) as health:
        answer = client.post(
            f"/v2/models/{server.model}/infer",
            content=head + data,
            headers={"Inference-Header-Content-Length": str(len(head))},
        )
    assert answer.status_code == 413
    assert health.longest_s < 0.5


def many_inputs(request):
    for _ in range(400_000):
        request.inputs.add(name="x", datatype="INT64", shape=[0])


def many_parameters(request):
    for number in range(200_000):
        request.parameters[str(number)].bool_param = True


MESSAGES = {
    "400,000 inputs": many_inputs,
    "4 million texts": lambda request: request.inputs.add(
        name="cat_0", datatype="BYTES", shape=[4_000_000]
    ).contents.bytes_contents.extend([b""] * 4_000_000),
    "4 million texts as bytes": lambda request: (
        request.inputs.add(name="cat_0", datatype="BYTES", shape=[4_000_000]),
        request.raw_input_contents.append(bytes(16_000_000)),
    ),
    "200,000 parameters": many_parameters,
}


@pytest.mark.parametrize("what", MESSAGES)
def test_messages_that_are_too_much_hold_nobody_up(server, channel, what):
    request = CLASSES["ModelInferRequest"](model_name=server.model)
    MESSAGES[what](request)
    sent = request.SerializeToString()
    with Health(server.url) as health:
        code, message = call(channel, "ModelInfer", sent)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert "send several requests" in message
    assert health.longest_s < 0.5


def test_a_busy_server_says_unavailable_and_tells_its_health(server, channel):
    request, ready = infer_request(server.model), CLASSES["ModelReadyRequest"](name=server.model)
    request.inputs[0].contents.int64_contents.append(3)
    codes = collections.Counter()
    is_over = threading.Event()

    def ask():
        while not is_over.is_set():
            codes[call(channel, "ModelInfer", request)[0]] += 1

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    deadline_s = time.monotonic() + 60
    told = collections.Counter()
    while time.monotonic() < deadline_s and (codes[grpc.StatusCode.UNAVAILABLE] < 50 or told.total() < 60):
        for method in HEALTH:
            sent = ready if method == "ModelReady" else CLASSES[f"{method}Request"]()
            told[call(channel, method, sent, key=None)[0]] += 1
    is_over.set()
    for thread in threads:
        thread.join()
    assert set(told) == {grpc.StatusCode.OK}
    assert set(codes) == {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}


def test_a_models_readiness_needs_no_key_and_another_models_name_is_told_to_nobody(server, channel):
    for prefix in (f"/v2/models/{server.model}", f"/v2/models/{server.model}/versions/{server.version}"):
        assert httpx.get(f"{server.url}{prefix}/ready").json()["ready"] is True
        assert httpx.get(f"{server.url}{prefix}").status_code == 401
    assert httpx.get(f"{server.url}/v2/models/other/ready").status_code == 401
    for version in ("", server.version):
        request = CLASSES["ModelReadyRequest"](name=server.model, version=version)
        assert call(channel, "ModelReady", request, key=None)[1].ready
    other = CLASSES["ModelReadyRequest"](name="other")
    assert call(channel, "ModelReady", other, key=None)[0] == grpc.StatusCode.UNAUTHENTICATED
    assert call(channel, "ModelReady", other)[0] == grpc.StatusCode.NOT_FOUND
    for method in ("ServerMetadata", "ModelMetadata"):
        code, _ = call(channel, method, CLASSES[f"{method}Request"](), key=None)
        assert code == grpc.StatusCode.UNAUTHENTICATED


def with_raw_and_contents(request):
    request.inputs[0].contents.int64_contents.append(3)
    request.raw_input_contents.append(bytes(8))


def with_output(**parameters):
    def build(request):
        output = request.outputs.add(name="prediction")
        for name, value in parameters.items():
            field = "int64_param" if isinstance(value, int) else "string_param"
            setattr(output.parameters[name], field, value)

    return build


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (with_output(classification=3), "classification is not offered"),
        (with_output(shared_memory_region="a", shared_memory_byte_size=4), "shares no memory"),
        (with_raw_and_contents, "both contents and a piece of raw_input_contents"),
        (lambda request: [request.outputs.add(name="prediction") for _ in range(2)], "outputs: 2 are asked for"),
        (lambda request: request.outputs.add(name="x" * 100_000), "outputs: 'xxx"),
        (lambda request: setattr(request.inputs[0], "name", "x" * 100_000), "is no column of this model"),
        (lambda request: request.inputs[0].parameters["shared_memory_region"].Clear(), "shares no memory"),
        (lambda request: setattr(request.inputs[0], "datatype", "x" * 100_000), "datatype 'xxx"),
    ],
)
def test_grpc_refuses_what_http_refuses_with_a_short_reason(server, channel, build, message):
    request = infer_request(server.model)
    build(request)
    code, told = call(channel, "ModelInfer", request)
    assert code == grpc.StatusCode.INVALID_ARGUMENT
    assert message in told
    assert len(told) < 300


def test_both_protocols_list_the_same_extensions(client, channel):
    code, metadata = call(channel, "ServerMetadata", CLASSES["ServerMetadataRequest"]())
    assert code == grpc.StatusCode.OK
    assert list(metadata.extensions) == client.get("/v2").json()["extensions"]
