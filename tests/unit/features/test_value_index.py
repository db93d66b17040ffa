"""The index of a vocabulary gives the ids that the vocabulary gives, for one row and for many."""

import time

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.vocabularies import fit
from torchdlrm.errors import DatasetError
from torchdlrm.features.kinds import KINDS
from torchdlrm.features.value_hash import hash_number, hash_numbers, hash_text, hash_values
from torchdlrm.features.value_index import ValueIndex, write_index

VALUES = {
    "string": st.none() | st.text(max_size=12) | st.sampled_from(["", "a", "Köln", "東京", "a longer text"]),
    "int": st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3),
    "hex": st.none() | st.integers(0, 2**32 - 1) | st.integers(0, 3),
}
# Two texts whose FNV-1a hashes of 64 bits are the same.
COLLISION = ("8yn0iYCKYHlIj4-BwPqk", "GReLUrM4wMqfg9yzV3KQ")


def indexed(vocabulary, path):
    write_index(vocabulary, path)
    return ValueIndex.open(path, kind=vocabulary.kind, num_ids=2**31)


def assert_same_ids(index, vocabulary, values):
    """For all rows at once, many times over, and row by row: the ways that an index takes for few and for many."""
    expected = vocabulary.lookup(values)
    assert index.lookup(values).equals(expected, check_dtypes=True, check_names=True, null_equal=True)
    # Some thousand rows, in several pieces, that start within a buffer.
    many = pl.concat([values.slice(1), *[values] * (5_000 // max(1, len(values)))], rechunk=False)
    assert index.lookup(many).equals(vocabulary.lookup(many))
    assert [index.lookup(values[i : i + 1])[0] for i in range(len(values))] == expected.to_list()


@pytest.mark.parametrize("kind", list(VALUES))
@settings(max_examples=60, deadline=None)
@given(data=st.data(), min_count=st.integers(1, 2))
def test_index_gives_the_ids_of_its_vocabulary(kind, data, min_count, tmp_path_factory):
    counted = data.draw(st.lists(VALUES[kind], max_size=60))
    asked = counted + data.draw(st.lists(VALUES[kind], max_size=90))
    vocabulary = fit(kind, counted, min_count=min_count)
    index = indexed(vocabulary, tmp_path_factory.getbasetemp() / f"{kind}.index")
    assert_same_ids(index, vocabulary, pl.Series("f", asked, dtype=KINDS[kind].dtype))


@pytest.mark.parametrize("kind", list(VALUES))
def test_a_large_index_gives_the_ids_of_its_vocabulary(kind, seed, tmp_path):
    numbers = np.random.default_rng(seed).integers(0, 200_000, 100_000)
    column = pl.Series("f", numbers)
    values = column.cast(pl.String) + " as text" if kind == "string" else column.cast(KINDS[kind].dtype)
    vocabulary = fit(kind, values.head(50_000).to_list())
    assert_same_ids(indexed(vocabulary, tmp_path / "f.index"), vocabulary, values.tail(3_000))
    many = pl.concat([values, pl.Series("f", [None], dtype=values.dtype)])
    assert indexed(vocabulary, tmp_path / "f.index").lookup(many).equals(vocabulary.lookup(many))


@pytest.mark.parametrize("known", [COLLISION[:1], COLLISION])
def test_texts_with_the_same_hash_are_told_apart(known, tmp_path):
    assert len(set(hash_values(pl.Series(COLLISION)))) == 1
    vocabulary = fit("string", [*known, "other"])
    assert_same_ids(indexed(vocabulary, tmp_path / "f.index"), vocabulary, pl.Series("f", [*COLLISION, "other"] * 40))


@given(number=st.integers(-(2**63), 2**63 - 1), text=st.text(max_size=20))
def test_one_value_hashes_as_it_does_among_many(number, text):
    assert hash_number(number) == hash_numbers(np.array([number]))[0]
    assert hash_text(text) == hash_values(pl.Series([text]))[0]


def fnv1a(text):
    """As its inventors have it: a byte, a product, the next byte."""
    hashed = 0xCBF29CE484222325
    for byte in text.encode():
        hashed = (hashed ^ byte) * 0x100000001B3 % 2**64
    return hash_number(hashed)


LENGTHS = [0, 1, 20, 63, 64, 65, 127, 128, 129, 1_000, 3_000, 70_000, 200_000]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=4),
    num_short=st.sampled_from([0, 3, 100]),
    seed=st.integers(0, 99),
)
def test_a_text_of_any_length_among_any_others_has_the_hash_of_the_textbook(lengths, num_short, seed):
    generator = np.random.default_rng(seed)
    texts = ["".join(map(chr, generator.integers(1, 0x7FF, length))) for length in [*lengths, *[7] * num_short]]
    expected = [fnv1a(text) for text in texts]
    assert hash_values(pl.Series([*texts, None])).tolist() == [*expected, 0x6D697373696E6721]
    assert hash_values(pl.Series(["x", *texts])[1:]).tolist() == expected
    assert [hash_text(text) for text in texts[:4]] == expected[:4]


def test_one_long_text_among_short_ones_costs_what_its_bytes_cost():
    """Place by place, with a call or more of NumPy for each, two million places would take ten seconds."""
    short = pl.Series([f"{i:04x}" for i in range(500)])
    together = pl.concat([short, pl.Series(["a" * 2_000_000])])
    started_s = time.process_time()
    hash_values(together)
    assert time.process_time() - started_s < 2.0


def test_a_text_longer_than_all_of_the_vocabulary_is_unknown_unhashed(tmp_path, monkeypatch):
    vocabulary = fit("string", ["a", None, "Köln " * 10])
    index = indexed(vocabulary, tmp_path / "f.index")
    texts = ["a", "Köln " * 10, "x" * 60, "x" * 3_000_000, None, "Köln " * 10 + "s", ""]
    assert_same_ids(index, vocabulary, pl.Series("f", texts))
    monkeypatch.setattr("torchdlrm.features.value_index.hash_text", None)
    assert index.id_of("x" * 61) == 0


def test_a_wrong_file_is_refused_with_a_message(tmp_path):
    path = tmp_path / "f.index"
    write_index(fit("hex", [1, 2, 3]), path)
    with pytest.raises(DatasetError, match=r"f\.index: an index of version 1, of values of kind hex; .*kind int"):
        ValueIndex.open(path, kind="int", num_ids=9)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DatasetError, match=r"f\.index: the index of a vocabulary cannot be read"):
        ValueIndex.open(path, kind="hex", num_ids=9)
    with pytest.raises(DatasetError, match=r"none\.index: the index of a vocabulary cannot be read"):
        ValueIndex.open(tmp_path / "none.index", kind="hex", num_ids=9)
