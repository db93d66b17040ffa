"""Each pooling of a list computes what its formula says, value by value in float64; in training, served, everywhere."""

import random
import tomllib
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
import torch
from test_predictions_have_no_skew import assert_no_skew
from test_smaller_tables import weights_after
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torch.utils.flop_counter import FlopCounterMode
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchdlrm.bundle.apply import write_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.delta import Delta
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.cli.bundles import show_bundle
from torchdlrm.config import ModelConfig, load_config
from torchdlrm.config.model import FeatureConfig
from torchdlrm.data.dataset import rows_of_split
from torchdlrm.errors import ConfigError
from torchdlrm.exporting.checkpoint import CheckpointModel, CheckpointReader
from torchdlrm.exporting.export import export
from torchdlrm.exporting.onnx_file import onnx_inputs, write_onnx
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.tables import Feature, FeatureTable, check_features
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.pooling import KINDS, pooled_features, pooling_of
from torchdlrm.model.sparse_arch import embeddings_of_groups
from torchdlrm.preprocessing.preprocess import preprocess
from torchdlrm.sharding.tables import tables_of_model
from torchdlrm.training.checkpoint import checkpoint_path
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.run import Run

NUM_ROWS, NUM_POSITIONS, DIM = 7, 5, 4
LENGTHS = [5, 0, 1, 3, 5, 2, 4]


def by_its_formula(kind, module, values, target):
    """The vector of one row, given its values, the newest first, each [D]."""
    nothing = torch.zeros(DIM, dtype=torch.float64)
    if not values:
        return nothing
    if kind == "mean":
        return sum(values, nothing) / len(values)
    if kind == "last":
        return values[0]
    if kind == "din":
        network = nn.Sequential(*(step for layer in module.layers for step in (layer, nn.ReLU())))[:-1]
        return sum((network(torch.cat([e, target, e - target, e * target])) * e for e in values), nothing)
    query = module.query.weight @ target
    scores = [(query @ (e + p)) / DIM**0.5 for e, p in zip(values, module.positions, strict=False)]
    shares = torch.stack(scores).softmax(0)
    return sum((share * e for share, e in zip(shares, values, strict=True)), nothing)


