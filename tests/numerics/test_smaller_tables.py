"""Tables of smaller dimensions, and of quotients and remainders, compute what plain torch computes in float64."""

import random
import tomllib

import numpy as np
import polars as pl
import pytest
import torch
from test_predictions_have_no_skew import assert_no_skew
from torch.nn.functional import binary_cross_entropy_with_logits

from torchdlrm.bundle.apply import write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.exporting.checkpoint import CheckpointModel, CheckpointReader
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.loader.loader import Loader
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.preprocess import preprocess
from torchdlrm.training.checkpoint import checkpoint_path
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.run import Run

CONFIG = "criteo-small"
SCHEMA = """
name = "films"
separator = ","
null_values = ["-"]
columns = [
    { role = "label", name = "seen" },
    { role = "dense", name = "age", kind = "float" },
    { role = "sparse", name = "user", kind = "int" },
    { role = "sparse", name = "city", kind = "string" },
    { role = "sparse", name = "genres", kind = "string", value_separator = "|" },
    { role = "sparse", name = "film", kind = "int", hash = 50 },
    { role = "sparse", name = "values", kind = "int" },
    { role = "sparse", name = "last_city", kind = "string", table = "city" },
    { role = "sparse", name = "films", kind = "int", table = "film", value_separator = "|" },
    { role = "sparse", name = "friend", kind = "int", table = "user" },
]
[split]
rule = "order"
val = 0.1
test = 0.1
"""
STEPS, DIM = 10, 16
NAMES = ["seen", "age", "user", "city", "genres", "film", "values", "last_city", "films", "friend"]
# A plain table, a projected one, a sum for several values a cell, a product, and a name that modules have too; three of
# them are shared by another column.
SETTINGS = {
    "model.features.city.embedding_dim": "4",
    "model.features.values.embedding_dim": "8",
    "model.features.genres.quotient_remainder": "add",
    "model.features.genres.num_collisions": "3",
    "model.features.user.quotient_remainder": "mult",
    "model.dense_arch_layer_sizes": f"12,{DIM}",
    "model.over_arch_layer_sizes": "8,1",
    "table_optimizer.name": "sgd",
    "table_optimizer.learning_rate": "30.0",
    "dense_optimizer.name": "sgd",
    "dense_optimizer.learning_rate": "0.5",
    "train.max_steps": str(STEPS),
    "train.precision": "float32",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": str(STEPS),
    "logging.tensorboard": "false",
}


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    path, draw = tmp_path_factory.mktemp("films") / "log.csv", random.Random(3)
    genres = [f"g{i}" for i in range(12)]
    lines = []
    for _ in range(4_000):
        user, film, chosen = draw.randrange(90), draw.randrange(200), draw.sample(genres, draw.randrange(4))
        seen = draw.random() < (0.8 if user % 3 and "g1" not in chosen else 0.2)
        city = draw.choice(["Köln", "Bonn", "Ulm", "Jena", "-"])
        films = "|".join(str(draw.randrange(200)) for _ in range(draw.randrange(4)))
        shared = draw.choice(["Bonn", "Jena"]), films, draw.randrange(90)
        cells = int(seen), draw.random(), user, city, "|".join(chosen), film, draw.randrange(30), *shared
        lines.append(",".join(map(str, cells)))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def dataset(log, tmp_path_factory):
    schema = FeatureSchema.model_validate(tomllib.loads(SCHEMA))
    return preprocess([log], tmp_path_factory.mktemp("dataset") / "films", schema)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    train(load_config(CONFIG, SETTINGS), dataset, path)
    return path


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(run, path)
    return path


def weights_after(run, step):
    """All weights in float64, each a leaf."""
    reader = CheckpointReader(checkpoint_path(run / "checkpoints", step))
    return {name: reader.tensor(name).double().requires_grad_() for name in reader.shapes}


