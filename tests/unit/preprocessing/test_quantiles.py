"""Quantiles are those of all training rows in their order, however the values are dealt out."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.vocabularies import read_chunks
from torchdlrm.features.columns import SparseColumn
from torchdlrm.preprocessing.quantiles import fit_quantiles, sort_values


def fit(kind, numbers, num_train, quantiles, *, num_partitions):
    """The boundaries of two chunks of rows, of which the first `num_train` are for training."""
    column = SparseColumn(name="f", kind=kind, buckets=quantiles)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cuts = [len(numbers) // 2]
        split, chunks, ranges = read_chunks(folder, column, numbers, cuts, num_train, num_partitions)
        targets = [folder / f"numbers-{i}" for i in range(num_partitions)]
        for values, target in zip(ranges, targets, strict=True):
            sort_values(values, chunks, split, target)
        return fit_quantiles(column, targets)["boundaries"]


def expected(numbers, quantiles):
    """As the definition says: places of the sorted numbers, without equal ones and without the smallest."""
    ascending = sorted(number for number in numbers if number is not None)
    found = {ascending[k * len(ascending) // quantiles] for k in range(1, quantiles)} if ascending else set()
    return sorted(found - {ascending[0]} if ascending else found)


INTEGERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
FLOATS = st.floats(allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, -0.0, 0.5, -1e308, 1e308])


@given(
    st.sampled_from(["int", "float"]).flatmap(
        lambda kind: st.tuples(
            st.just(kind), st.lists(st.none() | (INTEGERS if kind == "int" else FLOATS), min_size=2, max_size=60)
        )
    ),
    st.integers(2, 70),
    st.integers(0, 60),
    st.sampled_from([1, 4]),
)
@example(("int", [-(2**63), 2**63 - 1, 2**53, 2**53 + 1]), 4, 4, 1)
@example(("float", [None, None]), 4, 2, 1)
def test_boundaries_are_the_numbers_at_the_places_of_the_quantiles(column, quantiles, num_train, num_partitions):
    kind, numbers = column
    num_train = min(num_train, len(numbers))
    found = fit(kind, numbers, num_train, quantiles, num_partitions=num_partitions)
    assert found == expected(numbers[:num_train], quantiles)


def test_quantiles_of_distinct_numbers_are_equally_large():
    numbers = np.random.default_rng(0).permutation(1000).astype(float) / 7
    found = fit("float", numbers, 1000, 8, num_partitions=1)
    assert np.bincount(np.searchsorted(found, numbers, side="right")).tolist() == [125] * 8