@pytest.mark.parametrize("kind", ["mean", "last", "din", "dot"])
def test_a_pooling_and_its_gradients_are_those_of_its_formula(kind, seed):
    torch.manual_seed(seed)
    is_attention = kind in {"din", "dot"}
    config = FeatureConfig(
        pooling="attention" if is_attention else kind,
        target="item" if is_attention else None,
        **({"attention": kind, "attention_layer_sizes": (6, 3)} if is_attention else {}),
    )
    module = KINDS[kind](config, DIM, NUM_POSITIONS).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    target = torch.randn(NUM_ROWS, DIM, dtype=torch.float64)
    rows = [[torch.randn(DIM, dtype=torch.float64) for _ in range(length)] for length in LENGTHS]
    is_bag = kind == "mean"
    nothing = torch.zeros(DIM, dtype=torch.float64)
    padded = [[sum(row, nothing)] if is_bag else [*row, *[nothing] * (NUM_POSITIONS - len(row))] for row in rows]
    keys = torch.stack([torch.stack(row) for row in padded])

    found = module(keys, torch.tensor(LENGTHS), target)
    expected = torch.stack([by_its_formula(kind, module, row, target[b]) for b, row in enumerate(rows)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    weights = torch.randn_like(found)
    parameters = list(module.parameters())
    gradients = [
        torch.autograd.grad((pooled * weights).sum(), parameters) if parameters else () for pooled in (found, expected)
    ]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


SCHEMA = """
name = "shop"
separator = ","
columns = [
    { role = "label", name = "click" },
    { role = "dense", name = "age", kind = "float" },
    { role = "sparse", name = "item", kind = "int" },
    { role = "sparse", name = "city", kind = "string" },
    { role = "sparse", name = "seen", LIST, keep = "last", max_values = 4},
    { role = "sparse", name = "had", LIST, keep = "last", max_values = 3},
    { role = "sparse", name = "left", LIST, max_values = 3},
    { role = "sparse", name = "words", kind = "string", value_separator = "|" },
    { role = "sparse", name = "streets", kind = "string", value_separator = "|", max_values = 2 },
]
[split]
rule = "order"
""".replace("LIST", 'kind = "int", table = "item", value_separator = "|"')
NAMES = ["click", "age", "item", "city", "seen", "had", "left", "words", "streets"]
STEPS, WIDTH = 6, 16
# Every kind; of tables that are shared, smaller, or in two parts.
SETTINGS = {
    "model.features.seen.pooling": "attention",
    "model.features.seen.target": "item",
    "model.features.seen.attention_layer_sizes": "6,3",
    "model.features.had.pooling": "attention",
    "model.features.had.target": "item",
    "model.features.had.attention": "dot",
    "model.features.left.pooling": "last",
    "model.features.words.pooling": "mean",
    "model.features.words.quotient_remainder": "add",
    "model.features.words.num_collisions": "3",
    "model.features.streets.pooling": "attention",
    "model.features.streets.target": "city",
    "model.features.streets.embedding_dim": "8",
    "model.dense_arch_layer_sizes": f"12,{WIDTH}",
    "model.over_arch_layer_sizes": "8,1",
    "model.table_init_scale": "4.0",
    "table_optimizer.name": "sgd",
    "table_optimizer.learning_rate": "20.0",
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
    path, draw = tmp_path_factory.mktemp("shop") / "log.csv", random.Random(3)

    def several(count, values):
        return "|".join(map(str, draw.choices(values, k=draw.randrange(count + 1))))

    words, streets, lines = [f"w{i}" for i in range(12)], [f"s{i}" for i in range(9)], []
    for _ in range(2_000):
        item, seen = draw.randrange(30), several(6, range(30))
        click = draw.random() < (0.8 if str(item) in seen.split("|") else 0.3)
        cells = int(click), draw.random(), item, draw.choice(["Bonn", "Ulm"]), seen, several(5, range(30))
        lines.append(",".join(map(str, (*cells, several(3, range(30)), several(3, words), several(3, streets)))))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def dataset(log, tmp_path_factory):
    schema = FeatureSchema.model_validate(tomllib.loads(SCHEMA))
    return preprocess([log], tmp_path_factory.mktemp("dataset") / "shop", schema, progress=False)


@pytest.fixture(scope="module")
def run(dataset, tmp_path_factory):
    path = tmp_path_factory.mktemp("run") / "run"
    train(load_config("criteo-small", SETTINGS), dataset, path, progress=False)
    return path


@pytest.fixture(scope="module")
def bundle(run, tmp_path_factory):
    path = tmp_path_factory.mktemp("bundle") / "bundle"
    export(run, path, progress=False)
    return path


def plain_vectors(weights, cells):
    """The vector of each sparse feature of one row; ids are lists, the newest last."""

    def table(name):
        return weights[f"sparse_arch.embedding_bag_collection.embedding_bags.t_{name}.weight"]

    def attention(name, item, values):
        kind = name if name != "streets" else "seen"
        prefix = f"sparse_arch.poolings.t_{name}."
        total = torch.zeros(WIDTH, dtype=torch.float64)
        if kind == "seen":
            for e in values:
                x = torch.cat([e, item, e - item, e * item])
                numbers = sorted({key.removeprefix(f"{prefix}layers.")[0] for key in weights if key.startswith(prefix)})
                for number in numbers:
                    x = torch.relu(x) if number != "0" else x
                    x = weights[f"{prefix}layers.{number}.weight"] @ x + weights[f"{prefix}layers.{number}.bias"]
                total = total + x * e
            return total
        query = weights[f"{prefix}query.weight"] @ item
        newest_first = values[::-1]
        scores = [query @ (e + weights[f"{prefix}positions"][k]) / WIDTH**0.5 for k, e in enumerate(newest_first)]
        if scores:
            total = sum(s * e for s, e in zip(torch.stack(scores).softmax(0), newest_first, strict=True))
        return total

    nothing, items = torch.zeros(WIDTH, dtype=torch.float64), table("item")
    item, city = items[cells["item"][0]], table("city")[cells["city"][0]]
    words = [table("words_q")[i // 3] + table("words_r")[i % 3] for i in cells["words"]]
    projection = weights["sparse_arch.projections.t_streets.weight"]
    return [
        item,
        city,
        attention("seen", item, [items[i] for i in cells["seen"]]),
        attention("had", item, [items[i] for i in cells["had"]]),
        items[cells["left"][-1]] if cells["left"] else nothing,
        sum(words, nothing) / max(1, len(words)),
        attention("streets", city, [projection @ table("streets")[i] for i in cells["streets"]]),
    ]


def plain_logits(weights, dense, rows):
    """One row after the other, in float64."""
    logits = []
    for numbers, cells in zip(dense.double(), rows, strict=True):
        vector = numbers
        for layer in (0, 1):
            name = f"dense_arch.model._mlp.{layer}._linear"
            vector = torch.relu(weights[f"{name}.weight"] @ vector + weights[f"{name}.bias"])
        vectors = [vector, *plain_vectors(weights, cells)]
        pairs = [vectors[i] @ vectors[j] for i in range(len(vectors)) for j in range(i + 1, len(vectors))]
        name = "over_arch.model.0._mlp.0._linear"
        hidden = torch.cat([vector, torch.stack(pairs)])
        hidden = torch.relu(weights[f"{name}.weight"] @ hidden + weights[f"{name}.bias"])
        logits.append(weights["over_arch.model.1.weight"] @ hidden + weights["over_arch.model.1.bias"])
    return torch.cat(logits)


def cells_of(frame, dataset):
    cells = {name: frame[name].to_list() for name in dataset.sparse_names}
    lists = {name: [cell if isinstance(cell, list) else [cell] for cell in column] for name, column in cells.items()}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]


def test_a_step_of_all_poolings_is_that_of_plain_torch_in_float64(run, dataset):
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits["train"].files]).slice(4 * 64, 64)
    rows = EncodedRows.from_frame(frame, dataset.schema)
    weights, after = weights_after(run, 4), weights_after(run, 5)
    logits_B = plain_logits(weights, torch.from_numpy(rows.dense), cells_of(frame, dataset))
    labels = torch.tensor(frame["click"].to_list(), dtype=torch.float64)
    binary_cross_entropy_with_logits(logits_B, labels).backward()
    assert "sparse_arch.poolings.t_had.positions" in weights
    assert not any("t_seen.weight" in name for name in weights)
    for name, weight in weights.items():
        assert weight.grad.abs().max() > 1e-7, name
        rate = 20.0 if "embedding_bags" in name else 0.5
        torch.testing.assert_close(after[name], weight - rate * weight.grad, atol=1e-6, rtol=0, msg=name)


def test_all_ways_to_predict_agree_with_the_checkpoint(serve, bundle, run, dataset, log, tmp_path):
    assert BundleManifest.read(bundle).format_version == 10
    assert_no_skew(serve, bundle, run, dataset, log, tmp_path)


def test_inspect_shows_the_table_of_a_sequence_once(bundle, capsys):
    show_bundle(bundle, as_json=False)
    rows = {line.split()[0]: line for line in capsys.readouterr().err.splitlines() if line.strip()}
    assert (" and " in rows["words"], " and " in rows["streets"]) == (True, False)


def train_sharded(dataset, folder):
    """What each of two processes does: whole tables, and tables that are cut by rows and by columns."""
    for kind in ("table_wise", "row_wise", "column_wise"):
        rule = {"sharding.constraints": f"*={kind}"}
        train(load_config("criteo-small", SETTINGS | rule), dataset, folder / kind, progress=False)


def test_two_processes_train_the_same_weights_under_any_plan(run, dataset, tmp_path):
    launch(train_sharded, dataset, tmp_path, processes=Processes(2))
    one = weights_after(run, STEPS)
    for kind in ("table_wise", "row_wise", "column_wise"):
        two = weights_after(tmp_path / kind, STEPS)
        assert one.keys() == two.keys()
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, atol=1e-5, rtol=0, msg=f"{kind} {key}")


def test_bfloat16_learns_and_predicts_about_the_same(run, bundle, dataset, tmp_path):
    settings = SETTINGS | {"train.precision": "bfloat16", "train.max_steps": "2"}
    train(load_config("criteo-small", settings), dataset, tmp_path, progress=False)
    rounded, exact = weights_after(tmp_path, 2), weights_after(run, 2)
    for name, weight in exact.items():
        assert (rounded[name] - weight).norm() < 0.02 * weight.norm() + 1e-3, name
    rows = EncodedRows.from_frame(next(rows_of_split(dataset, "test")), dataset.schema)
    served, expected = (
        ServedModel(Bundle.open(bundle), precision).predict(rows) for precision in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(served, expected, atol=0.02)


def test_a_delta_of_rounded_tables_predicts_as_the_rounded_checkpoint(run, dataset, tmp_path):
    paths = {}
    for step in (2, STEPS):
        options = ExportOptions(checkpoint=str(step), precision="int8", name="shop", max_logloss_increase=9.0)
        paths[step] = export(run, tmp_path / f"{step}", options=options, progress=False).bundle.path
    (tmp_path / "delta").mkdir()
    write_delta(paths[2], paths[STEPS], tmp_path / "delta")
    patched = PatchedBundle(Bundle.open(paths[2]), Delta.open(tmp_path / "delta"))
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits["test"].files])
    rows = EncodedRows.from_frame(frame, dataset.schema)
    whole, again = (ServedModel(bundle, "float32").logits(rows) for bundle in (Bundle.open(paths[STEPS]), patched))
    assert np.array_equal(whole, again)
    checkpoint = CheckpointReader(checkpoint_path(run / "checkpoints", STEPS))
    rounded = CheckpointModel(checkpoint, Run.open(run).shape(dataset)).logits(rows, ["int8"] * len(NAMES[2:]))
    np.testing.assert_allclose(whole, rounded, rtol=0, atol=1e-6)
    onnxruntime, graph, bundle = pytest.importorskip("onnxruntime"), tmp_path / "model.onnx", Bundle.open(paths[STEPS])
    write_onnx(bundle, graph)
    probabilities = onnxruntime.InferenceSession(str(graph)).run(None, onnx_inputs(bundle, rows))[0][:, 0]
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-whole)), rtol=0, atol=1e-6)


