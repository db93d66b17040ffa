"""`dlrm serve` as its users meet it: real processes, real HTTP, the clients that others have written."""

import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import polars as pl
import pytest
import tritonclient.grpc as triton_grpc

from torchdlrm.features.kinds import hex_digits
from torchdlrm.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def triton_http():
    """The HTTP client of Triton, whose package needs the extra `http` for it."""
    return pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]", exc_type=RuntimeError)


@pytest.fixture(scope="module")
def predictor(small_bundle):
    return Predictor.open(small_bundle)


@pytest.fixture(scope="module")
def sample(predictor):
    """Raw typed rows, and what they must give."""
    frame, expected = predictor.bundle.sample()
    return frame.head(100), expected[:100]


@pytest.fixture(scope="module")
def rows(sample, predictor):
    """The same rows as JSON has them."""
    frame = sample[0]
    features = [frame[column.name] for column in predictor.schema.dense]
    return pl.DataFrame(features + [hex_digits(frame[column.name]) for column in predictor.schema.sparse]).to_dicts()


@pytest.fixture(scope="module")
def server(serve, small_bundle):
    return serve(small_bundle, "--grpc-port", 0, "--num-threads", 1)


@pytest.fixture(scope="module")
def client(server):
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def packed(sample, schema):
    """Rows as the two packed tensors: float32 with NaN, and texts."""
    frame = sample[0]
    dense = np.stack([frame[c.name].cast(pl.Float32).fill_null(np.nan).to_numpy() for c in schema.dense], axis=1)
    sparse = np.stack([hex_digits(frame[c.name]).fill_null("").to_numpy() for c in schema.sparse], axis=1)
    return dense, sparse.astype(object)


def test_answers_equal_the_predictors(client, server, rows, sample):
    answer = client.post("/predict", json={"rows": rows}).json()
    assert answer["predictions"] == pytest.approx(sample[1], abs=1e-6)
    assert (answer["model"], answer["version"]) == (server.model, server.version)
    assert client.post("/predict", json=rows).json() == answer
    one_by_one = [client.post("/predict", json=[row]).json()["predictions"][0] for row in rows[:10]]
    assert one_by_one == pytest.approx(sample[1][:10], abs=1e-6)


def test_shared_columns_are_those_of_every_candidate(client, rows):
    shared = {name: rows[0][name] for name in ("int_0", "int_5", "cat_0")}
    candidates = [{name: cell for name, cell in row.items() if name not in shared} for row in rows]
    answer = client.post("/predict", json={"shared": shared, "candidates": candidates}).json()
    assert (
        answer["predictions"] == client.post("/predict", json=[{**row, **shared} for row in rows]).json()["predictions"]
    )
    twice = client.post("/predict", json={"shared": shared, "candidates": [{}, {"cat_0": "1"}]})
    assert twice.status_code == 400
    assert "row 1, column 'cat_0'" in twice.json()["error"]


def test_missing_columns_are_missing_values_and_unknown_ones_an_error(client):
    everything_missing = client.post("/predict", json=[{}]).json()["predictions"]
    assert client.post("/predict", json=[{"int_0": None, "cat_3": ""}]).json()["predictions"] == everything_missing
    wrong = client.post("/predict", json=[{}, {"colour": "red"}])
    assert wrong.status_code == 400
    assert "row 1" in wrong.json()["error"]
    assert "colour" in wrong.json()["error"]


@pytest.mark.parametrize("is_binary", [True, False])
def test_a_triton_client_over_http(triton_http, server, sample, predictor, is_binary):
    dense, sparse = packed(sample, predictor.schema)
    client = triton_http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(server.model, server.version)
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata(server.model)["outputs"] == [
        {"name": "prediction", "datatype": "FP32", "shape": [-1]}
    ]
    inputs = [
        triton_http.InferInput("dense", list(dense.shape), "FP32"),
        triton_http.InferInput("sparse", list(sparse.shape), "BYTES"),
    ]
    inputs[0].set_data_from_numpy(dense, binary_data=True)  # JSON has no NaN
    inputs[1].set_data_from_numpy(sparse, binary_data=is_binary)
    outputs = [triton_http.InferRequestedOutput("prediction", binary_data=is_binary)]
    result = client.infer(server.model, inputs, outputs=outputs, request_id="seven")
    assert result.as_numpy("prediction") == pytest.approx(sample[1], abs=1e-6)
    assert result.get_response()["id"] == "seven"
    assert result.get_response()["model_version"] == server.version


def test_columns_one_by_one_with_a_triton_client(triton_http, server, sample, predictor):
    frame = sample[0].drop_nulls()
    expected = predictor.predict(frame)
    inputs = []
    for column in (*predictor.schema.dense, *predictor.schema.sparse):
        values = frame[column.name].cast(pl.Int64).to_numpy()  # of hex columns, the numbers themselves
        inputs.append(triton_http.InferInput(column.name, [len(values)], "INT64"))
        inputs[-1].set_data_from_numpy(values)
    client = triton_http.InferenceServerClient(server.url.removeprefix("http://"))
    assert client.infer(server.model, inputs).as_numpy("prediction") == pytest.approx(expected, abs=1e-6)


