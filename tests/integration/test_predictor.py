"""The predictor's own promises; tests/numerics compares its predictions with the checkpoint's."""

import numpy as np
import pandas as pd
import polars as pl
import pytest

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.errors import BundleError, RowError
from torchdlrm.features.cells import written_cells
from torchdlrm.prediction.json_rows import as_json_rows
from torchdlrm.prediction.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(small_bundle):
    return Predictor.open(small_bundle)


def test_a_row_is_predicted_as_it_is_among_many(predictor):
    frame, expected = predictor.bundle.sample()
    np.testing.assert_allclose(predictor.predict(frame), expected, rtol=0, atol=1e-6)
    alone = [predictor.predict(frame[i])[0] for i in range(20)]
    np.testing.assert_allclose(alone, expected[:20], rtol=0, atol=1e-6)


def test_no_rows_give_no_predictions(predictor):
    assert predictor.predict(predictor.parse_rows([])).shape == (0,)


def test_unknown_values_are_counted_and_missing_ones_are_not(predictor):
    rows = [{"cat_0": "ffffffff"}, {"cat_0": "ffffffff", "cat_1": "deadbeef"}, {}]
    found = predictor.predict_encoded(predictor.encode_rows(rows))
    assert {name: count for name, count in found.num_unknown.items() if count} == {"cat_0": 2, "cat_1": 1}
    assert len(found.num_unknown) == 26
    np.testing.assert_allclose(1 / (1 + np.exp(-found.logits)), found.probabilities, atol=1e-6)


def test_a_column_of_another_type_is_refused(predictor):
    frame = predictor.parse_rows([{"cat_3": "1"}])
    with pytest.raises(RowError, match="column 'cat_3': expected a column of UInt32, not String"):
        predictor.encode(frame.with_columns(pl.col("cat_3").cast(pl.String)))
    with pytest.raises(RowError, match="column 'int_1': expected a column of Int64 or Float64, found none"):
        predictor.encode(frame.drop("int_1"))
    as_float = frame.with_columns(pl.col("int_1").cast(pl.Float64))
    assert predictor.predict(as_float) == predictor.predict(frame)


@pytest.mark.parametrize("one", [dict, pd.Series])
def test_a_single_row_is_refused_with_the_list_that_it_needs(predictor, one):
    row = {"int_0": 1, "cat_0": "68fd1e64"}
    listed = r"predict\(\[row\]\)" if one is dict else r"predict\(\[row\.to_dict\(\)\]\)"
    with pytest.raises(RowError, match=f"this is one row, a {one.__name__}; put it in a list, as in {listed}"):
        predictor.predict(one(row))
    assert predictor.predict([row]) == predictor.predict({name: [cell] for name, cell in row.items()})


def test_a_predictor_says_what_it_is(predictor):
    expected = f"<Predictor of 'small', version {predictor.version}: 'int_0, int_1, "
    assert repr(predictor).startswith(expected), repr(predictor)
    assert repr(predictor).endswith(" -> probability>")


def test_a_bundle_that_does_not_predict_its_sample_is_found(small_bundle, monkeypatch):
    predictor = Predictor.open(small_bundle)
    predictor.check_sample()
    frame, expected = predictor.bundle.sample()
    monkeypatch.setattr(Bundle, "sample", lambda _: (frame, expected + np.float32(0.01)))
    with pytest.raises(BundleError, match=r"on its own sample of 256 rows a prediction is off by 0\.01, and 1e-05"):
        predictor.check_sample()


@pytest.fixture(scope="module")
def raw(predictor):
    """Rows as a log has them, hex values as digits, and what they are predicted to be."""
    frame, expected = predictor.bundle.sample()
    features = predictor.schema.features
    written = pl.DataFrame([written_cells(frame[column.name], column) for column in features])
    assert written.null_count().sum_horizontal()[0] > 0
    return written, expected


@pytest.mark.parametrize("held_as", ["polars", "pandas", "pandas without Arrow", "arrow", "lists", "arrays", "rows"])
def test_rows_are_predicted_however_they_are_held(predictor, raw, held_as):
    written, expected = raw
    rows = {
        "polars": lambda: written,
        "pandas": written.to_pandas,  # integers with missing ones are floats there
        "pandas without Arrow": lambda: pd.DataFrame(written.to_dicts()),
        "arrow": written.to_arrow,
        "lists": lambda: written.to_dict(as_series=False),
        "arrays": lambda: {column.name: np.array(column.to_list(), object) for column in written},
        "rows": written.to_dicts,
    }[held_as]()
    found = predictor.predict(rows)
    assert (found.dtype, found.shape) == (np.float32, expected.shape)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [pl.Int32, pl.Float32, pl.Float64, pl.String])
def test_numbers_of_a_frame_may_be_of_any_type(predictor, raw, dtype):
    small = raw[0].with_columns(pl.col(pl.Int64).clip(-1_000, 1_000))
    cast = small.with_columns(pl.col(pl.Int64).cast(dtype))
    np.testing.assert_array_equal(predictor.predict(cast), predictor.predict(small))


def test_other_columns_of_a_frame_are_not_read(predictor, raw):
    written, expected = raw
    more = written.with_columns(pl.lit("anything").alias("note"), pl.lit(7).alias("label"))
    np.testing.assert_allclose(predictor.predict(more.to_pandas()), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda frame: frame.drop("cat_3"), "column 'cat_3': the frame has no such column; it has int_0, int_1, "),
        (
            lambda frame: frame.with_columns(cat_3=pl.lit("red")),
            "row 0, column 'cat_3': the cell is not 1 to 8 hexadecimal digits: 'red'",
        ),
        (
            lambda frame: frame.with_columns(int_1=pl.when(pl.int_range(pl.len()) == 2).then(0.5).otherwise(1.0)),
            "row 2, column 'int_1': the cell is not an integer of 64 bits: '0.5'",
        ),
        (
            lambda frame: frame.with_columns(int_1=pl.lit([1])),
            r"column 'int_1': List\(Int64\) is no type of its cells; expected an integer",
        ),
        (lambda frame: {**frame.to_dict(as_series=False), "cat_3": []}, "the lists differ in length: int_0 has 256, "),
        (
            lambda frame: frame.lazy(),
            "rows are a Polars or pandas frame, a dict of lists or a list of dicts, and not a",
        ),
        (lambda _: "int_0", "rows are a Polars or pandas frame, a dict of lists or a list of dicts, and not a str"),
        (lambda _: [{"colour": 1}], "row 0, column 'colour': the model has no such column"),
        (lambda frame: frame.to_pandas().assign(cat_3=[{}, 3, *[None] * 254]), "the frame cannot be read: "),
    ],
)
def test_rows_that_cannot_be_read_are_told(predictor, raw, wrong, message):
    with pytest.raises(RowError, match=message):
        predictor.predict(wrong(raw[0]))


def test_rows_and_columns_in_one_batch_keep_their_places(predictor):
    served = predictor
    frame = (
        served.bundle.sample()[0]
        .head(30)
        .select(column.name for column in (*served.schema.dense, *served.schema.sparse))
    )
    rows = as_json_rows(frame, served.schema)
    requests = [rows[:2], frame[10:13], rows[5:9], rows[20:21], frame[:1], frame[25:30]]
    places = [0, 1, 10, 11, 12, 5, 6, 7, 8, 20, 0, *range(25, 30)]
    encoded, alone = served.encode_requests(requests), served.encode_requests([frame])
    assert np.array_equal(encoded.dense, alone.dense[places])
    assert np.array_equal(encoded.sparse, alone.sparse[:, places])
    assert served.parse_requests(requests).equals(frame[places])
