"""Each kind of value: what it writes it reads, and its different readers agree."""

import math

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.features.bad_rows import REASONS
from torchdlrm.features.kinds import HEX, INT, KINDS, map_lists

VALUES = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "id": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "hex": st.integers(0, 2**32 - 1),
    "string": st.text(),
    "vector": st.floats(allow_nan=False, allow_infinity=False, width=32),  # one number of it
}


def column_of(kind, values):
    return pl.Series("f", values, dtype=kind.dtype)


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
@given(data=st.data())
def test_what_a_kind_writes_it_reads_again(kind, data):
    values = column_of(kind, data.draw(st.lists(st.none() | VALUES[kind.name])))
    text = kind.to_text(values).cast(pl.String)
    again = text.to_frame().select(kind.from_text(pl.col("f"))).to_series()
    assert again.equals(values)
    assert kind.bad(text, again) is None
    assert kind.from_file(kind.to_text(values)).equals(values)


@pytest.mark.parametrize("kind", [INT, HEX], ids=lambda kind: kind.name)
@given(numbers=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1))
def test_an_integer_of_a_tensor_and_the_cell_made_of_it_are_the_same_value(kind, numbers):
    typed, bad = kind.from_numbers(pl.Series(numbers, dtype=pl.Int64))
    for i, number in enumerate(numbers):
        is_bad = bad is not None and bad[i]
        try:
            cell = kind.cell_of["integer"](number)
        except ValueError:
            assert is_bad
            continue
        assert not is_bad
        assert kind.numbers_of_cells([cell])[0] == typed[i]


@given(number=st.floats())
def test_a_float_of_a_tensor_is_an_integer_where_it_is_whole(number):
    typed, bad = INT.from_numbers(pl.Series([number]))
    is_missing = math.isnan(number)
    is_value = math.isfinite(number) and number.is_integer() and abs(number) <= 2.0**53
    assert (bad is not None and bad[0]) == (not is_missing and not is_value)
    if is_value or is_missing:
        assert typed[0] == (int(number) if is_value else None)


def test_every_kind_that_refuses_cells_says_why():
    for kind in KINDS.values():
        nothing_is_wrong = kind.from_text(pl.col("f")).meta.eq(pl.col("f"))
        assert (kind.name in REASONS) != nothing_is_wrong


def test_lists_are_mapped_in_place():
    lists = pl.Series("f", [[1, 255], [], None, [16]], dtype=pl.List(pl.UInt32))
    assert map_lists(lists, HEX.to_text).to_list() == [["00000001", "000000ff"], [], [], ["00000010"]]


@given(x=st.floats(-1e30, 1e30))
def test_the_nearest_integer_of_a_float_is_one_of_64_bits(x):
    assert INT.from_floats(np.array([x]))[0] == int(min(max(round(x), -(2**62)), 2**62))
