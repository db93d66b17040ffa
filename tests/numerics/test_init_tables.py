"""Tables that begin with vectors of a file: each value's by the vocabulary, on any number of processes."""

import numpy as np
import polars as pl
import pytest
import torch

from helpers.days import SCHEMA, config, write_log
from torchdlrm import PreprocessOptions, preprocess, train
from torchdlrm.errors import ConfigError
from torchdlrm.exporting.export import open_checkpoint
from torchdlrm.files import sha256_of
from torchdlrm.model import table_weight
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.run import Run

# So that nothing moves before it is looked at.
STILL = {"train.max_steps": "2", "train.freeze": "tables"}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("init-tables")
    log = write_log(folder / "log.tsv", 1, 0, 60, ("Ulm", "Bonn", "Jena"))
    return preprocess(log, folder / "dataset", SCHEMA, PreprocessOptions(min_count=1))


def vectors_of(path, dim, values=range(10, 80), seed=0):
    """A file with vectors of these items, some of which are in no row, by their hexadecimal digits."""
    vectors = np.random.default_rng(seed).normal(size=(len(values), dim)) * np.linspace(2, 0.1, dim)
    pl.DataFrame({"value": [f"{value:x}" for value in values], "vector": vectors}).write_parquet(path)
    return vectors.astype(np.float32)


def table_of(run, name="item"):
    return open_checkpoint(Run.open(run), "last")[1].tensor(table_weight(name)).numpy()


def begun(dataset, run, file, **changes):
    train(config(STILL, {"train.init_tables.item": str(file)}, changes), dataset, run, progress=False)


def test_rows_of_values_in_the_file_are_its_vectors_and_others_are_drawn(dataset, tmp_path):
    file, run = tmp_path / "vectors.parquet", tmp_path / "run"
    vectors = vectors_of(file, 8)
    begun(dataset, run, file)
    train(config(STILL), dataset, tmp_path / "drawn", progress=False)
    got, drawn, vocabulary = table_of(run), table_of(tmp_path / "drawn"), dataset.vocabulary("item").table
    numbers = dict(zip(vocabulary["id"], vocabulary["value"], strict=True))  # UInt32, as the digits say
    known = {row for row, value in numbers.items() if value is not None and 10 <= value < 80}
    assert 0 < len(known) < len(got) - 1
    for row in range(len(got)):
        np.testing.assert_array_equal(got[row], vectors[numbers[row] - 10] if row in known else drawn[row])
    np.testing.assert_array_equal(table_of(run, "city"), table_of(tmp_path / "drawn", "city"))
    record = Run.open(run).environment["init_tables"]["item"]
    counts = {"known": len(known), "unknown": len(got) - 1 - len(known)}
    assert record == {"file": str(file), "sha256": sha256_of(file), **counts}
    # Resumed, the run does not need the file; and it is the one that was not interrupted.
    file.unlink()
    begun(dataset, run, file, **{"train.max_steps": "4"})
    np.testing.assert_array_equal(table_of(run), got)


def test_longer_vectors_become_principal_components_and_shorter_ones_end_with_zeros(dataset, tmp_path):
    longer = vectors_of(tmp_path / "long.parquet", 20)
    begun(dataset, tmp_path / "long", tmp_path / "long.parquet")
    centred = longer - longer.mean(0)
    _, _, axes = torch.linalg.svd(torch.from_numpy(centred).double())
    expected = centred @ axes[:8].T.numpy()
    vocabulary = dataset.vocabulary("item").table
    ids, values = vocabulary["id"].to_numpy(), vocabulary["value"].to_numpy()
    here = (values >= 10) & (values < 80)
    got = table_of(tmp_path / "long")[ids[here]]
    np.testing.assert_allclose(np.abs(got), np.abs(expected[values[here].astype(int) - 10]), atol=1e-5)
    shorter = vectors_of(tmp_path / "short.parquet", 5)
    begun(dataset, tmp_path / "short", tmp_path / "short.parquet")
    got = table_of(tmp_path / "short")[ids[here]]
    np.testing.assert_array_equal(got[:, :5], shorter[values[here].astype(int) - 10])
    assert not got[:, 5:].any()


