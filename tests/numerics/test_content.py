"""Vectors of content: the same bytes from logs in any format, and the same predictions in every way."""

import json
import tomllib
from dataclasses import replace

import grpc
import httpx
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from helpers.interactions import INTERACTIONS, overrides_of
from helpers.predicted import rows_of_request
from helpers.raw_logs import checksums
from helpers.trainings import losses
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.config import load_config
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.data.summary import summarize
from torchdlrm.errors import ConfigError, LogError, RowError
from torchdlrm.exporting.export import export
from torchdlrm.exporting.formats import export_as
from torchdlrm.exporting.onnx_file import onnx_inputs
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.columns import DenseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.vectors import typed_vectors
from torchdlrm.loader.loader import Loader
from torchdlrm.logs.proposal.propose import propose_schema
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.dlrm import VectorArch
from torchdlrm.model.model_class import architecture_of
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.serving.front.open_inference.messages import CLASSES, PACKAGE, SERVICE
from torchdlrm.serving.front.open_inference.tensors import Tensor
from torchdlrm.serving.service.refusals import RefusedRequest
from torchdlrm.training.job import train

SCHEMA = """
name = "shop"
header = true
columns = [
    { role = "label", name = "click" },
    { role = "dense", name = "text", kind = "vector", size = 5 },
    { role = "dense", name = "price", kind = "float" },
    { role = "dense", name = "picture", kind = "vector", size = 3, transform = "none", stored = "float32" },
    { role = "sparse", name = "item" },
    { role = "sparse", name = "user", kind = "int" },
]
[split]
rule = "order"
val = 0.1
test = 0.2
"""
VECTORS = {"text": 5, "picture": 3}
SETTINGS = {
    "model.dense_arch_layer_sizes": "12,16",
    "model.over_arch_layer_sizes": "8,1",
    "train.max_steps": "3",
    "train.precision": "float32",
    "train.batch_size_global": "63",
    "dense_optimizer.name": "sgd",
    "logging.every_steps": "1",
    "logging.tensorboard": "false",
}


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(7)
    texts, pictures = rng.normal(size=(40, 5)).astype(np.float32), rng.normal(size=(40, 3)).astype(np.float32) * 9
    found = []
    for _ in range(700):
        item = int(rng.integers(40))
        found.append(
            {
                "click": int(rng.random() < 1 / (1 + np.exp(-texts[item].sum()))),
                "text": None if rng.random() < 0.2 else texts[item].tolist(),
                "price": rng.random(),
                "picture": None if rng.random() < 0.1 else pictures[item].tolist(),
                "item": f"i{item}",
                "user": int(rng.integers(9)),
            }
        )
    return found


@pytest.fixture(scope="module")
def schema():
    return FeatureSchema.model_validate(tomllib.loads(SCHEMA))


