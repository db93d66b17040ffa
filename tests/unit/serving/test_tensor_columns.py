"""Tensors of few rows mean what the same tensors of many rows mean, whichever way they are read."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.predicted import rows_of_request
from torchdlrm.errors import RowError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.prediction.json_rows import RowReader
from torchdlrm.serving.front.open_inference.tensors import NUMBER_TYPES, Tensor, from_bytes, from_json
from torchdlrm.serving.service.refusals import RefusedRequest

SCHEMA = FeatureSchema(
    name="mixed",
    null_values=("-7", "x"),
    columns=(
        LabelColumn(name="label"),
        DenseColumn(name="count", kind="int"),
        DenseColumn(name="price", kind="float", null_values=("1.50", "0")),
        SparseColumn(name="hex", kind="hex", null_values=("0", "1A")),
        SparseColumn(name="number", kind="int"),
        SparseColumn(name="size", kind="float", buckets=[1.0]),
        SparseColumn(name="text", kind="string"),
        SparseColumn(name="tags", kind="string", value_separator=";"),
    ),
)
READER = RowReader(SCHEMA)
COLUMNS = ["count", "price", "hex", "number", "size", "text", "tags"]
NUM_MANY = 17  # rows from which on tensors become columns at once


def rows_of(tensors):
    return rows_of_request(tensors, SCHEMA, 100)


def typed(tensors, num_rows):
    """The first rows as typed columns, or None where they are refused."""
    try:
        rows = rows_of(tensors)
        if not isinstance(rows, pl.DataFrame):
            rows = READER.read(rows).select(COLUMNS)
    except (RefusedRequest, RowError):
        return None
    assert rows.columns == COLUMNS
    return rows.head(num_rows)


def values_of(datatype):
    if datatype == "BYTES":
        return st.sampled_from(["", "0", "7", "-7", "0000000a", "ffffffff", "1a", "x", "1.5", "a;b", " "])
    dtype = NUMBER_TYPES[datatype]
    if dtype.kind == "f":
        return st.sampled_from([0.0, -0.0, 1.5, -7.0, np.nan, np.inf, 65504.0, 2.0**15])
    limits = np.iinfo(dtype)
    return st.one_of(st.integers(limits.min, limits.max), st.sampled_from([0, 1, limits.min, limits.max]))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_few_rows_mean_what_many_mean(data):
    names = data.draw(st.lists(st.sampled_from([*COLUMNS, "dense"]), min_size=1, max_size=3, unique=True))
    num_rows = data.draw(st.integers(1, 3))
    few, many = [], []
    for name in names:
        width = 2 if name == "dense" else 1
        datatype = data.draw(st.sampled_from([*NUMBER_TYPES, "BYTES"]))
        one = st.lists(values_of(datatype), min_size=width, max_size=width)
        rows = data.draw(st.lists(one, min_size=num_rows, max_size=num_rows))
        for tensors, repeated in ((few, rows), (many, rows + rows[-1:] * NUM_MANY)):
            tensors.append(tensor(name, datatype, repeated))
    one, other = typed(few, num_rows), typed(many, num_rows)
    assert (one is None) == (other is None)
    if one is not None:
        assert one.equals(other)


def tensor(name, datatype, rows) -> Tensor:
    shape = (len(rows), len(rows[0]))
    flat = [value for row in rows for value in row]
    if datatype == "BYTES":
        return from_json(name, datatype, shape, flat)
    return from_bytes(name, datatype, shape, np.array(flat, NUMBER_TYPES[datatype]).tobytes())


def test_few_plain_rows_are_no_columns():
    """Otherwise the test above would compare one way with itself."""
    tensors = [tensor("count", "FP32", [[3.0], [np.nan]]), tensor("hex", "INT64", [[255], [0]])]
    assert rows_of(tensors) == [{"count": 3, "hex": "000000ff"}, {"count": None, "hex": "00000000"}]
    assert isinstance(rows_of([tensor("hex", "INT64", [[1]] * NUM_MANY)]), pl.DataFrame)


@pytest.mark.parametrize("names", [["hex", "hex"], ["dense", "count"]])
def test_a_column_is_given_once(names):
    tensors = [tensor(name, "INT64", [[1, 2]] if name == "dense" else [[1]]) for name in names]
    with pytest.raises(RefusedRequest, match="given twice"):
        rows_of(tensors)
