"""Raw rows by file, by JSON and over HTTP are predicted as the checkpoint does after the preprocessing job."""

import itertools
import math
import random
import tomllib

import grpc
import httpx
import numpy as np
import onnxruntime
import polars as pl
import pytest

from helpers import two_labels
from helpers.predicted import rows_of_request
from helpers.raw_logs import real_log
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.data.dataset import Dataset
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import export, open_checkpoint
from torchdlrm.exporting.formats import export_as
from torchdlrm.exporting.onnx_file import onnx_inputs
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import with_split
from torchdlrm.judging.recalibration import Verdict
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.serving.front.open_inference.messages import CLASSES, PACKAGE, SERVICE
from torchdlrm.serving.front.open_inference.tensors import Tensor
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

CONFIG = "criteo-small"


def by_checkpoint(run, dataset, log, folder):
    """Of all rows in the order of the log, but for a few first ones, the training rows; and how many these are."""
    schema = with_split(dataset.schema, "order", val=0.0, test=0.9997)
    options = PreprocessOptions(vocabulary=dataset.path)
    ordered = Dataset.open(preprocess([log], folder / "ordered", schema, options).path)
    files = (file.path for split in ("train", "test") for file in ordered.splits[split].files)
    frame = pl.concat(pl.read_parquet(path) for path in files)
    _, checkpoint = open_checkpoint(Run.open(run), "last")
    model = CheckpointModel(checkpoint, Run.open(run).shape(dataset))
    rows = EncodedRows.from_frame(frame, dataset.schema)
    logits = np.concatenate([model.logits(rows.part(i, i + 2_048)) for i in range(0, rows.num_rows, 2_048)])
    return 1 / (1 + np.exp(-logits.astype(np.float64))), ordered.splits["train"].rows


def by_file(bundle, log, folder):
    predictor = Predictor.open(bundle)
    rows = RowsIn([log], predictor.schema, chunk_bytes=300_000)
    assert predict_file(predictor, rows, folder / "scores.parquet").bad_rows == 0
    return pl.read_parquet(folder / "scores.parquet")["prediction"].to_numpy()


def by_json(bundle, log, folder):
    predictor = Predictor.open(bundle)
    found = []
    for chunk in RowsIn([log], predictor.schema):
        rows = as_json_rows(chunk.frame, predictor.schema)
        parts = (predictor.parse_rows(rows[start : start + 997]) for start in range(0, len(rows), 997))
        found += [predictor.predict(part) for part in parts]
    return np.concatenate(found)


def by_http(server, bundle, log):
    """Requests of 1 to 40 rows: few and many take different ways through the server."""
    predictor = Predictor.open(bundle)
    found, size = [], itertools.cycle(range(1, 41))
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for chunk in RowsIn([log], predictor.schema):
            rows = as_json_rows(chunk.frame, predictor.schema)
            while rows:
                taken = next(size)
                answer = client.post("/predict", json=rows[:taken])
                assert answer.status_code == 200, answer.text
                found += answer.json()["predictions"]
                rows = rows[taken:]
    return np.array(found)


def assert_no_skew(serve, bundle, run, dataset, log, folder):
    expected, few = by_checkpoint(run, dataset, log, folder)
    assert expected.std() > 0.01
    assert few < 8
    server = serve(bundle, "--log-level", "warning")
    ways = (
        by_file(bundle, log, folder),
        by_json(bundle, log, folder),
        by_tensors(bundle, log),
        by_http(server, bundle, log),
    )
    server.stop()
    for found in ways:
        np.testing.assert_allclose(found[few:], expected[few:], rtol=0, atol=1e-6)
        np.testing.assert_allclose(np.sort(found[:few]), np.sort(expected[:few]), rtol=0, atol=1e-6)


def test_every_row_of_a_synthetic_log(serve, small_bundle, small_run, small_dataset, small_log, tmp_path):
    assert_no_skew(serve, small_bundle, small_run, small_dataset, small_log, tmp_path)


