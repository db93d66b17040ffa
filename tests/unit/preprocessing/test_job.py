"""The parts of the preprocessing job by themselves."""

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchdlrm.features.transforms import Moments, Standardize
from torchdlrm.features.value_hash import hash_values, hashed_ids
from torchdlrm.jobs.sections import Sections, write_sections
from torchdlrm.preprocessing.read import partitions_of
from torchdlrm.preprocessing.tally import divergence, id_bins


def mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def splitmix(number):
    golden = 0x9E3779B97F4A7C15
    start = mix((mix(0) + 4) % 2**64)
    return mix((start + (number + 1) * golden) % 2**64)


@given(values=st.lists(st.none() | st.integers(-(2**63), 2**63 - 1), max_size=15))
def test_numbers_are_hashed_as_the_format_says(values):
    expected = [0x6D697373696E6721 if value is None else splitmix(value % 2**64) for value in values]
    found = pl.Series("f", values, pl.Int64)
    assert hash_values(found).tolist() == expected
    assert hashed_ids(found, 10).tolist() == [value % 10 for value in expected]
    assert partitions_of(found, 64).tolist() == [value >> 58 for value in expected]


def test_sections_are_read_as_they_were_written_and_nothing_is_left_beside(tmp_path):
    tables = {
        "a": pa.table({"x": [1, 2]}),
        "b/c": pa.table({"y": ["q", None], "z": [0.5, 1.5]}),
        "d": pa.table({"w": []}),
    }
    write_sections(tmp_path / "f", tables.items())
    sections = Sections(tmp_path / "f")
    assert all(sections.table(name).equals(table) for name, table in tables.items())
    assert "a" in sections
    assert "e" not in sections
    kept = sections.table("b/c")
    del sections
    assert kept["y"].to_pylist() == ["q", None], "tables outlive the file"
    with pytest.raises(TypeError):
        write_sections(tmp_path / "g", {"a": None}.items())
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_divergence_is_zero_for_equal_one_for_disjoint_and_as_computed_between():
    assert divergence({1: 10, 2: 30}, {1: 1, 2: 3}) == 0
    assert divergence({1: 5}, {2: 7}) == 1
    p, q = np.array([0.5, 0.5, 0]), np.array([0.25, 0.25, 0.5])
    m = (p + q) / 2
    expected = (sum(x * np.log2(x / y) for x, y in zip(p, m, strict=True) if x) + sum(q * np.log2(q / m))) / 2
    assert divergence({0: 2, 1: 2}, {0: 1, 1: 1, 2: 2}) == pytest.approx(expected, abs=1e-6)
    assert divergence({}, {1: 1}) == 0


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
def test_ids_are_binned_by_rank(ids):
    expected = [i if i < 32 else 32 + i.bit_length() for i in ids]
    assert id_bins(np.array(ids, np.int32)).tolist() == expected


def test_huge_numbers_are_standardised():
    moments = Moments()
    moments.add(pl.Series([1e300, -1e300, 1e300, -1e300]))
    fitted = Standardize.fit(moments)
    assert (fitted.missing, fitted.deviation) == (0.0, pytest.approx(1e300))
    frame = pl.DataFrame({"x": [1e300, None, -1.7e308]})
    assert frame.select(fitted.expression("x"))["x"].to_list() == [1.0, 0.0, pytest.approx(-1.7e8)]
