"""Weights of rows and of values, and a choice of labels: from the log through loader, loss, metrics and predictions."""

import json
import math
import re

import httpx
import numpy as np
import polars as pl
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score
from torch.nn.functional import binary_cross_entropy_with_logits

from helpers.predicted import rows_of_request
from torchdlrm.config import load_config
from torchdlrm.data.dataset import Dataset
from torchdlrm.data.manifest import oldest_version
from torchdlrm.errors import DatasetError, LogError, RunError
from torchdlrm.evaluation.compare import compare
from torchdlrm.evaluation.evaluate import evaluate
from torchdlrm.evaluation.predictions import Asked
from torchdlrm.evaluation.split_rows import predict_split
from torchdlrm.exporting.export import export
from torchdlrm.features.schema_file import load_schema
from torchdlrm.loader.loader import Loader
from torchdlrm.model.loss import batch_loss
from torchdlrm.prediction.files import predict_file
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess
from torchdlrm.serving.front.open_inference.tensors import Tensor
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

CONFIG = "criteo-small"
SCHEMA = """
name = "weighted"
separator = ","
header = true
columns = [
    { role = "label", name = "click" },
    { role = "weight", name = "w", header_name = "the weight" },
    { role = "dense", name = "price" },
    { role = "label", name = "bought", positive = "yes" },
    { role = "sparse", name = "city" },
    { role = "sparse", name = "shop", kind = "int" },
    { role = "sparse", name = "tags", value_separator = "|", weight_separator = ":", max_values = 3 },
]
[split]
rule = "order"
"""
NUM_ROWS = 1_200


def written_tags(rng):
    """No to four tags: some with a weight, some without, some with a colon in their name."""
    tags = (f"t{rng.integers(9)}{rng.choice(['', ':x'])}" for _ in range(rng.integers(5)))
    cells = (tag if rng.random() < 0.3 and ":" not in tag else f"{tag}:{rng.normal():.3f}" for tag in tags)
    return "|".join(cells) or None


def tags_of(cell):
    """What a cell means: pairs of tag and weight."""
    parts = [text.rpartition(":") for text in (cell or "").split("|") if text]
    return [(name or rest, float(rest) if name else 1.0) for name, _, rest in parts][:3]


@pytest.fixture(scope="module")
def frame():
    """Rows of which those of weight 3 are clicked after other rules than those of weight 0.5; some weigh nothing."""
    rng = np.random.default_rng(7)
    city, weight = rng.integers(6, size=NUM_ROWS), rng.choice([0.0, 0.5, 3.0], NUM_ROWS, p=[0.1, 0.6, 0.3])
    odds = np.where(weight == 3.0, city - 2.5, 1.5 - 0.6 * city)
    return pl.DataFrame(
        {
            "click": (rng.random(NUM_ROWS) < 1 / (1 + np.exp(-odds))).astype(int),
            "the weight": weight,
            "price": rng.random(NUM_ROWS).round(3),
            "bought": np.where(city + rng.normal(size=NUM_ROWS) > 3.5, "yes", "no"),
            "city": [f"c{value}" for value in city],
            "shop": rng.integers(20, size=NUM_ROWS),
            "tags": [written_tags(rng) for _ in range(NUM_ROWS)],
        }
    )


@pytest.fixture(scope="module")
def folder(frame, tmp_path_factory):
    path = tmp_path_factory.mktemp("weighted")
    frame.write_csv(path / "log.csv")
    (path / "schema.toml").write_text(SCHEMA)
    preprocess([path / "log.csv"], path / "dataset", load_schema(path / "schema.toml"), PreprocessOptions(min_count=1))
    settings = {"train.batch_size_global": "101", "train.epochs": "3", "logging.tensorboard": "false"}
    train(load_config("criteo-small", {**settings, "logging.every_steps": "1"}), path / "dataset", path / "run")
    export(path / "run", path / "bundle")
    return path


@pytest.fixture(scope="module")
def dataset(folder):
    return Dataset.open(folder / "dataset")


