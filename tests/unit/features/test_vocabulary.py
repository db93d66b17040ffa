"""Counts -> ids, and the file that keeps them."""

import random
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.vocabularies import fit
from torchdlrm.errors import DatasetError
from torchdlrm.features import vocabulary as module
from torchdlrm.features.kinds import KINDS, hex_digits
from torchdlrm.features.vocabulary import Vocabulary, first_difference

VALUES = {
    "string": st.none()
    | st.sampled_from(["", "a", "A", "Köln", "東京", "\U0001f600", "a longer text than twelve bytes"]),
    "int": st.none() | st.sampled_from([0, -1, 2**63 - 1, -(2**63)]),
    "hex": st.none() | st.sampled_from([0, 1, 0xABCDEF, 2**32 - 1]),
}


def expected_ids(values, *, min_count, max_embeddings):
    """By the contract, in plain Python; text sorts by its UTF-8 bytes."""

    def key(value):
        return (-counts[value], value is not None, value.encode() if isinstance(value, str) else value)

    counts = Counter(values)
    kept = sorted((value for value in counts if counts[value] >= min_count), key=key)
    return {value: i + 1 for i, value in enumerate(kept[: None if max_embeddings is None else max_embeddings - 1])}


@pytest.mark.parametrize("kind", list(VALUES))
@settings(max_examples=60, deadline=None)
@given(data=st.data(), min_count=st.integers(1, 3), max_embeddings=st.none() | st.integers(2, 5))
def test_ids_fall_with_counts_and_ties_rise_with_values(kind, data, min_count, max_embeddings):
    """However the rows are cut into chunks and the values into ranges; counts are of the training rows alone."""
    values = data.draw(st.lists(VALUES[kind], min_size=1, max_size=20))
    vocabulary = fit(
        kind,
        values,
        min_count=min_count,
        max_embeddings=max_embeddings,
        cuts=data.draw(st.lists(st.integers(0, 20), max_size=3)),
        num_train=(num_train := data.draw(st.integers(1, len(values)))),
        num_partitions=data.draw(st.sampled_from([1, 4])),
        values_at_a_time=data.draw(st.sampled_from([2, 10_000])),
    )
    ids = expected_ids(values[:num_train], min_count=min_count, max_embeddings=max_embeddings)
    assert dict(zip(vocabulary.table["value"], vocabulary.table["id"], strict=True)) == ids
    assert vocabulary.num_embeddings == len(ids) + 1
    assert vocabulary.missing_id == ids.get(None)
    found = vocabulary.lookup(pl.Series("f", values, dtype=KINDS[kind].dtype))
    assert found.to_list() == [ids.get(value, 0) for value in values]
    assert found.dtype == pl.Int32


def test_lookup_keeps_the_order_of_many_rows():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 50_000, 400_000)
    vocabulary = fit("int", values, min_count=8)
    ids = dict(zip(vocabulary.table["value"], vocabulary.table["id"], strict=True))
    assert vocabulary.lookup(pl.Series("f", values)).to_list() == [ids.get(value, 0) for value in values.tolist()]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("string", ["b", "b", None, "Köln", "", "a\tb"]),
        ("int", [None, -(2**63), 2**63 - 1, 0]),
        ("hex", [None, 0, 0xDEADBEEF, 2**32 - 1]),
        ("string", []),
        ("hex", []),
    ],
)
def test_a_vocabulary_is_read_as_it_was_written(tmp_path, kind, values):
    vocabulary = fit(kind, values)
    vocabulary.write(tmp_path / "f.parquet")
    found = Vocabulary.read(tmp_path / "f.parquet", "f", kind)
    assert found.table.equals(vocabulary.table)
    assert found.table.schema == vocabulary.table.schema


def test_hex_values_are_written_as_eight_lower_case_digits(tmp_path):
    rng = random.Random(3)
    values = [None, 0, 10, 2**32 - 1, *(rng.randrange(2**32) for _ in range(1000))]
    expected = [None if value is None else f"{value:08x}" for value in values]
    assert hex_digits(pl.Series("f", values, dtype=pl.UInt32)).to_list() == expected
    fit("hex", [0xAB]).write(tmp_path / "f.parquet")
    assert pl.read_parquet(tmp_path / "f.parquet").rows() == [("000000ab", 1, 1)]


def test_a_damaged_vocabulary_is_reported(tmp_path):
    path = tmp_path / "f.parquet"
    path.write_bytes(b"PAR1 no")
    with pytest.raises(DatasetError, match=r"f\.parquet: the vocabulary cannot be read"):
        Vocabulary.read(path, "f", "int")


IDS = st.dictionaries(st.integers(1, 12), st.none() | st.integers(0, 3), max_size=10)


@settings(max_examples=80, deadline=None)
@given(before=IDS, now=IDS, spare=st.integers(0, 3), reset=st.none() | st.sets(st.integers(1, 12)))
def test_the_first_id_of_another_value_is_found(before, now, spare, reset):
    """In blocks of a few ids, whether or not they have values; ids behind the table of the earlier one are new."""
    num_ids = max(before, default=0) + 1 + spare

    def differs(number):
        if reset is not None and number in reset:
            return False
        if number not in now:
            return reset is None and number in before
        return number < num_ids and (number not in before or before[number] != now[number])

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_IDS_AT_A_TIME", 4)
        files = [Path(folder) / name for name in ("before", "now")]
        for file, values in zip(files, (before, now), strict=True):
            numbers = sorted(values)
            table = {"value": [values[number] for number in numbers], "count": [1] * len(numbers), "id": numbers}
            schema = {"value": pl.Int64, "count": pl.Int64, "id": pl.Int32}
            Vocabulary("f", "int", pl.DataFrame(table, schema=schema)).write(file)
        found = first_difference(*files, num_ids, None if reset is None else np.array(sorted(reset), np.int32))
    assert found == min(filter(differs, {*before, *now}), default=None)