@pytest.fixture(scope="module")
def log(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def dataset(log, schema, tmp_path_factory):
    return preprocess(log, tmp_path_factory.mktemp("dataset") / "shop", schema, progress=False)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    train(load_config("criteo-small", SETTINGS), dataset, path, progress=False)
    return path


@pytest.fixture(scope="module")
def predictor(run, tmp_path_factory):
    exported = export(run, tmp_path_factory.mktemp("bundle") / "bundle", progress=False)
    assert exported.agreement.largest_difference <= 1e-6  # from the checkpoint
    return Predictor(exported.bundle)


def written(kind, rows, folder):
    """The same log in another format."""
    path, columns = folder / f"log.{kind}", {name: [row[name] for row in rows] for name in rows[0]}
    if kind in ("list", "fixed"):
        types = {"list": pa.list_(pa.float32()), "fixed": pa.list_(pa.float64(), 5)}
        given = {**columns, "text": pa.array(columns["text"], types[kind])}
        pq.write_table(pa.table(given), path)
        return path
    lists = {
        "json": json.dumps,
        "commas": lambda cell: ",".join(map(str, cell)),
    }[kind]
    lines = [[lists(cell) if isinstance(cell, list) else cell for cell in row.values()] for row in rows]
    texts = ["\t".join("" if cell is None else str(cell) for cell in line) for line in [list(rows[0]), *lines]]
    path.write_text("\n".join(texts) + "\n")
    return path


@pytest.mark.parametrize("kind", ["list", "fixed", "json", "commas"])
def test_a_log_of_any_format_becomes_the_same_dataset(kind, rows, dataset, schema, tmp_path):
    other = preprocess(written(kind, rows, tmp_path), tmp_path / "dataset", schema, progress=False)
    found, expected = checksums(other.path), checksums(dataset.path)
    assert {name: found[name] for name in found if name != "dataset.json"} == {
        name: expected[name] for name in expected if name != "dataset.json"
    }


def test_the_dataset_has_what_numpy_makes_of_the_vectors(rows, dataset):
    assert dataset.manifest.format_version == 7
    frame = pl.concat(rows_of_split(dataset, "test"))
    for row, text, picture in zip(rows[-140:], frame["text"], frame["picture"], strict=True):
        x = np.array(row["text"] or [0.0] * 5, np.float32).astype(np.float64)
        length = np.sqrt((x * x).sum() / 5) if row["text"] else 1.0
        np.testing.assert_array_equal(text.to_numpy(), (x / length).astype(np.float16))
        np.testing.assert_array_equal(picture.to_numpy(), np.array(row["picture"] or [0.0] * 3, np.float32))
    assert dataset.manifest.splits["test"].missing_rows["text"] == sum(row["text"] is None for row in rows[-140:])
    summary = summarize(dataset, 1).dense
    assert (summary["text"].drift, summary["price"].drift.keys()) == ({}, {"train", "val", "test"})


def test_batches_have_the_vectors_behind_the_dense_features(dataset):
    batch = next(iter(Loader(dataset, "test", batch_size_global=100)))
    frame = next(rows_of_split(dataset, "test", 100))
    expected = np.hstack([frame["price"].to_numpy()[:, None], np.stack(frame["text"]), np.stack(frame["picture"])])
    np.testing.assert_array_equal(batch.dense_features.numpy(), expected)
    np.testing.assert_array_equal(EncodedRows.from_frame(frame, dataset.schema).dense, expected)


def test_a_wide_row_makes_parts_smaller(schema):
    from torchdlrm.preprocessing.sizing import part_memory_bytes, part_rows

    columns = (*schema.columns, DenseColumn(name="large", kind="vector", size=4096))
    most = part_rows(schema.with_columns(columns), 1 << 20)
    assert most == (256 << 20) // (16 + 4 * (1 + 5 + 3 + 4096 + 2))
    assert part_memory_bytes(most, schema.with_columns(columns)) < 800e6
    assert part_rows(schema.with_columns([c for c in schema.columns if c not in schema.content]), 1 << 20) == 1 << 20


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        ([1.0], "'1 of 5 numbers, 1.0'"),
        ([1, 2, 3, 4, "x"], "no list of 5 numbers: [1, 2, 3, 4, 'x']"),
        ({"a": 1}, "no list of 5 numbers: {'a': 1}"),
        (7, "no list of 5 numbers: 7"),
        ([1, 2, 3, 4, 1e39], "1e+39"),
        ("1,2,3", "'3 of 5 numbers, 1.0,2.0,3.0'"),
    ],
)
def test_a_bad_cell_of_a_log_is_a_bad_row(cell, shown, rows, schema, tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows[:30], {**rows[0], "text": cell}, *rows[30:90]]))
    with pytest.raises(
        LogError, match="line 31, column text: the cell is not a list of `size` finite numbers"
    ) as error:
        preprocess(path, tmp_path / "dataset", schema, progress=False)
    assert shown in str(error.value)
    made = preprocess(path, tmp_path / "dataset", schema, PreprocessOptions(max_bad_rows=1), progress=False)
    assert made.manifest.bad_rows.counts == {"vector": 1}


def test_scores_with_all_columns_are_a_log_again(log, predictor, tmp_path):
    first, second = tmp_path / "first.csv", tmp_path / "second.parquet"
    predict_file(predictor, RowsIn([log], predictor.schema, kept="all"), first)
    predict_file(predictor, RowsIn([first], predictor.schema, "csv"), second)
    np.testing.assert_array_equal(
        pl.read_csv(first)["prediction"].cast(pl.Float32), pl.read_parquet(second)["prediction"]
    )


