"""Bundles predict what their run does, with tables at lower precision nearly so: how far, and by which kernels."""

import dataclasses

import fbgemm_gpu.split_table_batched_embeddings_ops_inference as inference
import numpy as np
import polars as pl
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import SparseType
from sklearn.metrics import log_loss

from helpers.predicted import evaluated
from helpers.raw_logs import real_log
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.check import logloss_increase, tolerance
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.bundle.write import dequantize_rows, quantize_rows
from torchdlrm.config import load_config
from torchdlrm.exporting.export import export
from torchdlrm.exporting.options import ExportOptions
from torchdlrm.exporting.sensitivity import choose
from torchdlrm.features.schema_file import load_schema
from torchdlrm.preprocessing.preprocess import preprocess
from torchdlrm.training.job import train

PRECISIONS = ["float32", "float16", "int8", "int4"]


@pytest.fixture(scope="module")
def bundles(small_run, small_dataset, small_bundle, tmp_path_factory):
    """A bundle of every precision."""
    folder = tmp_path_factory.mktemp("bundles")
    made = {"float32": Bundle.open(small_bundle)}
    for precision in PRECISIONS[1:]:
        options = ExportOptions(name="small", precision=precision)
        made[precision] = export(small_run, folder / precision, options=options, dataset=small_dataset).bundle
    options = ExportOptions(name="small", precision="int8", dense_precision="bfloat16")
    made["bfloat16"] = export(small_run, folder / "bfloat16", options=options, dataset=small_dataset).bundle
    return made


@pytest.fixture(scope="module")
def everything(small_dataset):
    """All 5,000 rows: labels and encoded rows."""
    files = [file.path for split in small_dataset.splits.values() for file in split.files]
    frame = pl.concat([pl.read_parquet(path) for path in files])
    return frame["label"].to_numpy(), EncodedRows.from_frame(frame, small_dataset.schema)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dim", [4, 16, 36, 128])
def test_fbgemm_reads_rows_as_they_are_described(precision, dim, seed):
    torch.manual_seed(seed)
    table = torch.randn(50, dim) * torch.rand(50, 1)
    rows = quantize_rows(table, precision)
    assert rows.shape == (50, TABLE_PRECISIONS[precision].row_bytes(dim))
    kind = {"float32": SparseType.FP32, "float16": SparseType.FP16, "int8": SparseType.INT8, "int4": SparseType.INT4}
    lookup = inference.IntNBitTableBatchedEmbeddingBagsCodegen(
        [("t", 50, dim, kind[precision], inference.EmbeddingLocation.HOST)], device="cpu", output_dtype=SparseType.FP32
    )
    lookup.initialize_weights()
    lookup.weights_host[: rows.numel()] = rows.flatten()  # it is as long as whole cache lines
    ids = torch.randint(50, (200,), dtype=torch.int32)
    looked_up = lookup(ids, torch.arange(201, dtype=torch.int32))
    torch.testing.assert_close(looked_up, dequantize_rows(rows, precision, dim)[ids], rtol=1e-6, atol=1e-6)
    # Half a step of the grid, and the rounding of scale and bias to float16.
    span = (table.max(dim=1).values - table.min(dim=1).values)[:, None]
    steps = {"float32": 0.0, "float16": 0.0, "int8": 1 / 255, "int4": 1 / 15}[precision]
    bound = span * steps / 2 + table.abs().max() * (0 if precision == "float32" else 2**-9)
    assert ((dequantize_rows(rows, precision, dim) - table).abs() <= bound).all()


@pytest.mark.parametrize(("precision", "bound"), [("float16", 1e-3), ("int8", 5e-3), ("int4", 0.1), ("bfloat16", 2e-2)])
def test_predictions_stay_within_what_is_stated(bundles, everything, precision, bound):
    _, rows = everything
    expected, got = (ServedModel(bundles[name]).predict(rows) for name in ("float32", precision))
    difference = np.abs(expected - got).max()
    assert 0 < difference <= bound
    manifest = bundles[precision].manifest
    allowed = tolerance([r.precision for r in manifest.sparse.values()], manifest.dense_precision)
    assert bound <= allowed.difference
    assert manifest.check.largest_difference <= allowed.difference


def assert_bfloat16_rounds_no_logit(bundle, rows):
    """Rows stay apart, and in each tenth of the rows half of the probabilities move by less than 0.5 %."""
    exact, served = (ServedModel(bundle, precision).predict(rows) for precision in ("float32", "bfloat16"))
    assert not np.array_equal(exact, served)
    assert len(np.unique(served)) >= 0.99 * len(np.unique(exact)) >= 0.9 * len(exact)
    relative = np.abs(served.astype(np.float64) / exact - 1)[np.argsort(exact)]
    for tenth in np.array_split(relative, 10):
        assert np.median(tenth) < 0.005
        assert tenth.max() < 0.05


def test_bfloat16_rounds_no_logit_of_the_dlrm(bundles, everything):
    assert_bfloat16_rounds_no_logit(bundles["bfloat16"], everything[1])


