"""onnxruntime predicts with the graph of a bundle what the bundle predicts."""

import random

import numpy as np
import onnx
import onnxruntime
import pytest
from google.protobuf import text_format

from torchdlrm import (
    ExportOptions,
    Predictor,
    export,
    export_as,
    load_config,
    load_schema,
    onnx_inputs,
    preprocess,
    train,
)
from torchdlrm.bench.random_bundle import write_random_bundle
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import ModelConfig
from torchdlrm.errors import BundleError
from torchdlrm.exporting import onnx_file
from torchdlrm.model.architecture import Architecture
from torchdlrm.model.dot import DotArchitecture
from torchdlrm.model.model_class import ModelClassRecord

SIZES = {"cat_0": 50, "cat_1": 3, "cat_2": 700}
SMALL = {"embedding_dim": 16, "dense_arch_layer_sizes": (32, 16), "over_arch_layer_sizes": (24, 1)}
MODELS = {
    "dot": ModelConfig(**SMALL),
    "dcn": ModelConfig(**SMALL, interaction="dcn", dcn={"num_layers": 2, "low_rank_dim": 10}),
    "gated": ModelConfig(**SMALL, interaction="dcn", dcn={"num_layers": 2, "low_rank_dim": 10, "gated": True}),
    "projection": ModelConfig(
        **SMALL, interaction="projection", projection={"branch1_layer_sizes": (20, 32), "branch2_layer_sizes": (48,)}
    ),
}


def random_rows(seed, num_rows):
    rng = np.random.default_rng(seed)
    dense = rng.normal(size=(num_rows, 13)).astype(np.float32)
    return EncodedRows(dense, np.stack([rng.integers(n, size=num_rows, dtype=np.int32) for n in SIZES.values()]))


def probabilities(path, bundle, rows):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(["probability"], onnx_inputs(bundle, rows))[0][:, 0]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "int4"])
@pytest.mark.parametrize("model", MODELS)
def test_probabilities_are_those_of_the_bundle_and_the_file_is_as_small(tmp_path, seed, model, precision):
    bundle = Bundle.open(write_random_bundle(tmp_path / "bundle", SIZES, precision, MODELS[model]))
    export_as(tmp_path / "bundle", tmp_path / "model.onnx", "onnx")
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    rows = random_rows(seed, 10_000)
    expected = ServedModel(bundle, "float32").predict(rows)
    assert expected.std() > 1e-4
    np.testing.assert_allclose(probabilities(tmp_path / "model.onnx", bundle, rows), expected, rtol=0, atol=1e-6)
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert (
        sum(len(tensor.raw_data) for tensor in stored) <= 1.1 * (tmp_path / "bundle/weights.safetensors").stat().st_size
    )


def test_the_graph_of_a_trained_bundle_is_checked_on_its_sample(small_bundle, tmp_path, monkeypatch):
    predictor = Predictor.open(small_bundle)
    export_as(small_bundle, tmp_path / "model.onnx", "onnx")
    raw, expected = predictor.bundle.sample()
    found = probabilities(tmp_path / "model.onnx", predictor.bundle, predictor.encode(raw))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    with pytest.raises(BundleError, match="is there already"):
        export_as(small_bundle, tmp_path / "model.onnx", "onnx")
    predict = ServedModel.predict
    monkeypatch.setattr(ServedModel, "predict", lambda *args: predict(*args) + np.float32(1e-3))
    with pytest.raises(BundleError, match=r"predicts up to 0.001 off the bundle"):
        export_as(small_bundle, tmp_path / "other.onnx", "onnx")
    assert not (tmp_path / "other.onnx").exists()


def test_constants_of_a_large_model_lie_beside_the_file(tmp_path, seed, monkeypatch):
    bundle = Bundle.open(write_random_bundle(tmp_path / "bundle", SIZES, "int8", MODELS["dot"]))
    monkeypatch.setattr(onnx_file, "MAX_FILE_BYTES", 0)
    monkeypatch.setattr(onnx_file, "_BLOCK_BYTES", 1000)  # several blocks
    (tmp_path / "there").mkdir()
    export_as(tmp_path / "bundle", tmp_path / "there" / "model.onnx", "onnx")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"model.onnx", "model.onnx.data"}
    assert (tmp_path / "there" / "model.onnx").stat().st_size < 20_000
    (tmp_path / "there").rename(tmp_path / "moved")
    rows = random_rows(seed, 500)
    found = probabilities(tmp_path / "moved" / "model.onnx", bundle, rows)
    np.testing.assert_allclose(found, ServedModel(bundle).predict(rows), rtol=0, atol=1e-6)