def test_an_empty_list_is_a_missing_vector(rows, predictor):
    row = {name: cell for name, cell in rows[0].items() if name not in ("click", "text")}
    given = [row, {**row, "text": []}, {**row, "text": None}, {**row, "text": ""}, {**row, "text": [0, 0, 0, 0, 0.0]}]
    assert len(set(predictor.predict(given).tolist())) == 1
    assert not predictor.encode_rows(given).dense[:, 1:6].any()


def test_a_proposal_has_the_vectors(rows, tmp_path):
    proposed = propose_schema(written("list", rows, tmp_path))
    vectors = [(column["name"], column["size"]) for column in proposed.schema["columns"] if "size" in column]
    assert vectors == [("text", 5), ("picture", 3)]
    assert not any("text" in warning for warning in proposed.warnings)


@pytest.mark.parametrize("cell", ["", "[]", "[ ]"])
def test_an_empty_list_in_a_text_is_a_missing_vector(cell):
    column = DenseColumn(name="text", kind="vector", size=1)
    vectors, is_bad = typed_vectors(pl.Series([cell, "[2]"]), column)
    assert (vectors.to_list(), is_bad.tolist()) == ([None, [2.0]], [False, False])


def test_a_bad_number_of_a_text_is_shown(rows, schema, tmp_path):
    path = written("commas", [{**rows[0], "text": [1, 2, 3, "4x", 5]}, *rows[:40]], tmp_path)
    with pytest.raises(LogError, match=r"line 2, column text: .*numbers: '1,2,3,4x,5'"):
        preprocess(path, tmp_path / "dataset", schema, progress=False)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kind": "vector"}, "kind vector and size"),
        ({"kind": "float", "size": 3}, "kind vector and size"),
        ({"kind": "vector", "size": 0}, "greater than or equal to 1"),
        ({"kind": "vector", "size": 3, "transform": "log1p"}, "with the transform unit or none"),
        ({"kind": "vector", "size": 3, "buckets": "log_square"}, "goes without buckets"),
        ({"kind": "int", "stored": "float16"}, "goes without stored"),
    ],
)
def test_a_schema_says_what_is_wrong_with_a_vector(wrong, message):
    with pytest.raises(ValueError, match=message):
        DenseColumn(name="x", **wrong)


def test_every_way_to_predict_gives_the_same(rows, log, predictor, dataset):
    chunk = next(iter(RowsIn([log], predictor.schema)))
    by_file = predictor.encode(chunk.frame)
    plain = [{name: cell for name, cell in row.items() if name != "click" and cell is not None} for row in rows]
    fast = predictor._plain_rows.encode(plain)
    texts = [{**row, "text": json.dumps(row.get("text", []))[1:-1]} for row in plain]
    assert predictor._plain_rows.encode([{**row, "text": "1,2"} for row in plain]) is None
    ways = {
        "fast": fast,
        "slow": predictor.encode(predictor.parse_rows(plain)),
        "text": predictor.encode_rows(texts),
        "logged": predictor.encode_rows(as_json_rows(chunk.frame, predictor.schema)),
        "one by one": predictor.encode_rows(plain[:1]),
    }
    for name, found in ways.items():
        assert found.dense.tobytes() == by_file.dense[: len(found.dense)].tobytes(), name
        np.testing.assert_array_equal(found.sparse, by_file.sparse[:, : len(found.dense)], err_msg=name)
    frame = pl.concat(rows_of_split(dataset, "test"))
    np.testing.assert_array_equal(EncodedRows.from_frame(frame, dataset.schema).dense, by_file.dense[-140:])
    arrays = [{**row, "text": np.array(row["text"])} if "text" in row else row for row in plain]
    assert (predictor.predict(arrays) == predictor.predict(plain)).all()
    frame = pl.DataFrame([{**row, "click": None} for row in rows])
    assert (predictor.predict(frame) == predictor.predict(plain)).all()
    assert (predictor.predict(frame.with_columns(pl.lit(None).alias("text"))) != predictor.predict(plain)).sum() > 500


