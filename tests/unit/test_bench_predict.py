"""What `dlrm bench predict` times from text is what `dlrm predict` does: values are looked up, and most are found."""

import itertools
from typing import get_args

import polars as pl
import pytest

from torchdlrm.bench.predict import SERVED, from_log_step
from torchdlrm.bench.random_bundle import write_random_bundle, write_random_log
from torchdlrm.bundle import DensePrecision, TablePrecision
from torchdlrm.bundle.precision import TABLE_PRECISIONS
from torchdlrm.training.processes.process_group import join_process_group

SIZES = {"cat_0": 50, "cat_1": 2_000, "cat_2": 3}
NUM_ROWS = 1_000


def test_every_precision_is_measured_and_shown():
    """The two lists that people read are made of the types, so that a new precision is in both."""
    assert set(SERVED) == set(itertools.product(get_args(TablePrecision), get_args(DensePrecision)))
    assert get_args(TablePrecision) == tuple(TABLE_PRECISIONS)


def test_the_log_is_predicted_from_raw_rows_whose_values_the_bundle_knows(tmp_path):
    bundle = write_random_bundle(tmp_path / "bundle", SIZES, "int8", for_raw_rows=True)
    log = write_random_log(tmp_path / "log.tsv", SIZES, NUM_ROWS)
    with join_process_group() as ranks:
        summary = from_log_step(ranks, bundle, log)()
    assert (summary.rows, summary.bad_rows) == (NUM_ROWS, 0)
    for rate in summary.unknown_rate.values():  # those of the empty cells alone
        assert rate == pytest.approx(0.1, abs=0.04)
    assert summary.metrics is not None
    scores = pl.read_parquet(tmp_path / "scores.parquet")["prediction"]
    assert len(scores) == NUM_ROWS
    assert scores.n_unique() > 20  # in bfloat16, and of weights that have learnt nothing