def by_tensors(bundle, log):
    """A tensor a column: numbers of dense columns, texts of sparse ones."""
    predictor = Predictor.open(bundle)
    found = []
    for chunk in RowsIn([log], predictor.schema):
        rows = as_json_rows(chunk.frame, predictor.schema)
        dense = {column.name for column in predictor.schema.dense}
        tensors = []
        for column in predictor.schema.features:
            cells = [row.get(column.name) for row in rows]
            if column.name in dense:
                values = pl.Series([math.nan if cell is None else float(cell) for cell in cells])
                tensors.append(Tensor(column.name, "FP64", (len(rows),), values))
            else:
                texts = ["|".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells]
                values = pl.Series([text if text is None else str(text) for text in texts], dtype=pl.String)
                tensors.append(Tensor(column.name, "BYTES", (len(rows),), values))
        encoded = predictor.encode(rows_of_request(tensors, predictor.schema, len(rows)))
        found.append(predictor.predict_encoded(encoded).probabilities)
    return np.concatenate(found)


def test_rows_by_every_architecture(serve, interaction_run, small_dataset, small_log, tmp_path):
    log, bundle = tmp_path / "log.tsv", tmp_path / "bundle"
    log.write_text("".join(small_log.read_text().splitlines(keepends=True)[:3_500]))
    export(interaction_run, bundle, dataset=small_dataset)
    assert_no_skew(serve, bundle, interaction_run, small_dataset, log, tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "schema"),
    [("criteo_kaggle_sample.tsv.gz", "criteo-bucketed"), ("criteo_1tb_day_0_sample.tsv.gz", "criteo")],
)
def test_every_row_of_the_real_samples(name, schema, serve, dlrm, tmp_path):
    log = real_log(name)
    dataset = preprocess([log], tmp_path / "dataset", schema, PreprocessOptions(min_count=2))
    run = tmp_path / "run"
    options = ["--train.batch-size-global", 512, "--logging.tensorboard", "false"]
    done = dlrm("train", CONFIG, "--dataset", dataset.path, "--run", run, *options)
    assert done.returncode == 0, done.stderr
    export(run, tmp_path / "bundle", options=ExportOptions(name="real"), dataset=dataset)
    assert_no_skew(serve, tmp_path / "bundle", run, dataset, log, tmp_path)


OWN_SCHEMA = """
name = "own"
separator = ","
header = true
null_values = ["NULL", "-"]
columns = [
    { role = "label", name = "bought", positive = "yes", negative = "no" },
    { role = "dense", name = "price", kind = "float", transform = "standardize", null_values = ["-1", "nan"] },
    { role = "dense", name = "age", kind = "int", transform = "log1p" },
    { role = "sparse", name = "code", kind = "hex" },
    { role = "sparse", name = "user", kind = "int" },
    { role = "sparse", name = "city", kind = "string" },
    { role = "sparse", name = "shop", kind = "int", hash = 50 },
]

[split]
rule = "order"
"""


def own_rows(num_rows, seed):
    """Typed rows, None where a value is missing."""
    draw = random.Random(seed)
    for _ in range(num_rows):
        user = draw.randrange(20)
        yield {
            "bought": "yes" if draw.random() < (0.8 if user % 3 else 0.2) else "no",
            "price": draw.choice([None, 0.5, 3.0, 1e-3]),
            "age": draw.choice([None, 17, 40, -4]),
            "code": draw.choice([None, 9, 10, 0x68FD1E64, 2**32 - 1]),
            "user": draw.choice([None, user]),
            "city": draw.choice([None, "Köln", "nan", "-1"]),
            "shop": draw.choice([None, 7, 2**62]),
        }


def write_own_logs(rows, schema, folder):
    """The same rows as CSV, with its columns in another order and one more, and as Parquet of other types."""
    draw = random.Random(1)

    def as_text(name, value):
        if value is None:
            return draw.choice(["-1", "-1.00", "nan", ""] if name == "price" else ["NULL", "-", ""])
        return f"{value:x}" if name == "code" else str(value)

    names = [*sorted(column.name for column in schema.columns), "added"]
    lines = [",".join(names), *(",".join([*(as_text(n, row[n]) for n in names[:-1]), "x"]) for row in rows)]
    (folder / "own.csv").write_text("\n".join(lines) + "\n")
    columns = {name: [row[name] for row in rows] for name in names[:-1]}
    columns["city"] = [draw.choice(["NULL", "-", "", None]) if city is None else city for city in columns["city"]]
    if "price" in columns:
        columns["price"] = [draw.choice([math.nan, -1.0, None]) if x is None else x for x in columns["price"]]
        columns["age"] = [math.nan if x is None else float(x) for x in columns["age"]]  # as pandas writes it
    columns["user"] = [math.nan if x is None else float(x) for x in columns["user"]]
    columns["bought"][5] = None  # rows to predict need no label
    pl.DataFrame(columns, schema_overrides={"code": pl.UInt32}, strict=False).write_parquet(folder / "own.parquet")
    return folder / "own.csv", folder / "own.parquet"