def test_a_server_predicts_the_same_of_json_and_of_tensors_by_both_protocols(rows, predictor, serve):
    rows = [{name: cell for name, cell in row.items() if name != "click" and cell is not None} for row in rows[:200]]
    expected, count = predictor.predict(rows), len(rows)
    columns = {name: [cell for row in rows for cell in row.get(name, [0.0] * size)] for name, size in VECTORS.items()}
    kinds = {"price": "FP64", "item": "BYTES", "user": "INT64"}
    tensors = [*((name, "FP32", [count, size], columns[name]) for name, size in VECTORS.items())]
    tensors += [(name, kind, [count], [row[name] for row in rows]) for name, kind in kinds.items()]
    server = serve(predictor.bundle.path, "--log-level", "warning", "--grpc-port", 0)
    with httpx.Client(base_url=server.url, timeout=30) as client:
        found = [client.post("/predict", json=rows).json()["predictions"]]
        found.append([client.post("/predict", json=[row]).json()["predictions"][0] for row in rows[:9]])
        inputs = [dict(zip(("name", "datatype", "shape", "data"), tensor, strict=True)) for tensor in tensors]
        answer = client.post(f"/v2/models/{server.model}/infer", json={"inputs": inputs}).json()
        found.append(answer["outputs"][0]["data"])
    message = CLASSES["ModelInferRequest"](model_name=server.model)
    for name, kind, shape, data in tensors:
        one = message.inputs.add(name=name, datatype=kind, shape=shape)
        cells = [cell.encode() if isinstance(cell, str) else cell for cell in data]
        getattr(one.contents, f"{'int64' if kind == 'INT64' else kind.lower()}_contents").extend(cells)
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/{PACKAGE}.{SERVICE}/ModelInfer",
            CLASSES["ModelInferRequest"].SerializeToString,
            CLASSES["ModelInferResponse"].FromString,
        )
        found.append(call(message).outputs[0].contents.fp32_contents)
    for way in found:
        np.testing.assert_allclose(way, expected[: len(way)], rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_rows", [3, 200])
def test_tensors_are_the_same_rows(num_rows, rows, predictor):
    def numbers(name, size):
        return pl.Series([x for row in rows[:num_rows] for x in row[name] or [0.0] * size], dtype=pl.Float32)

    tensors = [
        Tensor("text", "FP32", (num_rows, 5), numbers("text", 5)),
        Tensor("picture", "FP32", (num_rows, 3), numbers("picture", 3)),
        Tensor("price", "FP64", (num_rows,), pl.Series([row["price"] for row in rows[:num_rows]])),
        Tensor("item", "BYTES", (num_rows,), pl.Series([row["item"] for row in rows[:num_rows]])),
        Tensor("user", "INT64", (num_rows, 1), pl.Series([row["user"] for row in rows[:num_rows]])),
    ]
    given = rows_of_request(tensors, predictor.schema, num_rows)
    expected = predictor.predict([{**row, "click": None} for row in rows[:num_rows]])
    np.testing.assert_array_equal(predictor.predict_encoded(predictor.encode_requests([given])).probabilities, expected)
    texts = [json.dumps(row["text"]) if row["text"] else None for row in rows[:num_rows]]
    tensors[0] = Tensor("text", "BYTES", (num_rows,), pl.Series(texts, dtype=pl.String))
    given = rows_of_request(tensors, predictor.schema, num_rows)
    np.testing.assert_array_equal(predictor.predict_encoded(predictor.encode_requests([given])).probabilities, expected)
    tensors[0] = Tensor("text", "FP32", (num_rows,), pl.Series([0.0] * num_rows))
    with pytest.raises(RefusedRequest, match=r"'text': a column has the shape \[N, 5\], not \[\d+\]"):
        rows_of_request(tensors, predictor.schema, num_rows)
    tensors[0] = Tensor("text", "FP32", (num_rows, 5), pl.Series([float("nan")] * (5 * num_rows), dtype=pl.Float32))
    with pytest.raises(RefusedRequest, match="row 0, column text: the cell is not a list of `size` finite numbers"):
        rows_of_request(tensors, predictor.schema, num_rows)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ([1.0], "1 of 5 numbers, 1.0"),
        ([1, 2, 3, 4, None], "no list of 5 numbers: [1, 2, 3, 4, None]"),
        ({"a": 1}, "no list of 5 numbers: {'a': 1}"),
        ({}, "no list of 5 numbers: {}"),
        (3, "no list of 5 numbers: 3"),
        ([1, 2, 3, 4, True], "no list of 5 numbers: [1, 2, 3, 4, True]"),
        ([1, 2, 3, 4, 10**400], "no list of 5 numbers: [1, 2, 3, 4, 1000"),
        ("x", "no list of 5 numbers: 'x'"),
    ],
)
def test_a_bad_cell_of_a_request_is_refused(cell, said, predictor):
    with pytest.raises(
        RowError, match="row 1, column 'text': the cell is not a list of `size` finite numbers"
    ) as error:
        predictor.predict([{"item": "i1"}, {"item": "i1", "text": cell}])
    assert said in str(error.value)