def logits_of_plain_torch(weights, dense, ids):
    """One row after the other, each id by itself; ids are those of the dataset: of each feature a list a row."""

    def row_of(table, index):
        return weights[f"sparse_arch.embedding_bag_collection.embedding_bags.t_{table}.weight"][index]

    vector_of = {
        "user": lambda i: row_of("user_q", i // 4) * row_of("user_r", i % 4),
        "city": lambda i: weights["sparse_arch.projections.t_city.weight"] @ row_of("city", i),
        "genres": lambda i: row_of("genres_q", i // 3) + row_of("genres_r", i % 3),
        "film": lambda i: row_of("film", i),
        "values": lambda i: weights["sparse_arch.projections.t_values.weight"] @ row_of("values", i),
    }
    vector_of |= {"last_city": vector_of["city"], "films": vector_of["film"], "friend": vector_of["user"]}
    nothing, logits = torch.zeros(DIM, dtype=torch.float64), []
    for row, numbers in enumerate(dense.double()):
        vector = numbers
        for layer in (0, 1):
            name = f"dense_arch.model._mlp.{layer}._linear"
            vector = torch.relu(weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"])
        vectors = [vector]
        vectors += [sum((vector_of[name](i) for i in rows[row]), nothing) for name, rows in ids.items()]
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
        name = "over_arch.model.0._mlp.0._linear"
        hidden = torch.cat([vector, torch.stack(pairs)])
        hidden = torch.relu(weights[f"{name}.weight"] @ hidden + weights[f"{name}.bias"])
        logits.append(weights["over_arch.model.1.weight"] @ hidden + weights["over_arch.model.1.bias"])
    return torch.cat(logits)


def ids_by_row(kjt):
    return {name: [part.tolist() for part in kjt[name].to_dense()] for name in kjt.keys()}  # noqa: SIM118 - of a KJT


def test_a_step_changes_all_weights_as_plain_torch_in_float64_does(run, dataset):
    batches = Loader(dataset, "train", batch_size_global=64)
    batch = next(batch for number, batch in enumerate(batches, start=1) if number == 5)
    weights, after = weights_after(run, 4), weights_after(run, 5)
    logits_B = logits_of_plain_torch(weights, batch.dense_features, ids_by_row(batch.sparse_features))
    binary_cross_entropy_with_logits(logits_B, batch.labels.double()).backward()
    assert {name for name in weights if "projections" in name} == {
        "sparse_arch.projections.t_city.weight",
        "sparse_arch.projections.t_values.weight",
    }
    shapes = {name.split(".")[-2]: tuple(weight.shape) for name, weight in weights.items() if "embedding_bags" in name}
    sizes = dataset.num_embeddings
    assert shapes == {
        "t_user_q": (-(-sizes["user"] // 4), DIM),
        "t_user_r": (4, DIM),
        "t_city": (sizes["city"], 4),
        "t_genres_q": (-(-sizes["genres"] // 3), DIM),
        "t_genres_r": (3, DIM),
        "t_film": (50, DIM),
        "t_values": (sizes["values"], 8),
    }
    for name, weight in weights.items():
        assert weight.grad.abs().max() > 1e-4, name
        rate = 30.0 if "embedding_bags" in name else 0.5
        torch.testing.assert_close(after[name], weight - rate * weight.grad, atol=1e-6, rtol=0, msg=name)


def test_the_checkpoint_predicts_as_plain_torch_in_float64_does(run, dataset):
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits["test"].files]).head(40)
    rows = EncodedRows.from_frame(frame, dataset.schema)
    reader = CheckpointReader(checkpoint_path(run / "checkpoints", STEPS))
    got = CheckpointModel(reader, Run.open(run).shape(dataset)).logits(rows)
    cells = {name: frame[name].to_list() for name in dataset.sparse_names}
    ids = {name: [cell if isinstance(cell, list) else [cell] for cell in column] for name, column in cells.items()}
    expected = logits_of_plain_torch(weights_after(run, STEPS), torch.from_numpy(rows.dense), ids)
    np.testing.assert_allclose(got, expected.detach().numpy(), rtol=0, atol=1e-6)


# Tables of one dimension alone: embeddings are exchanged through memory. Else TorchRec exchanges them.
OF_ONE_DIMENSION = {name: text for name, text in SETTINGS.items() if "embedding_dim" not in name}


def train_both(dataset, folder):
    """What each of two processes does."""
    for name, settings in (("mixed", SETTINGS), ("alike", OF_ONE_DIMENSION)):
        train(load_config(CONFIG, settings), dataset, folder / name)


def test_two_processes_train_the_same_weights(run, dataset, tmp_path):
    launch(train_both, dataset, tmp_path, processes=Processes(2))
    train(load_config(CONFIG, OF_ONE_DIMENSION), dataset, tmp_path / "one")
    for name, alone in (("mixed", run), ("alike", tmp_path / "one")):
        one, two = weights_after(alone, STEPS), weights_after(tmp_path / name, STEPS)
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, atol=1e-5, rtol=0, msg=f"{name} {key}")


def test_all_ways_to_predict_agree_with_the_checkpoint(serve, bundle, run, dataset, log, tmp_path):
    assert BundleManifest.read(bundle).format_version == 10  # of shared tables; of smaller ones alone 4
    assert_no_skew(serve, bundle, run, dataset, log, tmp_path)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4", "auto"])
def test_rounded_tables_are_served_as_the_rounded_checkpoint_predicts(precision, run, dataset, tmp_path):
    """The export compares the two; here all of the test split, with a precision of its own for each feature."""
    options = ExportOptions(precision=precision, max_logloss_increase=1e-3 if precision == "auto" else None)
    exported = export(run, tmp_path / "bundle", options=options)
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits["test"].files])
    rows = EncodedRows.from_frame(frame, dataset.schema)
    reader = CheckpointReader(checkpoint_path(run / "checkpoints", exported.checkpoint.step))
    model = CheckpointModel(reader, Run.open(run).shape(dataset))
    precisions = [record.precision for record in exported.bundle.manifest.sparse.values()]
    assert set(precisions) != {"float32"}
    got = ServedModel(exported.bundle, "float32").logits(rows)
    np.testing.assert_allclose(got, model.logits(rows, precisions), rtol=0, atol=1e-6)
    assert np.abs(got - model.logits(rows)).max() > 1e-6


def test_another_architecture_has_smaller_tables_too(dataset, tmp_path):
    settings = {"model.interaction": "dcn", "model.dcn.low_rank_dim": "5", "train.max_steps": "3"}
    train(load_config(CONFIG, SETTINGS | settings), dataset, tmp_path / "run")
    exported = export(tmp_path / "run", tmp_path / "bundle")
    assert exported.bundle.manifest.check.largest_difference < 1e-6


def test_ids_outside_a_feature_are_refused_though_its_tables_have_rows_for_them(bundle, dataset):
    model, sizes = ServedModel(Bundle.open(bundle)), dataset.num_embeddings
    assert sizes["user"] % 4  # so that the last row of quotients stands for ids that there are not
    columns = tuple((np.array([sizes["user"] if name == "user" else 0]), np.array([0, 1])) for name in sizes)
    with pytest.raises(DatasetError, match=f"user: id {sizes['user']} is outside"):
        model.predict(EncodedRows(np.zeros((1, 1), np.float32), columns))


@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_a_delta_in_memory_predicts_as_the_whole_bundle(run, log, precision, tmp_path):
    """Cells of several values, projected rows, and rows of quotients and remainders, of which some have changed."""
    paths = {}
    for step in (3, STEPS):
        options = ExportOptions(checkpoint=str(step), precision=precision, name="films", max_logloss_increase=9.0)
        paths[step] = export(run, tmp_path / f"{step}", options=options).bundle.path
    delta = tmp_path / "delta"
    delta.mkdir()
    write_delta(paths[3], paths[STEPS], delta)
    patched = PatchedBundle(Bundle.open(paths[3]), Delta.open(delta))
    tables = Delta.open(delta).manifest.weights.tables
    assert 0 < sum(sum(table.changed_rows) for table in tables) < sum(table.num_rows for table in tables)
    rows = [dict(zip(NAMES, line.split(","), strict=True)) for line in log.read_text().splitlines()[:300]]
    encoded = Predictor.open(paths[STEPS]).encode_rows([{k: v for k, v in row.items() if k != "seen"} for row in rows])
    whole, again = (ServedModel(bundle).logits(encoded) for bundle in (Bundle.open(paths[STEPS]), patched))
    assert np.array_equal(whole, again)
    assert np.abs(whole - ServedModel(Bundle.open(paths[3])).logits(encoded)).max() > 0.01


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"citi.embedding_dim": "4"}, "model.features.citi: there is no sparse feature citi; did you mean city?"),
        ({"genres.quotient_remainder": "mult"}, "genres may have several values a cell"),
        ({"film.quotient_remainder": "mult"}, "film or films may have several values a cell"),
        (
            {"films.embedding_dim": "4"},
            "model.features.films: films shares the table of film, which model.features.film",
        ),
        ({"user.quotient_remainder": "mult", "user.num_collisions": "5000"}, "must be below the feature's 9"),
    ],
)
def test_what_does_not_suit_the_dataset_is_refused_before_anything_is_written(settings, words, dataset, tmp_path):
    config = load_config(CONFIG, {f"model.features.{name}": text for name, text in settings.items()})
    with pytest.raises(ConfigError, match=words):
        train(config, dataset, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("scale", [1, 0.125])
def test_products_start_as_rows_of_one_table_would(scale, dataset, tmp_path):
    """Quotients are drawn as ids are, remainders are signs; sums have the same variance."""
    settings = SETTINGS | {"train.max_steps": "1", "train.freeze": "tables", "model.table_init_scale": str(scale)}
    train(load_config(CONFIG, settings), dataset, tmp_path / "run")
    weights, sizes = weights_after(tmp_path / "run", 1), dataset.num_embeddings
    name = "sparse_arch.embedding_bag_collection.embedding_bags.t_{}.weight"
    torch.testing.assert_close(weights[name.format("user_r")].abs(), torch.ones(4, DIM, dtype=torch.float64))
    assert weights[name.format("user_r")].sum().abs() < 4 * DIM
    for table, num_ids in (("user_q", sizes["user"]), ("genres_q", 2 * sizes["genres"]), ("film", sizes["film"])):
        assert weights[name.format(table)].abs().max().item() == pytest.approx(scale * num_ids**-0.5, rel=0.1)
