"""Over gRPC too, clients that mean harm cost the others nothing; longer with TORCHDLRM_ABUSE=20, as over HTTP."""

import contextlib
import socket
import time

import grpc
import httpx
import pytest

from helpers.abused import KEY, KEY_BYTES, SCALE, Abused, Http2, until
from torchdlrm.serving.front.open_inference.messages import CLASSES

INFER = "/inference.GRPCInferenceService/ModelInfer"
LARGE = 15_000_000


@pytest.fixture(scope="module")
def abused(serve, small_bundle):
    times = ("--header-timeout-s", 2, "--body-timeout-s", 3, "--keep-alive-s", 2)
    limits = ("--grpc-port", 0, "--max-concurrent-requests", 8, "--log-level", "warning")
    abused = Abused(serve(small_bundle, *times, *limits, DLRM_API_KEY=KEY))
    abused.serves_others()
    yield abused
    assert abused.serves_others()
    abused.good.close()
    code, log = abused.running.stop()
    assert code == 0
    assert [line for line in log if line["level"] == "error"] == []


def address(running):
    host, port = running.grpc.rsplit(":", 1)
    return host, int(port)


def begin(client, streams, method, key):
    """Send nearly all of some large messages; how many bytes the server has taken."""
    left = dict.fromkeys(streams, LARGE - 1)
    for stream in left:
        client.call(stream, method, key, LARGE)
    num_bytes, last_s = 0, time.monotonic()
    while any(left[stream] for stream in left if stream not in client.answers) and time.monotonic() - last_s < 1:
        client.listen(0.01)
        for stream in left:
            while sent := client.send(stream, bytes(min(left[stream], 16384))):
                left[stream] -= sent
                num_bytes, last_s = num_bytes + sent, time.monotonic()
                if stream in client.answers:
                    break
    return num_bytes


def test_without_a_key_nothing_of_a_message_is_taken(abused):
    before_mb = abused.memory_mb()
    streams = range(1, 2 * 40 * SCALE, 2)
    with Http2(address(abused.running)) as client:
        client.listen(1)
        begin(client, streams, b"ModelInfer", b"wrong")
        until(lambda: client.listen(0.1) or set(streams) <= set(client.answers), 10)
        assert all(b"API key" in answer for answer in client.answers.values())
        assert abused.memory_mb() - before_mb < 100
        assert abused.serves_others()


@pytest.mark.parametrize(("method", "key"), [(b"ModelInfer", KEY_BYTES), (b"ServerLive", b"wrong")])
def test_messages_that_never_end_are_limited_in_number_and_time(abused, method, key):
    before_mb = abused.memory_mb()
    streams = range(1, 2 * 20 * SCALE, 2)  # of which as many are waited for as requests may be under way: 8
    with Http2(address(abused.running)) as client:
        client.listen(1)
        begun_s = time.monotonic()
        assert begin(client, streams, method, key) > 8 * LARGE / 2, "so there is something to limit"
        assert abused.memory_mb() - before_mb < 8 * 2 * LARGE / 1e6 + 100
        assert abused.serves_others()
        until(lambda: client.listen(0.1) or set(streams) <= set(client.answers), 15)
        assert all(b"did not come" in answer for answer in client.answers.values())
        assert time.monotonic() - begun_s > 2.5, "the last few had their time"
        client.call(streams[-1] + 2, b"ServerLive", b"", 0)
        until(lambda: client.listen(0.1) or streams[-1] + 2 in client.answers, 5)
        begin(client, range(streams[-1] + 4, streams[-1] + 10, 2), method, key)
    # Of those last the client has gone, in the middle; the log says nothing of it.
    assert abused.serves_others()


