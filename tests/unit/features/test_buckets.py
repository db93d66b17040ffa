"""Numbers fall into the buckets that exact arithmetic says, in columns and one by one."""

import math
from decimal import Decimal, localcontext

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from torchdlrm.errors import SchemaError
from torchdlrm.features.buckets import Buckets
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.schema_file import load_schema

INT64 = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
LOG_SQUARE = Buckets.model_validate("log_square").bucketing


def edges_of_log_square(most):
    with localcontext() as context:
        context.prec = 60
        return [Decimal(k).sqrt().exp() for k in range(1, most)]


def log_square(x):
    """floor(ln(x)^2) by decimal arithmetic; up to 2 the number without its fraction, as int64 holds it."""
    if x <= 2:
        return max(int(x), -(2**63))
    with localcontext() as context:
        context.prec = 60
        return int(Decimal(x).ln() ** 2)


def one_by_one(bucketing, numbers):
    return [int(bucketing.of_numbers(np.array([number]))[0]) for number in numbers]


def column_of(bucketing, numbers):
    return bucketing.of_column(pl.Series("x", numbers))


def test_integers_on_both_sides_of_each_edge_of_log_square():
    edges = [int(edge) for edge in edges_of_log_square(1907)]
    numbers = sorted({*range(-5, 100), *edges, *(edge + 1 for edge in edges), 2**53 + 1, 2**63 - 1, -(2**63)})
    expected = [log_square(number) for number in numbers]
    assert LOG_SQUARE.of_numbers(np.array(numbers)).tolist() == expected
    assert one_by_one(LOG_SQUARE, numbers) == expected
    assert column_of(LOG_SQUARE, [None, *numbers]).to_list() == [None, *expected]


def test_floats_on_both_sides_of_each_edge_of_log_square():
    near = [float(edge) for edge in edges_of_log_square(2500)]  # beyond 2^63, where no table is
    numbers = [x for edge in near for x in (math.nextafter(edge, 0), edge, math.nextafter(edge, math.inf))]
    assert LOG_SQUARE.of_numbers(np.array(numbers)).tolist() == [log_square(number) for number in numbers]


@given(st.lists(INT64, min_size=1) | st.lists(FLOATS, min_size=1))
@example([2.0, math.nextafter(2, 3), -0.5, -2.5, 1.7976931348623157e308, -1e300, 2.0**63])
@example([2**63 - 1, -(2**63), 2**53, 2**53 + 1, 2, 3])
def test_log_square_of_any_number(numbers):
    expected = [log_square(number) for number in numbers]
    assert one_by_one(LOG_SQUARE, numbers) == expected
    assert column_of(LOG_SQUARE, [*numbers, None]).to_list() == [*expected, None]


NUMBERS = INT64 | FLOATS


@given(st.data(), st.lists(NUMBERS, min_size=1, max_size=9, unique=True))
def test_a_boundary_is_in_the_bucket_above_it(data, boundaries):
    boundaries.sort()
    bucketing = Buckets.model_validate(boundaries).bucketing
    near = st.sampled_from([math.floor(edge) for edge in boundaries if abs(edge) < 2**63 - 1] or [0])
    integers = data.draw(st.lists(INT64 | near, min_size=1))
    floats = data.draw(st.lists(FLOATS | st.sampled_from(boundaries).map(float), min_size=1))
    for numbers in (integers, floats):
        expected = [sum(edge <= number for edge in boundaries) for number in numbers]  # exact in Python
        assert one_by_one(bucketing, numbers) == expected
        assert column_of(bucketing, [None, *numbers]).to_list() == [None, *expected]


@pytest.mark.parametrize("setting", ["log_square", [1.0, 10.0], [-3, 2**60 + 1], [0.5]])
@pytest.mark.parametrize("is_float", [True, False])
def test_a_number_is_found_for_each_bucket(setting, is_float):
    bucketing = Buckets.model_validate(setting).bucketing
    numbers = np.array([-7, 0, 1, 2, 3, 9, 10, 50, 10**9, 2**62], np.float64 if is_float else np.int64)
    categories = bucketing.of_numbers(numbers)
    found = bucketing.numbers_of(categories, is_float=is_float)
    assert found.dtype == numbers.dtype
    np.testing.assert_array_equal(bucketing.of_numbers(found), categories)


