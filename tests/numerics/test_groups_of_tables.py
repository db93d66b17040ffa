"""Tables that a model class asks for besides those of the vectors: learnt, grown and served like all others."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import polars as pl
import pytest
import torch

from helpers.days import config, write_log
from torchdlrm import DLRM, ExportOptions, Feature, Loader, Table, apply_delta, export, preprocess, train
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.errors import ConfigError
from torchdlrm.exporting.checkpoint import CheckpointModel
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.options import PreprocessOptions
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.run import Run

SCHEMA = FeatureSchema(
    name="groups",
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="price", kind="float"),
        SparseColumn(name="item", kind="hex"),
        SparseColumn(name="cities", kind="string", value_separator="|"),
    ),
)
CITIES = ("Ulm|Bonn", "Bonn", "Köln|Ulm|Jena", "")
# A dimension that is no multiple of 4, and one above that of the vectors, which is no multiple of it.
WIDE, FIELDS, FIXED = 1, 20, 3


class Grouped(DLRM):
    settings = {"fixed": "cities"}  # noqa: RUF012 - as users write it

    @classmethod
    def tables(cls, features: Sequence[Feature], fixed: str) -> list[Table]:
        asked = [Table(feature.name, WIDE, "wide") for feature in features]
        asked += [Table(feature.name, FIELDS, "fields", init=0.3) for feature in features]
        return [*asked, Table(fixed, FIXED, "fixed", init=0.5, frozen=True)]

    def __init__(self, fixed, **arguments):
        super().__init__(**arguments)
        del fixed

    def forward(self, dense_features, sparse_features):
        group = self.sparse_arch.group
        wide, fields, fixed = (group(name, sparse_features) for name in ("wide", "fields", "fixed"))
        products = (fields[:, 0] * fields[:, 1]).sum(1, keepdim=True)
        return (
            super().forward(dense_features, sparse_features) + wide.sum(1) + products + fixed.sum((1, 2)).unsqueeze(1)
        )


CLASS = f"{__file__}:Grouped"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run, and one that is started from it on a longer vocabulary."""
    folder = tmp_path_factory.mktemp("groups")
    options = PreprocessOptions(min_count=1)
    first = preprocess(write_log(folder / "1.tsv", 1, 0, 60, CITIES), folder / "data-1", SCHEMA, options)
    later = PreprocessOptions(min_count=1, vocabulary=first.path, extend_vocabulary=True)
    second = preprocess(write_log(folder / "2.tsv", 2, 30, 90, (*CITIES, "Gera")), folder / "data-2", SCHEMA, later)
    train(config(), first, folder / "one", model_class=CLASS, progress=False)
    train(config(), second, folder / "two", from_run=folder / "one", model_class=CLASS, progress=False)
    return folder, first, second


def rows_of(dataset, split="test"):
    return EncodedRows.from_frame(
        pl.concat([pl.read_parquet(f.path) for f in dataset.splits[split].files]), dataset.schema
    )


def tables_of(run):
    _, checkpoint = open_checkpoint(Run.open(run), "last")
    names = [name for name in checkpoint.shapes if ".embedding_bags." in name]
    return {name.split(".")[-2]: checkpoint.tensor(name) for name in names}


