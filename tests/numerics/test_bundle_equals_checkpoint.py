"""A bundle predicts what the run predicts that it was made of."""

import numpy as np
import polars as pl
import pytest

from helpers.predicted import evaluated
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.bundle.served_model import ServedModel


def encoded_rows(dataset, split):
    frame = pl.concat([pl.read_parquet(file.path) for file in dataset.splits[split].files])
    return EncodedRows.from_frame(frame, dataset.schema)


@pytest.mark.parametrize("split", ["test", "train"])
def test_a_float32_bundle_equals_what_evaluate_computes(small_run, small_dataset, small_bundle, split):
    expected = evaluated(small_run, small_dataset, split)
    got = ServedModel(Bundle.open(small_bundle)).predict(encoded_rows(small_dataset, split))
    assert expected.std() > 0.05
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