def test_a_triton_model_is_a_configuration_and_a_graph(small_bundle, tmp_path):
    model_config = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    export_as(small_bundle, tmp_path / "clicks", "triton")
    config = text_format.Parse((tmp_path / "clicks/config.pbtxt").read_text(), model_config.ModelConfig())
    graph = onnxruntime.InferenceSession(str(tmp_path / "clicks/1/model.onnx"))
    types = {"tensor(float)": model_config.TYPE_FP32, "tensor(int32)": model_config.TYPE_INT32}
    assert config.max_batch_size == 8192
    for described, there in ((config.input, graph.get_inputs()), (config.output, graph.get_outputs())):
        assert [(v.name, v.data_type, list(v.dims)) for v in described] == [
            (v.name, types[v.type], v.shape[1:]) for v in there
        ]


def test_an_id_beyond_its_table_is_refused(tmp_path):
    bundle = Bundle.open(write_random_bundle(tmp_path / "bundle", SIZES, "int8", MODELS["dot"]))
    export_as(tmp_path / "bundle", tmp_path / "model.onnx", "onnx")
    for place, wrong in [(i, wrong) for i, rows in enumerate(SIZES.values()) for wrong in (-1, rows)]:
        ids = np.zeros((3, 2), np.int32)
        ids[place, 1] = wrong
        with pytest.raises(Exception, match="out of data bounds"):
            probabilities(tmp_path / "model.onnx", bundle, EncodedRows(np.zeros((2, 13), np.float32), ids))


SCHEMA = """
name = "films"
separator = ","
columns = [
    { role = "label", name = "seen" },
    { role = "sparse", name = "city" },
    { role = "sparse", name = "genres", value_separator = "|" },
    { role = "sparse", name = "tags", value_separator = "|", weight_separator = ":" },
]
[split]
rule = "order"
val = 0.1
test = 0.1
"""


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """A run on a log without dense columns, whose cells have several values, some of them with weights."""
    folder, rng = tmp_path_factory.mktemp("films"), random.Random(5)

    def several(values, form):
        return "|".join(form(rng.choice(values)) for _ in range(rng.randrange(4)))

    lines = []
    for _ in range(1_500):
        tags = several("abcdef", lambda tag: f"{tag}:{rng.uniform(0.1, 2):.2f}")
        lines.append(f"{rng.randrange(2)},{rng.choice('xyz')},{several('klmnopq', str)},{tags}")
    (folder / "log.csv").write_text("\n".join(lines) + "\n")
    (folder / "films.toml").write_text(SCHEMA)
    preprocess(folder / "log.csv", folder / "dataset", load_schema(folder / "films.toml"), progress=False)
    settings = {"model.features.genres.quotient_remainder": "add", "model.features.genres.num_collisions": "3"}
    settings |= {"model.features.city.quotient_remainder": "mult", "model.features.city.num_collisions": "2"}
    settings |= {"model.features.tags.embedding_dim": "8", "train.max_steps": "3", "logging.tensorboard": "false"}
    train(load_config("criteo-small", settings), folder / "dataset", folder / "run", progress=False)
    return folder


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_smaller_tables_and_cells_of_several_values_with_weights_are_looked_up(films, tmp_path, precision):
    options = ExportOptions(precision=precision)
    bundle = export(films / "run", tmp_path / "bundle", options=options, progress=False).bundle
    export_as(tmp_path / "bundle", tmp_path / "model.onnx", "onnx")
    predictor = Predictor.open(tmp_path / "bundle")
    cells = [("x", "k|l|m", "a:2|b:0.5"), ("y", "", "c:1"), ("z", "q", ""), ("new", "new|k", "new:3|a:1")]
    rows = predictor.encode(
        predictor.parse_rows([dict(zip(("city", "genres", "tags"), cell, strict=True)) for cell in cells])
    )
    feeds = onnx_inputs(bundle, rows)
    assert {name: values.shape for name, values in feeds.items()} == {
        "ids_city": (4, 1),
        "ids_genres": (4, 3),
        "ids_tags": (4, 2),
        "weights_tags": (4, 2),
    }
    expected = predictor.predict_encoded(rows).probabilities
    assert len(set(expected.tolist())) == 4
    np.testing.assert_allclose(probabilities(tmp_path / "model.onnx", bundle, rows), expected, rtol=0, atol=1e-6)


def test_a_model_of_ones_own_has_no_graph(small_bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(DotArchitecture, "graph_interaction", Architecture.graph_interaction)
    with pytest.raises(BundleError, match="nothing says how to write"):
        export_as(small_bundle, tmp_path / "model.onnx", "onnx")
    bundle = Bundle.open(small_bundle)
    record = ModelClassRecord(name="my_models:Mine", sha256=None)
    bundle.manifest = bundle.manifest.model_copy(update={"model_class": record})
    with pytest.raises(BundleError, match="its model class is Python"):
        onnx_file.write_onnx(bundle, tmp_path / "model.onnx")