def test_the_model_is_its_formula(runs):
    """The numbers of a row's values are added up: compared with rows of the checkpoint, read by torch."""
    folder, dataset, _ = runs
    tables, rows = tables_of(folder / "one"), rows_of(dataset)
    assert {name: value.shape[1] for name, value in tables.items()} == {
        "t_item": 8,
        "t_cities": 8,
        "t_item@wide": 4,
        "t_cities@wide": 4,
        "t_item@fields": 20,
        "t_cities@fields": 20,
        "t_cities@fixed": 4,
    }
    _, checkpoint = open_checkpoint(Run.open(folder / "one"), "last")
    model = CheckpointModel(checkpoint, Run.open(folder / "one").shape(dataset, CLASS))
    arch = model._model.module

    def sums(name):
        ids, offsets = rows.sparse[0 if "item" in name else 1]
        return torch.stack([tables[name][ids[a:b].copy()].sum(0) for a, b in pairwise(offsets)])

    vectors = torch.stack([sums("t_item"), sums("t_cities")], dim=1)
    with torch.no_grad():
        logits = arch.over_arch(arch.inter_arch(arch.dense_arch(torch.from_numpy(rows.dense)), vectors)).squeeze(1)
    logits += sums("t_item@wide")[:, 0] + sums("t_cities@wide")[:, 0]
    logits += (sums("t_item@fields") * sums("t_cities@fields")).sum(1) + sums("t_cities@fixed")[:, :FIXED].sum(1)
    np.testing.assert_allclose(model.logits(rows), logits.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_served_and_after_a_delta_it_is_the_checkpoint(runs, tmp_path, precision):
    folder, _, dataset = runs
    options = ExportOptions(precision=precision, name="grouped")
    base = export(folder / "one", tmp_path / "base", options=options, model_class=CLASS, progress=False).bundle
    assert base.manifest.format_version == 10
    assert Table("item", FIELDS, "fields") in base.manifest.groups
    full = export(folder / "two", tmp_path / "full", options=options, model_class=CLASS, progress=False).bundle
    export(folder / "two", tmp_path / "delta", delta_to=base.path, options=options, model_class=CLASS, progress=False)
    apply_delta(base.path, tmp_path / "delta", tmp_path / "applied")
    assert (tmp_path / "applied/weights.safetensors").read_bytes() == (full.path / "weights.safetensors").read_bytes()
    rows = rows_of(dataset)
    run = Run.open(folder / "two")
    model = CheckpointModel(open_checkpoint(run, "best")[1], run.shape(dataset, CLASS))
    served = ServedModel(Bundle.open(tmp_path / "applied", model_class=CLASS), "float32")
    expected = model.logits(rows, [precision] * 2)
    np.testing.assert_allclose(served.logits(rows), expected, rtol=0, atol=2e-6)


def test_rows_grow_with_the_vocabulary_and_frozen_ones_stay(runs):
    folder, first, second = runs
    one, two = tables_of(folder / "one"), tables_of(folder / "two")
    for name, old in one.items():
        feature = "item" if "item" in name else "cities"
        assert len(old) == first.num_embeddings[feature] < second.num_embeddings[feature] == len(two[name])
    assert torch.equal(one["t_cities@fixed"], two["t_cities@fixed"][: len(one["t_cities@fixed"])])
    assert not torch.equal(one["t_item@wide"], two["t_item@wide"][: len(one["t_item@wide"])])
    assert one["t_cities@fixed"].abs().max() <= 0.5
    assert two["t_cities@fixed"].abs().min() > 0


def train_here(dataset, run):
    train(config(), dataset, run, model_class=CLASS, progress=False)


def test_two_processes_train_the_same_tables(runs, tmp_path):
    folder, dataset, _ = runs
    launch(train_here, dataset, tmp_path / "both", processes=Processes(2))
    one, two = tables_of(folder / "one"), tables_of(tmp_path / "both")
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-5, rtol=0, msg=name)


def test_loader_and_shape_have_a_key_for_each(runs):
    folder, dataset, _ = runs
    shape = Run.open(folder / "one").shape(dataset, CLASS)
    keys = next(iter(Loader(dataset, "train", tables=shape.tables))).sparse_features.keys()
    assert keys == ["item", "item@wide", "item@fields", "cities", "cities@wide", "cities@fields", "cities@fixed"]


class Interaction(torch.nn.Module):
    @classmethod
    def tables(cls, features):
        return [Table(features[0].name, 1, "wide")]

    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__()
        self.output_size = num_sparse_features + embedding_dim


@pytest.mark.parametrize(
    ("model_class", "settings", "words"),
    [
        (CLASS, {"model.settings.fixed": "town"}, "there is no such feature"),
        (f"{__file__}:Interaction", {}, "subclass DLRM"),
    ],
)
def test_tables_that_cannot_be_are_refused(runs, tmp_path, model_class, settings, words):
    with pytest.raises(ConfigError, match=words):
        train(config(settings), runs[1], tmp_path / "run", model_class=model_class, progress=False)