@pytest.mark.parametrize("setting", ["log_square", [1, 2.5], 7, {"quantiles": 2, "boundaries": [4.25]}])
def test_buckets_are_written_as_they_are_given(setting):
    assert Buckets.model_validate(setting).model_dump(mode="json") == setting
    assert Buckets.model_validate({"quantiles": 7}) == Buckets.model_validate(7)


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("log", "'log' is none of \"log_square\", boundaries that ascend"),
        ("log_sqare", "; did you mean log_square"),
        (1, "1 is none of"),
        (True, "True is none of"),
        ({"quantile": 10}, "is none of .*; did you mean quantiles"),
        ({"quantiles": 10, "by": "rows"}, "is none of"),
        ([], "one at least"),
        ([1.0, 1.0], "boundaries ascend"),
        ([2, 1], "boundaries ascend"),
        (["1"], "finite numbers"),
        ([math.inf], "finite numbers"),
        ([10**400], "finite numbers"),
        (list(range(70_000)), "70,000 boundaries are too many"),
    ],
)
def test_other_settings_are_refused_with_what_there_is(setting, told):
    with pytest.raises(ValidationError, match=told) as raised:
        SparseColumn(name="x", kind="int", buckets=setting)
    assert len(raised.value.errors()) == 1


@pytest.mark.parametrize(
    ("column", "told"),
    [
        ('role = "sparse", name = "x", kind = "float"', "kind float needs buckets"),
        ('role = "sparse", name = "x", kind = "hex", buckets = [1]', "buckets are for numbers, kind int or float"),
        ('role = "sparse", name = "x", buckets = [1]', "its kind is string"),
        ('role = "dense", name = "x", min_count = 2', "min_count is for the sparse feature"),
        ('role = "dense", name = "x", buckets = [1], hash = 5, min_count = 2', "hash goes without min_count"),
        (
            'role = "dense", name = "y", buckets = [1] }, { role = "ignore", name = "y_bucket"',
            "the name of the buckets",
        ),
    ],
)
def test_columns_that_make_no_sense_are_refused(column, told, tmp_path):
    path = tmp_path / "schema.toml"
    path.write_text(
        'name = "s"\ncolumns = [{ role = "label", name = "label" }, { role = "sparse", name = "city" }, { '
        + column
        + " }]\n"
    )
    with pytest.raises(SchemaError, match=told):
        load_schema(path)


def test_buckets_of_dense_columns_are_sparse_features_after_the_columns():
    schema = FeatureSchema(
        name="s",
        columns=(
            LabelColumn(name="label"),
            DenseColumn(name="age", kind="int", buckets="log_square", min_count=5, null_values=("-1",)),
            SparseColumn(name="city"),
            SparseColumn(name="price", kind="float", buckets=[1.5], hash=10),
        ),
    )
    assert [column.name for column in schema.features] == ["age", "city", "price"]
    assert [(c.name, c.raw_name, c.vocabulary_kind) for c in schema.sparse] == [
        ("city", "city", "string"),
        ("price", "price", "int"),
        ("age_bucket", "age", "int"),
    ]
    assert (schema.sparse[2].min_count, schema.sparse[2].null_values) == (5, ("-1",))
    assert FeatureSchema.model_validate(schema.model_dump(mode="json", exclude_none=True)) == schema


def test_the_bucketed_preset_is_the_layout_of_criteo():
    plain, bucketed = load_schema("criteo"), load_schema("criteo-bucketed")
    assert [column.name for column in bucketed.columns] == [column.name for column in plain.columns]
    assert bucketed.dense[0].transform == "log_plus_3"
    names = [f"cat_{i}" for i in range(26)] + [f"int_{i}_bucket" for i in range(13)]
    assert [column.name for column in bucketed.sparse] == names