def test_bfloat16_rounds_no_logit_of_other_interactions(interaction_run, small_dataset, everything, tmp_path):
    options = ExportOptions(precision="int8", dense_precision="bfloat16")
    exported = export(interaction_run, tmp_path / "bundle", options=options, dataset=small_dataset)
    assert_bfloat16_rounds_no_logit(exported.bundle, everything[1])


@pytest.mark.slow
def test_an_int8_bundle_of_real_rows_tells_as_many_apart_as_a_float32_one(tmp_path):
    dataset = preprocess(
        [real_log("criteo_kaggle_sample.tsv.gz")], tmp_path / "dataset", load_schema("criteo-bucketed")
    )
    train(load_config("criteo-small", {"logging.tensorboard": "false"}), dataset, tmp_path / "run")
    float32, int8 = (
        export(tmp_path / "run", tmp_path / precision, options=ExportOptions(precision=precision)).bundle
        for precision in ("float32", "int8")
    )
    assert (float32.manifest.dense_precision, int8.manifest.dense_precision) == ("float32", "bfloat16")
    files = [file.path for split in dataset.splits.values() for file in split.files]
    rows = EncodedRows.from_frame(pl.concat([pl.read_parquet(path) for path in files]), dataset.schema)
    assert_bfloat16_rounds_no_logit(int8, rows)
    distinct = [len(np.unique(ServedModel(bundle).predict(rows))) for bundle in (float32, int8)]
    assert distinct[1] >= 0.99 * distinct[0]


def test_int8_raises_the_logloss_by_less_than_0_0002(bundles, everything):
    labels, rows = everything
    float32, int8, bfloat16 = (
        log_loss(labels, ServedModel(bundles[name]).predict(rows).astype(np.float64))
        for name in ("float32", "int8", "bfloat16")
    )
    assert float32 < 0.69  # it has learnt something
    assert int8 - float32 < 0.0002
    assert bfloat16 - float32 < 0.0002


def test_a_batch_of_any_size_gives_each_row_the_same(bundles, everything):
    _, rows = everything
    for name in ("float32", "bfloat16"):
        model = ServedModel(bundles[name])
        whole = model.predict(rows)
        for start, stop in ((0, 1), (7, 9), (100, 1123), (4000, 5000)):
            part = model.predict(rows.part(start, stop))
            np.testing.assert_allclose(part, whole[start:stop], rtol=0, atol=1e-6 if name == "float32" else 5e-3)
        assert model.predict(rows.part(0, 0)).shape == (0,)
        wide = dataclasses.replace(rows, sparse=rows.sparse.astype(np.int64))
        assert np.array_equal(model.predict(wide), whole)


def test_auto_takes_the_cheapest_bytes_first_and_stays_within_the_allowance():
    sizes = {name: {"float32": 400, "float16": 200, "int8": 104, "int4": 54} for name in "abc"}
    costs = {
        "a": {"float32": 0, "float16": 0.0, "int8": 1e-6, "int4": 2e-6},
        "b": {"float32": 0, "float16": 1e-5, "int8": 2e-5, "int4": 9e-4},
        "c": {"float32": 0, "float16": 1e-3, "int8": 1e-2, "int4": 1e-1},
    }
    assert choose(costs, sizes, 0.0) == {"a": "float16", "b": "float32", "c": "float32"}
    assert choose(costs, sizes, 1e-4) == {"a": "int4", "b": "int8", "c": "float32"}
    assert choose(costs, sizes, 1.0) == {"a": "int4", "b": "int4", "c": "int4"}
    # A table that is next to nothing beside the others stays as it is: its bytes are not worth any logloss.
    sizes["b"] = {precision: size // 100_000 for precision, size in sizes["b"].items()}
    assert choose(costs, sizes, 1.0) == {"a": "int4", "b": "float32", "c": "int4"}


def test_auto_keeps_the_logloss_where_it_was_told_to(small_run, small_dataset, everything, bundles, tmp_path):
    labels, rows = everything
    sizes = []
    for allowed in (0.0, 1e-6, 1e-2):
        options = ExportOptions(name="small", precision="auto", max_logloss_increase=allowed)
        done = export(small_run, tmp_path / str(allowed), options=options, dataset=small_dataset)
        assert done.search.expected_increase <= allowed
        assert {n: r.precision for n, r in done.bundle.manifest.sparse.items()} == done.search.precisions
        before, after = (ServedModel(bundle).logits(rows) for bundle in (bundles["float32"], done.bundle))
        assert logloss_increase(labels, before, after).mean <= allowed + 2e-4
        sizes.append(sum(table.size_bytes[table.chosen] for table in done.search.tables.values()))
    assert sizes[0] > sizes[1] > sizes[2]


def encoded_rows(dataset, split):
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits[split].files])
    return EncodedRows.from_frame(frame, dataset.schema)


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_float32_bundle_equals_what_evaluate_computes(small_run, small_dataset, small_bundle, split):
    expected = evaluated(small_run, small_dataset, split)
    got = ServedModel(Bundle.open(small_bundle)).predict(encoded_rows(small_dataset, split))
    assert expected.std() > 0.05
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