def test_a_learnt_vector_stands_for_a_missing_one():
    arch = VectorArch(5, 4)
    torch.nn.init.normal_(arch.missing)
    x = torch.randn(3, 5)
    x[1] = 0
    expected = x @ arch.weight.T + arch.bias
    torch.testing.assert_close(arch(x)[[0, 2]], expected[[0, 2]])
    torch.testing.assert_close(arch(x)[1], arch.missing)
    arch(x)[1].sum().backward()
    assert (arch.missing.grad == 1).all()
    assert not arch.weight.grad.any()


class Mean(torch.nn.Module):
    """An interaction of one's own."""

    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__()
        self.output_size = embedding_dim
        assert num_sparse_features == 4

    def forward(self, dense_features, sparse_features):
        return dense_features + sparse_features.mean(dim=1)


def test_what_is_served_is_the_checkpoint_whatever_the_interaction(dataset, tmp_path):
    for number, name in enumerate(["dcn", "projection", "own"]):
        settings = SETTINGS | {"train.max_steps": "1"} | (overrides_of(name) if name in INTERACTIONS else {})
        own = {} if name in INTERACTIONS else {"model_class": Mean}
        train(load_config("criteo-small", settings), dataset, tmp_path / f"run{number}", progress=False, **own)
        options = ExportOptions(precision="float32" if number % 2 else "int8", dense_precision="float32")
        exported = export(tmp_path / f"run{number}", tmp_path / f"b{number}", options=options, progress=False, **own)
        assert exported.agreement.largest_difference <= (1e-6 if number % 2 else 1e-2), name
        assert exported.bundle.manifest.format_version == 10


def test_a_model_without_content_is_refused(dataset):
    def whole(embedding_bag_collection, dense_in_features, dense_arch_layer_sizes, over_arch_layer_sizes, dense_device):
        raise AssertionError

    shape = ModelShape.of(load_config("criteo-small").model, dataset)
    own = replace(shape, given_architecture=architecture_of(shape.config, whole))
    with pytest.raises(ConfigError, match="whole takes no `content`, and the dataset has vectors"):
        own.architecture.check(own)


def test_a_graph_has_the_vectors(predictor, rows, tmp_path):
    onnxruntime, graph = pytest.importorskip("onnxruntime"), tmp_path / "model.onnx"
    export_as(predictor.bundle.path, graph, "onnx")
    encoded = predictor.encode_rows([{**row, "click": None} for row in rows])
    found = onnxruntime.InferenceSession(str(graph)).run(None, onnx_inputs(predictor.bundle, encoded))[0][:, 0]
    np.testing.assert_allclose(found, predictor.predict_encoded(encoded).probabilities, rtol=0, atol=1e-6)


def test_the_plan_counts_the_projections(dataset):
    shape = ModelShape.of(load_config("criteo-small", SETTINGS).model, dataset)
    without = replace(shape, content=(), num_sparse=4)
    assert shape.num_inputs == 1 + 5 + 3
    assert shape.multiply_adds - without.multiply_adds == 16 * (5 + 3)


def test_two_processes_train_the_same_model(run, dataset, dlrm, tmp_path):
    options = [part for key, value in SETTINGS.items() for part in (f"--{key.replace('_', '-')}", value)]
    command = ("train", "criteo-small", "--dataset", dataset.path, "--run", tmp_path / "two", *options)
    done = dlrm(*command, "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(run), abs=1e-6)