def test_the_dataset_has_the_weights_and_says_so_to_older_readers(folder, dataset, frame, small_dataset):
    assert dataset.manifest.dense["price"].never_missing
    assert (dataset.manifest.format_version, oldest_version(dataset.schema)) == (5, 2)
    assert small_dataset.manifest.format_version == 1
    table = pl.read_parquet(folder / "dataset" / "test" / "part-00000.parquet")
    assert table.columns == ["click", "bought", "w", "price", "city", "shop", "tags", "tags_weights"]
    assert table.schema["w"] == pl.Float32
    assert table["w"].to_list() == frame["the weight"].tail(table.height).to_list()
    expected = [tags_of(cell) for cell in frame["tags"].tail(table.height)]
    names = {value_id: name for name, _, value_id in dataset.vocabulary("tags").table.iter_rows()}
    assert [[names[i] for i in ids] for ids in table["tags"]] == [[name for name, _ in cell] for cell in expected]
    assert table.schema["tags_weights"] == pl.List(pl.Float32)
    weights = [[np.float32(weight) for _, weight in cell] for cell in expected]
    assert [cell.to_list() for cell in table["tags_weights"]] == weights


def test_the_loader_gives_each_row_its_weight_and_padding_none(dataset):
    whole = torch.cat([batch.row_weights for batch in Loader(dataset, "train", batch_size_global=101)])
    assert whole.dtype == torch.float32
    assert sorted(set(whole.tolist())) == [0.0, 0.5, 3.0]
    ranks = [Loader(dataset, "train", batch_size_global=101, rank=rank, world_size=2) for rank in range(2)]
    found = []
    for parts in zip(*ranks, strict=True):
        assert [part.num_padding for part in parts] in ([1, 0], [0, 0])
        for part in (part.to(torch.device("cpu")) for part in parts):
            found.append(part.row_weights[: len(part.labels) - part.num_padding])
            assert not part.row_weights[len(found[-1]) :].any()
    assert torch.equal(torch.cat(found), whole)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_loader_gives_lists_of_ids_with_their_weights_and_others_a_one(dataset, world_size):
    table = pl.concat(pl.read_parquet(file.path) for file in dataset.splits["train"].files)
    options = {"batch_size_global": 101, "world_size": world_size}
    ranks = [Loader(dataset, "train", rank=rank, **options) for rank in range(world_size)]
    found, cities, tags, ones = [], [], [], []
    for part in (part for parts in zip(*ranks, strict=True) for part in parts):
        kjt, num_rows = part.to(torch.device("cpu")).sparse_features, part.labels.numel() - part.num_padding
        assert len(kjt.weights()) == len(kjt.values())
        found += kjt["tags"].weights().tolist()
        ones += kjt["city"].weights().tolist() + kjt["shop"].weights().tolist()
        cities += kjt["city"].values().tolist()
        assert kjt["city"].lengths().tolist() == [1] * num_rows + [0] * part.num_padding
        lists = [ids.tolist() for ids in kjt["tags"].to_dense()]
        assert lists[num_rows:] == [[]] * part.num_padding
        tags += lists[:num_rows]
    assert (cities, tags) == (table["city"].to_list(), table["tags"].to_list())
    assert len({len(ids) for ids in tags}) > 2
    assert found == table["tags_weights"].explode(empty_as_null=False).to_list()
    assert ones == [1.0] * (2 * table.height)


@pytest.mark.parametrize("negative_weight", [1.0, 0.25])
def test_the_loss_is_the_sum_of_weighted_losses_over_the_rows(dataset, negative_weight, seed):
    """Of a rank's slice with a row of padding, against float64; a batch that weighs nothing has a loss of 0."""
    batch = next(iter(Loader(dataset, "train", batch_size_global=101, rank=0, world_size=2)))
    assert batch.num_padding == 1
    labels, weights = batch.labels[:-1], batch.row_weights[:-1]
    logits = torch.randn(len(labels), generator=torch.Generator().manual_seed(seed))
    raw = logits.double() - math.log(negative_weight)
    losses = binary_cross_entropy_with_logits(raw, labels.double(), reduction="none")
    losses *= weights * torch.where(labels > 0, 1.0, negative_weight)
    found = batch_loss(logits, labels, batch, negative_weight)
    assert found.item() == pytest.approx(losses.sum().item() / len(labels) * batch.loss_weight, rel=1e-6)
    batch.row_weights.zero_()
    assert batch_loss(logits, labels, batch, negative_weight).item() == 0