def own_json(rows, schema):
    """Cells as a client has them: numbers and texts, null values as such or written out."""
    nulls = {"price": -1, "age": None, "code": "-", "user": "NULL", "city": "-", "shop": None}
    for row in rows:
        cells = {column.name: row[column.name] for column in schema.features}
        cells = {name: nulls[name] if cell is None else cell for name, cell in cells.items()}
        yield cells | ({"code": f"{row['code']:08x}"} if row["code"] is not None else {})


def own_tensors(rows, schema):
    """A tensor a column, of numbers where that can be."""
    for column in schema.features:
        cells = [row[column.name] for row in rows]
        if column.kind == "float" or column.name == "age":
            values = pl.Series([math.nan if cell is None else float(cell) for cell in cells], dtype=pl.Float64)
            yield Tensor(column.name, "FP64", (len(rows),), values)
        elif column.kind == "string" or None in cells:
            as_hex = column.kind == "hex"
            texts = ["NULL" if cell is None else f"{cell:x}" if as_hex else str(cell) for cell in cells]
            yield Tensor(column.name, "BYTES", (len(rows),), pl.Series(texts))
        else:
            yield Tensor(column.name, "INT64", (len(rows),), pl.Series(cells, dtype=pl.Int64))


def with_all_buckets(columns):
    """Numbers as categories of all kinds: dense and bucketed, bucketed alone, with a vocabulary, hashed."""
    changes = {
        "price": {"buckets": [0.5, 2.75]},
        "age": {"buckets": "log_square", "hash": 30},
        "user": {"kind": "float", "buckets": {"quantiles": 6}},
        "shop": {"buckets": [0, 2**62]},
    }
    return [column | changes.get(column["name"], {}) for column in columns]


