"""An index that is patched period after period gives the ids of the vocabulary as it is then."""

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchdlrm.features.kinds import KINDS
from torchdlrm.features.patched_index import PatchedIndex
from torchdlrm.features.value_index import ValueIndex

VALUES = {
    "string": st.sampled_from([None, "", "a", "Köln", "東京", "a longer text", *map(str, range(12))]),
    "int": st.sampled_from([None, -(2**63), 2**63 - 1, *range(-8, 8)]),
    "hex": st.sampled_from([None, 2**32 - 1, *range(16)]),
}
NUM_IDS = 14


def index_of(rows, kind):
    """Of a dict of values by their ids."""
    known = {i: value for i, value in rows.items() if value is not None}
    missing_id = next((i for i, value in rows.items() if value is None), 0)
    values = pl.Series("f", list(known.values()), dtype=KINDS[kind].dtype)
    return ValueIndex.of(values, np.array(list(known), np.int32), kind, missing_id)


def patched(index, values, ids, removed_ids, kind):
    """The rows come in two pieces."""
    half = len(ids) // 2
    pieces = [(values[part], ids[part]) for part in (slice(None, half), slice(half, None))]
    return PatchedIndex.of(index, pieces, removed_ids, kind)


@pytest.mark.parametrize("kind", list(VALUES))
@settings(max_examples=40)
@given(data=st.data())
def test_a_patched_index_gives_the_ids_of_each_period(kind, data):
    periods = data.draw(
        st.lists(
            st.dictionaries(st.integers(1, NUM_IDS), VALUES[kind], max_size=NUM_IDS).map(
                lambda rows: {i: value for i, value in rows.items() if list(rows.values()).count(value) == 1}
            ),
            min_size=2,
            max_size=5,
        )
    )
    asked = pl.Series("f", data.draw(st.lists(VALUES[kind], min_size=1, max_size=100)), dtype=KINDS[kind].dtype)
    index, before = index_of(periods[0], kind), periods[0]
    for rows in periods[1:]:
        # Rows that a delta has: whatever changed, and some that did not, as if their counts had.
        told = {i: value for i, value in rows.items() if before.get(i, "none") != value or i % 3 == 0}
        values = pl.Series("f", list(told.values()), dtype=KINDS[kind].dtype)
        removed = np.array(sorted(before.keys() - rows.keys()), np.int32)
        index, before = patched(index, values, np.array(list(told), np.int32), removed, kind), rows
        whole = index_of(rows, kind)
        assert index.lookup(asked).equals(whole.lookup(asked), check_dtypes=True, check_names=True)
        assert [index.id_of(value) for value in asked] == [whole.id_of(value) for value in asked]
        if kind != "string":
            is_missing = asked.is_null().to_numpy()
            numbers = asked.fill_null(0).to_numpy()
            assert np.array_equal(index.ids_of_numbers(numbers, is_missing), whole.ids_of_numbers(numbers, is_missing))


def test_rows_of_which_the_ids_stay_need_no_memory():
    index = index_of({1: 7, 2: 8, 3: None}, "int")
    values, ids = pl.Series([7, None], dtype=pl.Int64), np.array([1, 3], np.int32)
    assert patched(index, values, ids, ids[:0], "int") is index
    other = patched(index, pl.Series([9], dtype=pl.Int64), np.array([2], np.int32), ids[:0], "int")
    assert (other.num_changed, other.id_of(9), other.id_of(8), other.id_of(None)) == (1, 2, 0, 3)


@pytest.mark.parametrize(
    ("values", "ids"),
    [([7, 7], [2, 3]), ([None, None], [2, 3]), ([7, 8], [2, 2]), ([5, 7], [1, 1]), ([6] * 1000, [*range(2, 1002)])],
    ids=["value", "missing value", "id", "id of a value that keeps it", "a thousand times"],
)
def test_a_value_or_an_id_that_stands_in_several_rows_is_refused(values, ids):
    for index in (base := index_of({1: 5}, "int"), patched(base, pl.Series([9]), np.array([4], np.int32), [], "int")):
        with pytest.raises(ValueError, match="a value or an id stands in several rows"):
            patched(index, pl.Series(values, dtype=pl.Int64), np.array(ids, np.int32), np.empty(0, np.int32), "int")
