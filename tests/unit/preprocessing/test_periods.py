"""Values that come and go, by the tasks of the job, against plain Python and however they are cut."""

import random
import tempfile
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.period_reference import Vocabulary, next_period
from helpers.vocabularies import next_vocabulary
from torchdlrm.preprocessing.count import by_value

VALUES = st.none() | st.integers(0, 9)


def rows(folder, what):
    file = folder / what / "f.parquet"
    return pl.DataFrame(pq.read_table(file)).rows() if file.exists() else []


@settings(max_examples=30)
@given(
    periods=st.lists(st.tuples(st.integers(1, 3), st.lists(VALUES, min_size=1, max_size=25)), min_size=1, max_size=5),
    min_count=st.integers(1, 3),
    expire_after=st.none() | st.integers(1, 3),
    admit_over=st.integers(1, 3),
    max_embeddings=st.none() | st.integers(2, 8),
    num_partitions=st.sampled_from([1, 4]),
    values_at_a_time=st.sampled_from([3, 10_000]),
)
def test_vocabularies_follow_the_rules(periods, num_partitions, values_at_a_time, **rules):
    """Periods may be left out; what a job may use of the machine changes nothing."""
    expected, before, period = Vocabulary(), None, 0
    with tempfile.TemporaryDirectory() as name:
        for step, values in periods:
            period += step
            folder = Path(name) / str(period)
            sizes = {"num_partitions": num_partitions, "values_at_a_time": values_at_a_time}
            before = folder, next_vocabulary(before, folder, values, period, **sizes, **rules)
            expected = next_period(expected, values, period, **rules)
            assert rows(folder, "vocabulary") == expected.table
            assert rows(folder, "reset") == [(number,) for number in expected.reset]
            assert rows(folder, "candidates") == expected.asked
            told = {name: before[1][name] for name in ("num_embeddings", "admitted", "expired")}
            assert told == {name: getattr(expected, name) for name in told}


@pytest.mark.parametrize("rules", [{"expire_after": 3}, {"max_embeddings": 40}])
def test_tables_stay_bounded_on_a_log_without_end(rules, tmp_path):
    rng, before, seen = random.Random(3), None, []
    for period in range(25):
        values = [20 * period + int(rng.expovariate(0.05)) for _ in range(100)]
        seen.append({*values})
        before = (
            tmp_path / str(period),
            next_vocabulary(before, tmp_path / str(period), values, period, min_count=1, **rules),
        )
    alive = [len(set().union(*seen[max(0, at - 2) : at + 1])) for at in range(25)]
    assert before[1]["num_embeddings"] <= rules.get("max_embeddings", max(alive) + 1)
    assert len(set().union(*seen)) > 3 * before[1]["num_embeddings"]
    assert before[1]["num_values"] <= before[1]["num_embeddings"] - 1


def test_values_are_cut_where_a_null_is_the_longest_table():
    """One value in each table, of which the first has the null: it is no sample of the others."""
    types = {"value": pl.String, "count": pl.Int64}
    tables = [pl.DataFrame({"value": [value], "count": [1]}, schema=types) for value in (None, "b", "a")]
    cuts = [*by_value(tables, [0, 0, 0], [1, 1, 1], 2)]
    found = [value for cut in cuts for table, rows in zip(tables, cut, strict=True) for value in table["value"][rows]]
    assert sorted(found, key=str) == [None, "a", "b"]
    assert [*by_value(tables[:1], [0], [1], 2)] == [[slice(0, 1)]]
