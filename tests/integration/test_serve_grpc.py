"""gRPC as operators meet it: how calls are named in the logs, and that a stop loses none; with grpc's own client."""

import collections
import os
import threading

import grpc
import polars as pl
import pytest

from torchdlrm.serving.front.open_inference.messages import CLASSES, PACKAGE, SERVICE

NUM_STOPS = int(os.environ.get("TORCHDLRM_NUM_STOPS", "1"))


def infer(channel):
    """The method of the protocol that predicts, without a client library in between."""
    return channel.unary_unary(
        f"/{PACKAGE}.{SERVICE}/ModelInfer",
        request_serializer=CLASSES["ModelInferRequest"].SerializeToString,
        response_deserializer=CLASSES["ModelInferResponse"].FromString,
    )


def one_row(model, **fields):
    request = CLASSES["ModelInferRequest"](model_name=model, **fields)
    request.inputs.add(name="int_0", datatype="INT64", shape=[1]).contents.int64_contents.append(3)
    return request


@pytest.mark.parametrize("drain_s", [0, 0.5])
def test_a_stop_loses_no_call_over_grpc(serve, small_bundle, drain_s):
    for _ in range(NUM_STOPS):
        server = serve(small_bundle, "--grpc-port", 0, "--drain-s", drain_s, "--log-level", "warning")
        codes = collections.Counter()
        all_are_asking = threading.Barrier(33, timeout=30)

        def ask(channel, model=server.model, codes=codes, all_are_asking=all_are_asking):
            call, request = infer(channel), one_row(model)
            call(request)
            all_are_asking.wait()
            while True:
                try:
                    call(request)
                except grpc.RpcError as error:
                    codes[error.code()] += 1
                    if error.code() == grpc.StatusCode.UNAVAILABLE:
                        return

        channels = [grpc.insecure_channel(server.grpc, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(4)]
        threads = [threading.Thread(target=ask, args=(channels[number % 4],)) for number in range(32)]
        for thread in threads:
            thread.start()
        all_are_asking.wait()
        code, _ = server.stop()
        for thread in threads:
            thread.join(timeout=30)
        for channel in channels:
            channel.close()
        assert code == 0
        assert codes == {grpc.StatusCode.UNAVAILABLE: 32}, (
            "each client is refused once, after the stop, and in no other way"
        )


def test_requests_over_grpc_are_named_in_the_logs_and_the_answer_as_over_http(serve, small_bundle, tmp_path):
    server = serve(small_bundle, "--grpc-port", 0, "--log-predictions", tmp_path / "log")
    names = []
    with grpc.insecure_channel(server.grpc) as channel:
        call = infer(channel)
        for field, header in [
            ("mine", None),
            ("mine", "named"),
            ("", "n" * 128),
            ("", "n" * 129),
            ("two\nlines", None),
        ]:
            metadata = None if header is None else (("x-request-id", header),)
            response, done = call.with_call(one_row(server.model, id=field), metadata=metadata)
            assert response.id == field
            names.append(dict(done.trailing_metadata())["x-request-id"])
        with pytest.raises(grpc.RpcError) as refused:
            call(one_row("another", id="refused"))
        assert dict(refused.value.trailing_metadata())["x-request-id"] == "refused"
    assert names[:3] == ["mine", "named", "n" * 128]
    assert len(set(names)) == 5
    assert not {"n" * 129, "two\nlines"} & set(names)
    code, log = server.stop()
    assert code == 0
    told = [(line["request_id"], line["status"], line["client"]) for line in log if line["event"] == "request"]
    assert told == [*((name, 200, "127.0.0.1") for name in names), ("refused", 404, "127.0.0.1")]
    logged = pl.concat(map(pl.read_parquet, (tmp_path / "log").glob("*.parquet")))
    assert logged["request_id"].to_list() == names
