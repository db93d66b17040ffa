"""The predictor's own promises; tests/numerics compares its predictions with the checkpoint's."""

import numpy as np
import polars as pl
import pytest

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.errors import BundleError, RowError
from torchdlrm.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(small_bundle):
    return Predictor.open(small_bundle)


def test_a_row_is_predicted_as_it_is_among_many(predictor):
    frame, expected = predictor.bundle.sample()
    np.testing.assert_allclose(predictor.predict(frame).probabilities, expected, rtol=0, atol=1e-6)
    alone = [predictor.predict(frame[i]).probabilities[0] for i in range(20)]
    np.testing.assert_allclose(alone, expected[:20], rtol=0, atol=1e-6)


def test_no_rows_give_no_predictions(predictor):
    assert predictor.predict(predictor.parse_rows([])).probabilities.shape == (0,)


def test_unknown_values_are_counted_and_missing_ones_are_not(predictor):
    rows = [{"cat_0": "ffffffff"}, {"cat_0": "ffffffff", "cat_1": "deadbeef"}, {}]
    found = predictor.predict(predictor.parse_rows(rows))
    assert {name: count for name, count in found.num_unknown.items() if count} == {"cat_0": 2, "cat_1": 1}
    assert len(found.num_unknown) == 26
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logits)), found.probabilities, atol=1e-6)


def test_a_column_of_another_type_is_refused(predictor):
    frame = predictor.parse_rows([{"cat_3": "1"}])
    with pytest.raises(RowError, match="column 'cat_3': expected a column of UInt32, not String"):
        predictor.predict(frame.with_columns(pl.col("cat_3").cast(pl.String)))
    with pytest.raises(RowError, match="column 'int_1': expected a column of Int64 or Float64, found none"):
        predictor.predict(frame.drop("int_1"))
    as_float = frame.with_columns(pl.col("int_1").cast(pl.Float64))
    assert predictor.predict(as_float).probabilities == predictor.predict(frame).probabilities


def test_a_bundle_that_does_not_predict_its_sample_is_found(small_bundle, monkeypatch):
    predictor = Predictor.open(small_bundle)
    predictor.check_sample()
    frame, expected = predictor.bundle.sample()
    monkeypatch.setattr(Bundle, "sample", lambda _: (frame, expected + np.float32(0.01)))
    with pytest.raises(BundleError, match=r"on its own sample of 256 rows a prediction is off by 0\.01, and 1e-05"):
        predictor.check_sample()