def predicted(run, split):
    trained = Run.open(run)
    return predict_split(trained, trained.open_dataset(), Asked(split=split))[1]


def judged(labels, logits, weights):
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    return {
        "auc": roc_auc_score(labels, logits, sample_weight=weights),
        "logloss": log_loss(labels, p, sample_weight=weights),
        "calibration": np.average(p, weights=weights) / np.average(labels, weights=weights),
    }


def test_metrics_are_weighted_and_the_model_follows_the_rows_that_weigh_more(folder):
    found = predicted(folder / "run", "val+test")
    expected = judged(*found)
    assert {name: evaluate(folder / "run", None, "val+test")[name] for name in expected} == pytest.approx(expected)
    heavy = found.weights == 3.0
    assert roc_auc_score(found.labels[heavy], found.logits[heavy]) > 0.7
    assert roc_auc_score(found.labels[~heavy], found.logits[~heavy]) < 0.5


def test_two_processes_train_and_evaluate_the_same(folder, dlrm, tmp_path):
    """Also where TorchRec cuts the table of a feature with weights by rows."""
    options = ("--train.batch-size-global", 101, "--train.epochs", 3, "--logging.tensorboard", "false")
    done = dlrm(
        *("train", CONFIG, "--dataset", folder / "dataset", "--run", tmp_path / "run", *options),
        *("--logging.every-steps", 1, "--nproc-per-node", 2, "--sharding.constraints", '["tags=row_wise"]'),
    )
    assert done.returncode == 0, done.stderr
    one, two = ([json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                for run in (folder / "run", tmp_path / "run"))  # fmt: skip
    assert len(one) == len(two) > 24
    for left, right in zip(one, two, strict=True):
        # In a batch of 101 rows one pair that changes places is 2e-4 of the AUC or more.
        for name, allowed in (("loss", 2e-4), ("ne", 2e-4), ("auc", 1e-3)):
            assert right[name] == pytest.approx(left[name], abs=allowed), (left["step"], name)
    rows = tmp_path / "rows.parquet"
    done = dlrm(
        "evaluate", tmp_path / "run", "--nproc-per-node", 2, "--json", "--predictions", rows, "--batch-size-global", 50
    )
    assert done.returncode == 0, done.stderr
    # In the order of the split, whatever the number of processes.
    written, one_process = pl.read_parquet(rows), predicted(tmp_path / "run", "test")
    for name, values in (("label", one_process.labels), ("weight", one_process.weights), ("logit", one_process.logits)):
        np.testing.assert_allclose(written[name], values, atol=1e-5)
    result, expected = json.loads(done.stdout), evaluate(tmp_path / "run", None, "test")
    found = result.pop("intervals")
    for name, interval in expected.pop("intervals").items():
        assert found[name] == pytest.approx(interval, abs=1e-6)
    assert result == pytest.approx(expected, abs=1e-6)


def test_a_log_that_is_predicted_may_have_weights_and_then_its_metrics_are_weighted(folder, frame, dlrm, tmp_path):
    def predict(columns):
        columns.write_csv(tmp_path / "log.csv")
        out = tmp_path / "scores.parquet"
        done = dlrm("predict", folder / "bundle", tmp_path / "log.csv", "--out", out, "--json")
        assert done.returncode == 0, done.stderr
        p = pl.read_parquet(out)["prediction"].to_numpy().astype(np.float64)
        return np.log(p) - np.log1p(-p), json.loads(done.stdout)["metrics"]

    labels, weights = frame["click"].to_numpy(), frame["the weight"].to_numpy()
    logits, metrics = predict(frame)
    assert {**metrics, **judged(labels, logits, weights)} == pytest.approx(metrics, abs=1e-5)
    again, metrics = predict(frame.drop("the weight"))
    np.testing.assert_array_equal(again, logits)
    assert metrics["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-5)
    # A row without a weight is predicted, and does not count.
    missing = frame.with_columns(pl.when(pl.int_range(pl.len()) >= 5).then("the weight").alias("the weight"))
    again, metrics = predict(missing)
    np.testing.assert_array_equal(again, logits)
    assert metrics["rows"] == NUM_ROWS - 5


def test_a_run_learns_the_label_that_its_config_names_and_is_judged_by_it(folder, frame, dataset, dlrm, tmp_path):
    for split, record in dataset.manifest.splits.items():
        table = pl.read_parquet(folder / "dataset" / split / "part-00000.parquet")
        assert (record.clicks, record.other_clicks) == (table["click"].sum(), {"bought": table["bought"].sum()})
    """With smaller tables, one of them of quotients and remainders of the ids that have weights."""
    settings = {
        "train.batch_size_global": "101",
        "train.label": "bought",
        "logging.tensorboard": "false",
        "model.features": '{tags = {quotient_remainder = "add", num_collisions = 4}, city = {embedding_dim = 4}}',
    }
    train(load_config("criteo-small", settings), folder / "dataset", tmp_path / "run")
    run = tmp_path / "run"
    done = dlrm("evaluate", run, "--split", "test", "--json")
    assert done.returncode == 0, done.stderr
    assert "label bought" in " ".join(done.stderr.split())  # a long path breaks the line
    result = json.loads(done.stdout.splitlines()[-1])
    found = predicted(run, "test")
    bought = (frame["bought"].tail(len(found.labels)) == "yes").to_numpy()
    np.testing.assert_array_equal(found.labels, bought)
    assert result["label"] == "bought"
    assert result["auc"] == pytest.approx(judged(bought, found.logits, found.weights)["auc"])
    assert result["auc"] > 0.7
    with pytest.raises(DatasetError, match="by the labels click and bought"):
        compare(folder / "run", f"other={run}")
    with pytest.raises(RunError, match="label"):
        train(load_config("criteo-small", settings | {"train.label": "click"}), folder / "dataset", run)

    bundle = export(run, tmp_path / "bundle").bundle
    assert (bundle.manifest.format_version, bundle.schema.label.name) == (6, "bought")
    frame.with_columns(pl.lit("?").alias("click")).write_csv(tmp_path / "log.csv")  # is not read
    done = dlrm("predict", bundle.path, tmp_path / "log.csv", "--out", tmp_path / "scores.csv", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["auc"] > 0.7
    assert Predictor(bundle).predict([{"city": "c5", "click": 0}]) > Predictor(bundle).predict([{"city": "c0"}])
    frame.write_csv(tmp_path / "log.csv")
    done = dlrm("verify", bundle.path, tmp_path / "log.csv", "--dataset", folder / "dataset", "--run", run, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path["metrics"]["auc"] > 0.7 for path in json.loads(done.stdout)["ways"]] == [True, True]


def test_a_label_that_is_not_there_is_refused_with_those_that_are(folder, dlrm, tmp_path):
    command = ("train", CONFIG, "--dataset", folder / "dataset", "--run", tmp_path / "run", "--train.label", "bougth")
    done = dlrm(*command)
    assert done.returncode == 2
    assert "has no label 'bougth'; it has click, bought; did you mean bought?" in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_row_of_a_request_may_have_a_weight_which_is_not_read(folder):
    predictor = Predictor.open(folder / "bundle")
    row = {"price": 0.5, "city": "c1", "shop": 3, "tags": "t1:0.5"}
    expected = predictor.predict([row])
    for weight in (2.5, None, "much"):
        assert predictor.predict([{**row, "w": weight}]) == expected
        assert predictor.predict([{**row, "w": weight, "city": "c1", "click": 1}]) == expected  # not the fast path


def test_values_with_weights_are_predicted_the_same_however_they_come(folder, frame, serve, tmp_path):
    """As the training's own model predicts them: from a file, a frame, rows of three forms, tensors, and a server."""
    trained = predicted(folder / "run", "test")
    expected = 1 / (1 + np.exp(-trained.logits.astype(np.float64)))
    assert expected.std() > 0.01
    last = frame.tail(len(expected)).select("price", "city", "shop", "tags")
    predictor = Predictor.open(folder / "bundle")
    rows = last.to_dicts()
    lists = [row | {"tags": (row["tags"] or "").split("|")} for row in rows]
    objects = [row | {"tags": dict(tags_of(row["tags"]))} for row in rows]
    # An object has each value once.
    are_once = [len(row["tags"]) == len(tags_of(cell)) for row, cell in zip(objects, last["tags"], strict=True)]
    assert sum(are_once) > 50
    objects = [row for row, is_once in zip(objects, are_once, strict=True) if is_once]
    last.with_columns(pl.col("tags").str.split("|")).write_parquet(tmp_path / "lists.parquet")
    pairs = [[{"value": tag, "weight": weight} for tag, weight in tags_of(row["tags"])] for row in rows]
    structs = last.with_columns(pl.Series("tags", pairs))
    structs.write_parquet(tmp_path / "structs.parquet")
    tensors = [
        Tensor("price", "FP64", (len(rows),), last["price"]),
        Tensor("shop", "INT64", (len(rows),), last["shop"]),
        *(Tensor(name, "BYTES", (len(rows),), last[name].fill_null("")) for name in ("city", "tags")),
    ]
    server = serve(folder / "bundle", "--log-level", "warning")
    with httpx.Client(base_url=server.url, timeout=30) as client:
        served = client.post("/predict", json=lists).json()["predictions"]
        few = client.post("/predict", json={"shared": rows[0], "candidates": [{}]}).json()["predictions"]
        wrong = client.post("/predict", json=[{"tags": {"t1": "much"}}])
        more = [client.post("/predict", json=[{"tags": cell}]) for cell in ("t1:much", ["t1:"], {"t1": 1e40})]
        openapi = client.get("/openapi.json").json()
        about = client.get("/schema").json()
        again = client.post("/predict", json=about["examples"])
    server.stop()
    assert (wrong.status_code, wrong.json()["error"]) == (
        *(400, "row 0, column 'tags': the weight of a value is a number, not 'much'"),
    )
    for answer in more:
        assert answer.status_code == 400
        assert "row 0, column 'tags': the weight of a value is not a finite number" in answer.json()["error"]
    forms = openapi["components"]["schemas"]["Row"]["properties"]["tags"]["anyOf"]
    assert {"type": "object", "additionalProperties": {"type": "number"}} in forms
    assert about["columns"][-1]["weight_separator"] == ":"
    assert again.status_code == 200

    def of_file(name):
        predict_file(predictor, RowsIn([tmp_path / name], predictor.schema), tmp_path / "scores.parquet")
        return pl.read_parquet(tmp_path / "scores.parquet")["prediction"].to_numpy()

    found = {
        "text": predictor.predict(rows),
        "lists": predictor.predict(lists),
        "frame": predictor.predict(last),
        "frame of structs": predictor.predict(structs),
        "file of lists": of_file("lists.parquet"),
        "file of structs": of_file("structs.parquet"),
        "tensors": predictor.predict(rows_of_request(tensors, predictor.schema, 4_096)),
        "server": np.array(served),
        "written again": predictor.predict(as_json_rows(predictor.parse_rows(rows), predictor.schema)),
    }
    for name, probabilities in found.items():
        np.testing.assert_allclose(probabilities, expected, rtol=0, atol=1e-6, err_msg=name)
    np.testing.assert_allclose(predictor.predict(objects), expected[are_once], rtol=0, atol=1e-6)
    np.testing.assert_allclose(few, expected[:1], rtol=0, atol=1e-6)


NO_WEIGHT = {
    "w": "the weight of the row is missing, or not a finite number of at least 0",
    "tags": "the weight of a value is not a finite number",
}


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        *(("w", cell) for cell in ("-0.5", "", "heavy", "inf", "NaN", "1e40")),
        *(("tags", cell) for cell in ("t1:x", "t1:", "t2|t1:inf", "t1:1e40")),
    ],
)
def test_a_row_whose_weight_or_that_of_a_value_is_none_is_a_bad_one(frame, tmp_path, column, cell):
    lines = frame.head(30).write_csv().splitlines()
    cells = lines[7].split(",")
    cells[1 if column == "w" else -1] = cell
    lines[7] = ",".join(cells)
    (tmp_path / "log.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "schema.toml").write_text(SCHEMA)
    message = f"line 8, column {column}: {NO_WEIGHT[column]}: '{re.escape(cell)}'"
    with pytest.raises(LogError, match=message):
        preprocess([tmp_path / "log.csv"], tmp_path / "dataset", load_schema(tmp_path / "schema.toml"))