def test_of_large_messages_that_are_refused_nothing_stays(abused):
    wrong = CLASSES["ModelInferRequest"](id="x" * LARGE).SerializeToString()
    with grpc.insecure_channel(abused.running.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        call = channel.unary_unary(INFER)

        def refused(key):
            with pytest.raises(grpc.RpcError) as error:
                call(wrong, timeout=20, metadata=(("x-api-key", key),))
            return error.value.code()

        assert refused(KEY) == grpc.StatusCode.NOT_FOUND
        before_mb = abused.memory_mb()
        for _ in range(30 * SCALE):
            assert refused(KEY) == grpc.StatusCode.NOT_FOUND
            assert refused("wrong") == grpc.StatusCode.UNAUTHENTICATED
        assert abused.memory_mb() - before_mb < 10 * LARGE / 1e6


@pytest.mark.parametrize("key", [KEY, "wrong"])
def test_messages_that_are_too_long_or_missing_are_refused_without_a_trace_in_the_log(abused, key):
    with grpc.insecure_channel(abused.running.grpc, [("grpc.max_send_message_length", -1)]) as channel:
        call = channel.stream_unary(INFER)
        for sent, compression, code in (
            ([bytes(17 << 20)], None, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ([bytes(100 << 20)], grpc.Compression.Gzip, grpc.StatusCode.RESOURCE_EXHAUSTED),
            ([], None, grpc.StatusCode.INVALID_ARGUMENT),
        ):
            for _ in range(3 * SCALE):
                with pytest.raises(grpc.RpcError) as error:
                    call(iter(sent), timeout=20, metadata=(("x-api-key", key),), compression=compression)
                assert error.value.code() == (code if key == KEY else grpc.StatusCode.UNAUTHENTICATED)


def test_connections_without_calls_are_closed(abused):
    started_s = time.monotonic()
    with (
        socket.create_connection(address(abused.running), timeout=12) as silent,
        Http2(address(abused.running)) as idle,
    ):
        until(lambda: idle.listen(0.1) or idle.is_closed, 12)
        while silent.recv(1000):
            pass
    assert 1 < time.monotonic() - started_s < 12


@pytest.mark.slow
def test_answers_that_are_not_taken_are_kept_for_a_time_and_other_clients_notice_nothing(serve, small_bundle):
    times = ("--keep-alive-s", 1, "--body-timeout-s", 1)  # so a connection becomes 8 s old, and its calls 2 s more
    running = serve(small_bundle, "--grpc-port", 0, "--log-level", "warning", *times)
    started_s, stream, num_answered = time.monotonic(), 1, 0
    with Http2(address(running), answer_bytes=0) as client, grpc.insecure_channel(running.grpc) as channel:
        live = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        client.listen(1)
        while not client.is_closed:
            for _ in range(20):  # one would do: while there are new calls, a connection is not silent
                client.call(stream, b"ServerLive", b"", 0)
                stream += 2
            client.listen(0.1)
            assert CLASSES["ServerLiveResponse"].FromString(live(b"", timeout=5)).live
            num_answered += 1
            assert time.monotonic() - started_s < 25
        until(lambda: live(b"", timeout=5) and time.monotonic() - started_s > 12, 15)
    assert time.monotonic() - started_s > 5, "not for being silent"
    assert num_answered > 20
    code, log = running.stop()
    assert code == 0
    assert log == [line for line in log if line["level"] == "info"], "a client that leaves is no news"


def test_connections_of_grpc_leave_http_its_file_descriptors(serve, small_bundle):
    running = serve(small_bundle, "--grpc-port", 0, "--log-level", "warning", max_open_files=256)
    with contextlib.ExitStack() as until_the_end:
        for _ in range(300):
            until_the_end.enter_context(socket.create_connection(address(running), timeout=10))
        for _ in range(20):
            assert httpx.get(f"{running.url}/v2/health/ready", timeout=10).status_code == 200
            assert httpx.post(f"{running.url}/predict", content=b"[{}]", timeout=10).status_code == 200
    code, log = running.stop()
    assert code == 0
    assert log == [line for line in log if line["level"] == "info"]