def test_two_processes_begin_with_the_same_rows(dataset, tmp_path):
    vectors_of(tmp_path / "v.parquet", 20)
    cut = {"sharding.constraints": '["item=row_wise"]', "train.freeze": "city"}
    begun(dataset, tmp_path / "one", tmp_path / "v.parquet", **cut)
    launch(begun, dataset, tmp_path / "two", tmp_path / "v.parquet", processes=Processes(2))
    begun(dataset, tmp_path / "still", tmp_path / "v.parquet")
    np.testing.assert_allclose(table_of(tmp_path / "two"), table_of(tmp_path / "still"), atol=1e-7)
    assert np.abs(table_of(tmp_path / "one") - table_of(tmp_path / "still")).max() > 0  # and they are learnt


def test_new_values_begin_with_vectors_where_another_run_is_continued(dataset, tmp_path):
    """The rows that it has learnt are taken over; also where it began with others."""
    log = write_log(tmp_path / "later.tsv", 2, 40, 78, ("Ulm", "Bonn", "Jena"))
    options = PreprocessOptions(min_count=1, vocabulary=dataset.path, extend_vocabulary=True)
    later = preprocess(log, tmp_path / "later", SCHEMA, options)
    vectors = vectors_of(tmp_path / "v.parquet", 8)
    train(config({"train.max_steps": "2"}), dataset, tmp_path / "first", progress=False)
    continued = config(STILL, {"train.init_tables.item": str(tmp_path / "v.parquet")})
    train(continued, later, tmp_path / "then", from_run=tmp_path / "first", progress=False)
    old, new, table = table_of(tmp_path / "first"), table_of(tmp_path / "then"), later.vocabulary("item").table
    np.testing.assert_array_equal(new[: len(old)], old)
    assert len(new) > len(old)
    for row, value in table.filter(pl.col("id") >= len(old)).select("id", "value").iter_rows():
        np.testing.assert_array_equal(new[row], vectors[value - 10])


@pytest.mark.parametrize(
    ("name", "frame", "words"),
    [
        ("items", {"value": ["1"], "vector": [[1.0]]}, "items: there is no such table; .* did you mean item"),
        (
            "item",
            {"value": ["1", "2", "3"], "vector": [[1.0], [1.0, 2.0], [1.0]]},
            "'2' has not one vector of 1 finite",
        ),
        ("item", {"value": ["1"], "vector": [[float("nan")]]}, "'1' has not one vector of 1 finite"),
        ("item", {"value": ["1", "1"], "vector": [[1.0], [2.0]]}, "'1' has not one vector"),
        ("item", {"value": ["1", "01"], "vector": [[1.0], [2.0]]}, "'1' has not one vector"),
        ("item", {"value": ["1"], "vector": [[1e300]]}, "'1' has not one vector of 1 finite"),
        ("item", {"value": ["x", "y"], "vector": [[1.0], None]}, "no value of .* has an id in"),
        ("item", {"value": ["1"]}, "columns value and vector"),
    ],
)
def test_a_file_that_is_none_is_refused(dataset, tmp_path, name, frame, words):
    pl.DataFrame(frame).write_parquet(tmp_path / "v.parquet")
    with pytest.raises(ConfigError, match=words):
        train(
            config(STILL, {f"train.init_tables.{name}": str(tmp_path / "v.parquet")}),
            dataset,
            tmp_path / "run",
            progress=False,
        )
    assert not (tmp_path / "run").exists()  # so that the same command with another file begins


def test_the_option_says_what_the_key_says(dataset, dlrm, tmp_path):
    vectors_of(tmp_path / "v.parquet", 8)
    arguments = ("--dataset", dataset.path, "--run", tmp_path / "run", "--init-table", f"item={tmp_path / 'v.parquet'}")
    done = dlrm("train", "criteo-small", *arguments, "--train.max-steps", 1, "--logging.tensorboard", "false")
    assert done.returncode == 0, done.stderr
    assert "values begin with a vector of" in done.stderr
    assert Run.open(tmp_path / "run").config.train.init_tables == {"item": str(tmp_path / "v.parquet")}