def test_the_keys_of_a_sequence_are_one_view_where_they_lie_side_by_side():
    one, (first, second) = FeatureTable.whole("item", 9, 3), [FeatureTable.whole(f"seen@{k}", 9, 2) for k in (0, 1)]
    groups, rows = [[one], [first, second]], {"item": torch.rand(4, 3), "seen@0": torch.rand(4, 2)}
    rows["seen@1"] = torch.rand(4, 2)
    for order in (["item", "seen@0", "seen@1"], ["seen@0", "seen@1", "item"], ["seen@1", "item", "seen@0"]):
        dims = [rows[key].shape[1] for key in order]
        embeddings = KeyedTensor(order, dims, torch.cat([rows[key] for key in order], dim=1))
        item, seen = embeddings_of_groups(embeddings, groups)
        assert torch.equal(item, rows["item"])
        assert torch.equal(seen, torch.cat([rows["seen@0"], rows["seen@1"]], dim=1))
        assert (seen._base is None) == (order[0] == "seen@1")


ITEM, LIST = Feature("item", 9), Feature("seen", 9, is_multi_valued=True, max_values=4, table="item")
ATTENTION = {"pooling": "attention", "target": "item"}


@pytest.mark.parametrize("kind", ["din", "dot"])
def test_the_products_of_attention_are_those_that_are_computed(kind):
    model = ModelConfig(embedding_dim=DIM, features={"seen": FeatureConfig(**ATTENTION, attention=kind)})
    shape = ModelShape(model, 3, 2, known_features=(ITEM, LIST))
    alone = replace(shape, config=model.with_features({}))
    counted = sum(product.multiply_adds for product in shape.products[len(alone.products) :])
    pool = pooling_of(pooled_features(shape.tables)["seen"])
    with FlopCounterMode(display=False) as found:
        pool(torch.rand(NUM_ROWS, 4, DIM), torch.full((NUM_ROWS,), 2), torch.rand(NUM_ROWS, DIM))
    assert found.get_total_flops() == 2 * NUM_ROWS * counted
    (table,) = tables_of_model(shape.tables)
    assert (table.name, table.pooling_factor) == ("t_item", 5)  # the item, and four positions