def test_a_triton_client_over_grpc(server, sample, predictor):
    dense, sparse = packed(sample, predictor.schema)
    client = triton_grpc.InferenceServerClient(server.grpc)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(server.model)
    assert client.get_server_metadata().name == "torchdlrm"
    metadata = client.get_model_metadata(server.model)
    assert len(metadata.inputs) == 39
    inputs = [
        triton_grpc.InferInput("dense", list(dense.shape), "FP32"),
        triton_grpc.InferInput("sparse", list(sparse.shape), "BYTES"),
    ]
    inputs[0].set_data_from_numpy(dense)
    inputs[1].set_data_from_numpy(sparse)
    result = client.infer(server.model, inputs, request_id="eight")
    assert result.as_numpy("prediction") == pytest.approx(sample[1], abs=1e-6)
    assert result.get_response().id == "eight"
    with pytest.raises(triton_grpc.InferenceServerException, match="there is no model"):
        client.infer("other", inputs)
    with pytest.raises(triton_grpc.InferenceServerException, match="int_3"):
        client.infer(server.model, [bad_column()])


def bad_column():
    tensor = triton_grpc.InferInput("int_3", [1], "FP32")
    tensor.set_data_from_numpy(np.array([1.5], np.float32))
    return tensor


def test_the_schema_and_its_examples_are_what_predict_takes(client, small_dataset):
    schema = client.get("/schema").json()
    assert {"name": "cat_25", "role": "sparse", "kind": "hex", "multi_valued": False} in schema["columns"]
    assert len(schema["examples"]) == 3
    assert client.post("/predict", json=schema["examples"]).status_code == 200
    known = {name: {*small_dataset.vocabulary(name).table["value"]} for name in small_dataset.sparse_names}
    for row, unknown in zip(schema["examples"], schema["unknown"], strict=True):
        values = {name: None if row[name] is None else int(row[name], 16) for name in known}
        assert unknown == [name for name, value in values.items() if value not in known[name]]
    assert any(schema["unknown"])


def test_a_row_that_is_not_in_a_list_is_told_to_be_put_in_one(client):
    answer = client.post("/predict", json={"int_0": 1, "cat_3": "0a"})
    assert answer.status_code == 400
    assert answer.json()["error"] == "the body is one row, with the columns 'int_0', 'cat_3'; put it in a list: [{...}]"
    assert "needs 'rows'" in client.post("/predict", json={"int_0": 1, "colour": "red"}).json()["error"]


def test_what_is_not_there_is_told_in_json(client, server):
    for path, code in [("/nothing", 404), ("/v2/models/other", 404), (f"/v2/models/{server.model}/versions/0", 404)]:
        answer = client.get(path)
        assert answer.status_code == code
        assert answer.json()["error"]
    assert "GET /openapi.json" in client.get("/docs").json()["error"]
    answer = client.get("/predict")
    assert (answer.status_code, answer.headers["Allow"]) == (405, "POST")
    assert answer.json()["error"] == "'/predict' takes POST, not GET; GET /openapi.json describes how"
    assert client.post("/admin/reload").status_code == 403


def test_figures_for_prometheus(client):
    before = figures(client)
    client.post("/predict", json=[{"cat_0": "ffffffff"}, {}])
    client.post("/predict", content=b"{")
    after = figures(client)

    def grown(name):
        return after[name] - before.get(name, 0.0)

    assert grown('dlrm_requests_total{code="200",route="/predict"}') == 1
    assert grown('dlrm_requests_total{code="400",route="/predict"}') == 1
    assert grown("dlrm_rows_total") == 2
    assert grown('dlrm_unknown_values_total{feature="cat_0"}') >= 1
    assert 0 < grown("dlrm_predictions_sum_total") < 2
    assert grown('dlrm_latency_seconds_count{stage="model"}') == 1
    assert after["dlrm_queue_rows"] == 0
    assert 1.0 in [value for name, value in after.items() if name.startswith("dlrm_bundle_workers")]


def figures(client):
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_the_server_drains_and_exits_with_0(serve, small_bundle, rows):
    server = serve(small_bundle, "--drain-s", 2, "--num-threads", 1)
    with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=server.url, timeout=30) as client:
        futures = [pool.submit(client.post, "/predict", json=rows) for _ in range(40)]
        while not futures[8].done():
            time.sleep(0.001)
        server.process.send_signal(signal.SIGTERM)
        while client.get("/v2/health/ready").status_code == 200:
            time.sleep(0.001)
        codes = {future.result().status_code for future in futures}
    assert codes == {200}
    _, log = server.process.communicate(timeout=30)
    assert server.process.returncode == 0
    events = [json.loads(line) for line in log.splitlines()]
    assert [event["event"] for event in events if event["event"] != "request"] == ["serving", "draining", "stopped"]
    assert sum(event.get("path") == "/predict" for event in events) == 40