LAYOUTS = {
    "with dense columns": lambda columns: columns,
    "purely categorical": lambda columns: [column for column in columns if column["role"] != "dense"],
    "bucketed": with_all_buckets,
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_null_values_named_labels_and_numbers_of_parquet_mean_the_same_everywhere(layout, serve, dlrm, tmp_path):
    content = tomllib.loads(OWN_SCHEMA)
    content["columns"] = LAYOUTS[layout](content["columns"])
    schema = FeatureSchema.model_validate(content)
    rows = list(own_rows(3_000, seed=0))
    text, parquet = write_own_logs(rows, schema, tmp_path)
    dataset = preprocess([text], tmp_path / "dataset", schema)
    assert dataset.manifest.bad_rows.total == 0
    clicks = sum(split.clicks for split in dataset.manifest.splits.values())
    assert clicks == sum(row["bought"] == "yes" for row in rows)
    missing = {name: split.missing_rows for name, split in dataset.manifest.splits.items()}
    for name in missing["train"]:
        number_missing = sum(row[name.removesuffix("_bucket")] is None for row in rows)
        assert sum(split[name] for split in missing.values()) == number_missing
    without_label = parquet.with_name("labelled.parquet")
    pl.read_parquet(parquet).with_columns(pl.col("bought").fill_null(rows[5]["bought"])).write_parquet(without_label)
    same = preprocess([without_label], tmp_path / "same", schema)
    assert same.manifest.splits == dataset.manifest.splits
    assert same.manifest.sparse == dataset.manifest.sparse

    options = ["--train.batch-size-global", 64, "--logging.tensorboard", "false"]
    done = dlrm("train", CONFIG, "--dataset", dataset.path, "--run", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    done = dlrm("evaluate", tmp_path / "run", "--split", "test", "--json")
    assert done.returncode == 0, done.stderr
    export(tmp_path / "run", tmp_path / "bundle", options=ExportOptions(name="own"), dataset=dataset)
    expected, few = by_checkpoint(tmp_path / "run", dataset, text, tmp_path)
    assert expected.std() > 0.01

    predictor = Predictor.open(tmp_path / "bundle")
    assert predictor.bundle.sample()[0].height > 100
    cells, tensors = list(own_json(rows, schema)), [*own_tensors(rows[:2_700], schema)]
    parts = [tuple(own_tensors(rows[i : i + 3], schema)) for i in range(2_700, 3_000, 3)]
    of_tensors = [rows_of_request(tensors, schema, 4_096), *(rows_of_request(part, schema, 4_096) for part in parts)]
    by_tensors = [
        predictor.predict_encoded(
            predictor.encode(given) if isinstance(given, pl.DataFrame) else predictor.encode_rows(given)
        ).probabilities
        for given in of_tensors
    ]
    by_rows = [predictor.predict_encoded(predictor.encode_rows(cells[i : i + 7])) for i in range(0, 700, 7)]
    served = []
    if layout == "bucketed":
        server = serve(tmp_path / "bundle", "--log-level", "warning")
        served.append(by_http(server, tmp_path / "bundle", text))
        server.stop()
    for found in (
        *served,
        by_file(tmp_path / "bundle", text, tmp_path),
        by_file(tmp_path / "bundle", parquet, tmp_path),
        predictor.predict(pl.read_parquet(parquet)),
        predictor.predict(predictor.parse_rows(cells)),
        np.concatenate([*(part.probabilities for part in by_rows), expected[700:]]),
        np.concatenate(by_tensors),
    ):
        np.testing.assert_allclose(found[few:], expected[few:], rtol=0, atol=1e-6)


def test_a_number_that_training_never_lacked_is_its_mean_by_every_way(serve, dlrm, tmp_path):
    content = tomllib.loads(OWN_SCHEMA)
    content["columns"][1]["transform"] = "none"
    schema = FeatureSchema.model_validate(content)
    learnt = [row for row in own_rows(3_000, seed=0) if row["price"] is not None and row["age"] is not None]
    rows = list(own_rows(4_000, seed=1))
    (tmp_path / "learnt").mkdir()
    text, _ = write_own_logs(learnt, schema, tmp_path / "learnt")
    dataset = preprocess([text], tmp_path / "dataset", schema, chunk_bytes=20_000)
    train = learnt[: dataset.splits["train"].rows]
    price, age = (dataset.manifest.dense[name] for name in ("price", "age"))
    assert price.missing == pytest.approx(np.mean([row["price"] for row in train]), rel=1e-6)
    assert age.missing == pytest.approx(np.expm1(np.mean([np.log1p(max(row["age"], 0)) for row in train])), rel=1e-6)
    assert price.never_missing
    assert age.never_missing
    assert dataset.manifest.format_version == 5
    whole = preprocess([text], tmp_path / "whole", schema)
    assert whole.manifest.dense == dataset.manifest.dense  # however the log is cut

    options = ["--train.batch-size-global", 64, "--logging.tensorboard", "false"]
    done = dlrm("train", CONFIG, "--dataset", dataset.path, "--run", tmp_path / "run", *options)
    assert done.returncode == 0, done.stderr
    bundle = export(tmp_path / "run", tmp_path / "bundle", options=ExportOptions(name="own"), dataset=dataset).bundle
    assert (bundle.dense["age"], bundle.manifest.format_version) == (age, 6)
    log, parquet = write_own_logs(rows, schema, tmp_path)
    expected, few = by_checkpoint(tmp_path / "run", dataset, log, tmp_path)
    # A later period goes on with the same, also where it lacks the number; it says then that it does.
    later = Dataset.open(tmp_path / "ordered").manifest.dense["age"]
    assert later.missing == age.missing
    assert later.continues(age)

    predictor = Predictor.open(bundle.path)
    cells = list(own_json(rows, schema))
    tensors = rows_of_request([*own_tensors(rows, schema)], schema, 4_096)
    encoded = [predictor.encode_rows(cells), predictor.encode(predictor.parse_rows(cells)), predictor.encode(tensors)]
    server = serve(bundle.path, "--log-level", "warning")
    for found in (
        by_file(bundle.path, log, tmp_path),
        by_file(bundle.path, parquet, tmp_path),
        by_http(server, bundle.path, log),
        *(predictor.predict_encoded(some).probabilities for some in encoded),
    ):
        np.testing.assert_allclose(found[few:], expected[few:], rtol=0, atol=1e-6)
    number = {name: sum(row[name] is None for row in rows) for name in ("price", "age")}
    assert all(predictor.predict_encoded(some).num_filled == number for some in encoded)
    halves = predictor.encode_requests([cells[:250], predictor.parse_rows(cells[250:])])
    assert predictor.predict_encoded(halves).num_filled == number
    columns = {column["name"]: column for column in httpx.get(f"{server.url}/schema").json()["columns"]}
    assert [name for name in columns if columns[name].get("never_missing")] == ["price", "age"]
    metrics = httpx.get(f"{server.url}/metrics").text
    assert all(f'dlrm_never_missing_values_total{{feature="{name}"}} {number[name]}.0' in metrics for name in number)
    server.stop()
    done = dlrm("predict", bundle.path, log, "--out", tmp_path / "scores.csv")
    assert f"price (in {number['price']:,} rows), age (in {number['age']:,} rows)" in done.stderr
    done = dlrm("inspect", bundle.path)
    assert "never missing in training, so the mean stands for a missing one: price, age" in done.stderr


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    log = two_labels.write_log(folder / "log.tsv", num_rows=2_000)
    return log, preprocess([log], folder / "dataset", two_labels.SCHEMA).with_labels(two_labels.LABELS)


def every_label_over_http_and_grpc(server, rows, tensors):
    """JSON in requests of a few rows and of many, and tensors by both protocols: [rows, labels] each."""
    found = []
    with httpx.Client(base_url=server.url, timeout=30) as client:
        answers = [client.post("/predict", json=rows[start : start + 200]).json() for start in range(0, len(rows), 200)]
        answers += [client.post("/predict", json=[row]).json() for row in rows[:20]]
        assert all(answer["predictions"] == answer["labels"]["click"] for answer in answers)
        by_json = [[answer["labels"][name] for name in two_labels.LABELS] for answer in answers]
        found.append(np.concatenate([np.array(labels).T for labels in by_json[:-20]]))
        np.testing.assert_allclose(np.concatenate([np.array(one).T for one in by_json[-20:]]), found[0][:20], atol=1e-6)
        infer = f"/v2/models/{server.model}/infer"
        names = ["prediction", "prediction_purchase"]
        outputs = client.post(infer, json={"inputs": tensors}).json()["outputs"]
        assert [output["name"] for output in outputs] == names
        found.append(np.array([output["data"] for output in outputs]).T)
        asked = {"name": names[1], "parameters": {"binary_data": True}}
        answer = client.post(infer, json={"inputs": tensors, "outputs": [asked]})
        size = int(answer.headers["inference-header-content-length"])
        np.testing.assert_array_equal(np.frombuffer(answer.content[size:], "<f4"), np.float32(outputs[1]["data"]))
        refused = client.post(infer, json={"inputs": tensors, "outputs": [{"name": "purchase"}]})
        assert refused.json()["error"] == "outputs: 'purchase' is none; there are 'prediction', 'prediction_purchase'"
        of_purchase = client.post("/explain?label=purchase", json=rows[:1]).json()["explanations"][0]
        assert of_purchase["label"] == "purchase"
        assert of_purchase["prediction"] == pytest.approx(found[0][0, 1], abs=1e-6)
        assert of_purchase["labels"] == pytest.approx(dict(zip(two_labels.LABELS, found[0][0], strict=True)), abs=1e-6)
        assert client.post("/explain?label=buy", json=rows[:1]).status_code == 400
        described = client.get("/schema").json()
        roles = {column["name"]: column["role"] for column in described["columns"]}
        assert described["labels"] == two_labels.LABELS
        assert [roles[name] for name in two_labels.LABELS] == ["label", "label"]
        assert client.get(f"/v2/models/{server.model}").json()["recalibration"].endswith("purchase: platt")
    message = CLASSES["ModelInferRequest"](model_name=server.model)
    for tensor in tensors:
        contents = {"FP64": "fp64_contents", "BYTES": "bytes_contents"}[tensor["datatype"]]
        data = [cell.encode() if isinstance(cell, str) else cell for cell in tensor["data"]]
        one = message.inputs.add(name=tensor["name"], datatype=tensor["datatype"], shape=tensor["shape"])
        getattr(one.contents, contents).extend(data)
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/{PACKAGE}.{SERVICE}/ModelInfer",
            CLASSES["ModelInferRequest"].SerializeToString,
            CLASSES["ModelInferResponse"].FromString,
        )
        outputs = call(message).outputs
        assert [output.name for output in outputs] == names
        found.append(np.array([output.contents.fp32_contents for output in outputs]).T)
    return found


def by_graph(predictor, encoded, folder):
    export_as(predictor.bundle.path, folder / "model.onnx", "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert [output.name for output in session.get_outputs()] == ["probability", "probability_purchase"]
    return np.hstack(session.run(None, onnx_inputs(predictor.bundle, encoded)))


@pytest.mark.parametrize("heads", two_labels.HEADS)
def test_every_label_of_a_model_by_every_way(heads, shop, serve, tmp_path, monkeypatch):
    """And, with two of them, recalibrated: a line for each label that gains, of its logit over all rows."""
    log, dataset = shop
    monkeypatch.setattr(Verdict, "is_better", True)
    config = two_labels.config(**{"train.epochs": "4"}, **two_labels.HEADS[heads])
    train(config, dataset, tmp_path / "run", progress=False)
    options = ExportOptions(recalibrate="platt" if heads in {"ple", "after"} else None)
    exported = export(tmp_path / "run", tmp_path / "bundle", dataset=dataset, options=options, progress=False)
    assert exported.bundle.manifest.format_version == 10
    assert list(exported.bundle.manifest.check.labels) == ["purchase"]
    expected, few = by_checkpoint(tmp_path / "run", dataset, log, tmp_path)
    assert expected.shape == (2_000, 2)
    assert (expected.std(axis=0) > 0.01).all()
    if heads == "after":
        assert (expected[:, 1] < expected[:, 0]).all()
    maps = exported.bundle.manifest.recalibration or {}
    assert len(maps) == {"ple": 1, "after": 2}.get(heads, 0)
    for label, of in maps.items():
        place = two_labels.LABELS.index(label)
        logits = np.log(expected[:, place]) - np.log1p(-expected[:, place])
        expected[:, place] = 1 / (1 + np.exp(-of.map.slope * logits - of.map.values[0]))
    predictor = Predictor.open(tmp_path / "bundle")
    (chunk,) = RowsIn([log], predictor.schema)
    summary = predict_file(predictor, RowsIn([log], predictor.schema), tmp_path / "scores.parquet")
    assert list(summary.labels) == ["purchase"]
    rows = as_json_rows(chunk.frame, predictor.schema)
    ways = [
        pl.read_parquet(tmp_path / "scores.parquet").select("prediction", "prediction_purchase").to_numpy(),
        predictor.predict(rows),
        predictor.predict_encoded(predictor.encode(predictor.parse_rows(rows))).probabilities,
        by_tensors(tmp_path / "bundle", log),
        by_graph(predictor, predictor.encode(predictor.parse_rows(rows)), tmp_path),
    ]
    if heads == "ple":
        tensors = [
            {"name": "price", "datatype": "FP64", "shape": [len(rows)], "data": [row["price"] for row in rows]},
            *(
                {"name": of, "datatype": "BYTES", "shape": [len(rows)], "data": [r[of] for r in rows]}
                for of in ("item", "city")
            ),
        ]
        server = serve(tmp_path / "bundle", "--log-level", "warning", "--grpc-port", 0)
        ways += every_label_over_http_and_grpc(server, rows, tensors)
        server.stop()
    for found in ways:
        np.testing.assert_allclose(found[few:], expected[few:], rtol=0, atol=1e-6)