@pytest.mark.parametrize(
    ("features", "words"),
    [
        ({"seen": {"target": "item"}}, "seen.target: only pooling = attention reads it"),
        ({"seen": {"pooling": "attention"}}, "seen.target: pooling = attention needs it"),
        ({"item": {"pooling": "mean"}}, "item.pooling: item has one value a row"),
        ({"seen": {**ATTENTION, "target": "itme"}}, "itme is no sparse feature of one value a row; did you mean item?"),
        ({"seen": {**ATTENTION, "target": "words"}}, "words is no sparse feature of one value a row"),
        ({"words": ATTENTION}, "words.pooling: attention needs max_values of words in the schema"),
        ({"item": {"quotient_remainder": "add"}, "seen": ATTENTION}, "does not go with quotient_remainder of item"),
        ({"seen": {"pooling": "last", "embedding_dim": 4}}, "shares the table of item"),
    ],
)
def test_what_cannot_be_pooled_is_refused(features, words):
    model = ModelConfig(features={name: FeatureConfig(**given) for name, given in features.items()})
    problems = [*model.feature_problems()]
    try:
        check_features(model, (ITEM, LIST, Feature("words", 5, is_multi_valued=True)))
    except ConfigError as error:
        problems.append(str(error))
    assert any(words in problem for problem in problems), problems


def test_a_config_that_pools_by_sum_is_written_as_before():
    assert FeatureConfig(embedding_dim=4).model_dump().keys() == {
        "embedding_dim",
        "quotient_remainder",
        "num_collisions",
    }
    assert FeatureConfig(pooling="last").model_dump().keys() >= {"pooling"}
    written = FeatureConfig(**ATTENTION).model_dump()
    assert FeatureConfig(**written) == FeatureConfig(**ATTENTION)
