"""Dense transforms against the same formula in plain Python."""

import math
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from torchdlrm.features.encode import encode_dense
from torchdlrm.features.transforms import TRANSFORMS, FittedDense, Log1p, LogPlus3, Moments, Standardize, Unchanged

INTEGERS = [None, 0, 1, 2, -1, -2, -3, -(2**63), 2**63 - 1, 12345]
FORMULAS = {
    "log_plus_3": lambda x: math.log(max(x or 0, -2) + 3),
    "log1p": lambda x: math.log(max(x or 0, 0) + 1),
    "none": lambda x: x or 0,
}


def apply(fitted, values, dtype):
    return encode_dense(pl.DataFrame({"x": pl.Series(values, dtype=dtype)}), {"x": fitted})["x"]


@pytest.mark.parametrize("transform", FORMULAS)
@pytest.mark.parametrize("dtype", [pl.Int64, pl.Float64])
def test_dense_values_equal_the_formula_rounded_once_to_float32(transform, dtype):
    fitted = TRANSFORMS[transform].fit(None)
    found = apply(fitted, INTEGERS, dtype)
    assert found.dtype == pl.Float32
    assert found.to_list() == [float(np.float32(FORMULAS[transform](value))) for value in INTEGERS]


def test_standardised_missing_values_become_the_mean():
    moments = Moments()
    moments.add(pl.Series([1, None, 3, 8], dtype=pl.Int64))
    found = apply(Standardize.fit(moments), [1, None, 3, 8], pl.Int64)
    mean, deviation = np.mean([1, 3, 8]), np.std([1, 3, 8])
    expected = [(value - mean) / deviation for value in (1, mean, 3, 8)]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("values", [[], [None, None], [5, 5, 5]])
def test_a_column_without_spread_is_standardised_to_zeros(values):
    moments = Moments()
    moments.add(pl.Series(values, dtype=pl.Int64))
    found = apply(Standardize.fit(moments), values, pl.Int64).to_list()
    assert found == [0.0] * len(values)


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-1e120, 1e120) | st.integers(-(2**53), 2**53).map(float), max_size=40),
    cut=st.integers(0, 40),
)
def test_moments_are_exact_and_so_do_not_depend_on_how_rows_are_cut(values, cut):
    whole, parts = Moments(), Moments()
    whole.add(pl.Series(values, dtype=pl.Float64))
    for part in (values[cut:], values[:cut]):
        parts.add(pl.Series(part, dtype=pl.Float64))
    assert parts == whole
    assert whole.total == sum(map(Fraction, values))
    assert whole.total_of_squares == sum(Fraction(value * value) for value in values)


FITTED = [LogPlus3(), Log1p(), Standardize(missing=0.1, shift=-0.1, deviation=1 / 3), Unchanged()]


@pytest.mark.parametrize("fitted", FITTED, ids=lambda fitted: fitted.transform)
def test_fitted_transforms_survive_json(fitted):
    assert TypeAdapter(FittedDense).validate_json(fitted.model_dump_json()) == fitted
    assert list(fitted.model_dump()) == ["transform", "missing", "minimum", "shift", "log", "deviation"]


@pytest.mark.parametrize("fitted", FITTED, ids=lambda fitted: fitted.transform)
@given(x=st.integers(0, 10**6))
def test_the_inverse_of_what_a_transform_gives_is_what_it_was_given(fitted, x):
    y = fitted.of_numbers(np.array([float(x)])).astype(np.float64)
    np.testing.assert_allclose(fitted.inverse(y), [x], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transform", FORMULAS)
def test_what_no_row_lacked_is_replaced_by_what_becomes_the_mean(transform):
    values = [0, 5, 40, 1_000]
    moments = Moments()
    moments.add(pl.Series(values) if transform == "standardize" else apply(TRANSFORMS[transform](), values, pl.Int64))
    fitted = TRANSFORMS[transform].fit(moments)
    assert fitted.never_missing
    encoded = apply(fitted, [*values, None], pl.Int64).to_list()
    assert encoded[-1] == pytest.approx(np.mean(encoded[:-1]), rel=1e-6, abs=1e-7)
    assert TypeAdapter(FittedDense).validate_json(fitted.model_dump_json()) == fitted
    moments.add(pl.Series([None], dtype=pl.Int64))
    lacked = TRANSFORMS[transform].fit(moments)
    assert not lacked.never_missing
    if transform != "standardize":
        assert lacked == TRANSFORMS[transform]()
    # A model goes on with rows of the other where that does not change what a missing value means to it.
    assert lacked.continues(fitted)
    assert fitted.continues(lacked) is (transform == "standardize")
    assert not fitted.continues(Unchanged(shift=1.0))


@pytest.mark.parametrize(
    "wrong",
    [
        {"transform": "log1p", "minimum": -1.0},
        {"transform": "log1p", "deviation": 2.0},
        {"transform": "log_plus_3", "log": False},
        {"transform": "none", "log": True},
        {"transform": "square"},
    ],
)
def test_constants_that_a_transform_cannot_have_are_refused(wrong):
    with pytest.raises(ValidationError):
        TypeAdapter(FittedDense).validate_python(wrong)


def test_few_rows_are_encoded_to_the_bit_as_they_are_among_many(seed):
    rng = np.random.default_rng(seed)
    columns = {"a": "log_plus_3", "b": "log1p", "c": "log_plus_3", "d": "none", "e": "log_plus_3"}
    dense = {name: TRANSFORMS[transform].fit(None) for name, transform in columns.items()}
    numbers = {name: pl.Series(rng.integers(-5, 10**9, 10_000)) for name in columns}
    numbers["c"] = pl.Series(rng.normal(0, 1e3, 10_000))
    frame = pl.DataFrame(numbers).with_columns(pl.when(pl.all() % 7 > 0).then(pl.all()))
    many = encode_dense(frame, dense)
    assert many.columns == list(columns)
    assert pl.concat(encode_dense(frame.slice(i, 777), dense) for i in range(0, 10_000, 777)).equals(many)
    assert encode_dense(frame.head(0), dense).schema == many.schema
