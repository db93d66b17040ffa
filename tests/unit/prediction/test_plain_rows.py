"""Plain rows are encoded to the very bits of the general way, and no other rows are taken for plain."""

import math
import string

import numpy as np
import polars as pl
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from torchdlrm.bundle.bundle import PlainIds
from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.errors import RowError
from torchdlrm.features.columns import DenseColumn, IgnoredColumn, LabelColumn, SparseColumn
from torchdlrm.features.encode import encode
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.features.transforms import TRANSFORMS, Standardize
from torchdlrm.features.value_index import ValueIndex, write_index
from torchdlrm.features.vocabulary import Vocabulary, number_values, rank_counts
from torchdlrm.prediction.fast_path import PlainRowEncoder
from torchdlrm.prediction.json_rows import MAX_CELL_CHARACTERS, RowReader, SharedRows, joined

SCHEMA = FeatureSchema(
    name="mixed",
    null_values=("5", "a"),
    columns=(
        SparseColumn(name="hex", kind="hex", null_values=("68FD1E64", "-")),
        DenseColumn(name="count", kind="int", transform="log_plus_3", buckets="log_square"),
        LabelColumn(name="label"),
        DenseColumn(name="price", kind="float", transform="standardize", buckets=[-1, 0.5, 2**60], hash=9),
        DenseColumn(name="clicks", kind="int", transform="log1p"),
        DenseColumn(name="age", kind="float", transform="none"),
        DenseColumn(name="views", kind="int", transform="log_plus_3", buckets="log_square"),
        SparseColumn(name="hex_hashed", kind="hex", hash=1000),
        IgnoredColumn(name="note"),
        SparseColumn(name="number", kind="int", null_values=("NULL",)),
        SparseColumn(name="number_hashed", kind="int", hash=7),
        SparseColumn(name="number_hashed_2", kind="int", hash=2**31 - 1),
        SparseColumn(name="row", kind="int"),
        SparseColumn(name="size", kind="float", buckets="log_square", null_values=("2.5",)),
        SparseColumn(name="rank", kind="int", buckets={"quantiles": 3, "boundaries": [1, 2**53 + 1]}),
        SparseColumn(name="text", kind="string"),
        SparseColumn(name="text_hashed", kind="string", hash=100),
        SparseColumn(name="hex_2", kind="hex"),
    ),
)
KNOWN_HEX = [0, 1, 0x68FD1E64, 2**32 - 1]
KNOWN_NUMBERS = [0, -1, 5, 2**63 - 1, -(2**63)]
KNOWN_TEXTS = ["a", "Köln", "00000000", " "]
DENSE = {
    column.name: Standardize(missing=2.0, shift=-2.0, deviation=3.7)
    if column.transform == "standardize"
    else TRANSFORMS[column.transform].fit(None)
    for column in SCHEMA.dense
}
INT64 = st.one_of(st.none(), st.integers(-(2**63), 2**63 - 1), st.integers(-5, 100), st.sampled_from(KNOWN_NUMBERS))
NUMBER = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**70), 2**70))
HEX = st.one_of(
    st.none(),
    st.just(""),
    st.sampled_from([f"{value:08x}" for value in KNOWN_HEX]),
    st.text(string.hexdigits, min_size=8, max_size=8),
)
TEXT = st.one_of(
    st.none(), st.just(""), st.sampled_from(KNOWN_TEXTS), st.text(st.characters(codec="utf-8"), max_size=5)
)
KINDS = {("dense", "int"): INT64, ("dense", "float"): NUMBER, ("sparse", "int"): INT64, ("sparse", "float"): NUMBER}
KINDS |= {("sparse", "hex"): HEX, ("sparse", "string"): TEXT}
FEATURES = SCHEMA.features
PLAIN = st.fixed_dictionaries(
    {}, optional={column.name: KINDS[column.role, column.kind] for column in FEATURES} | {"note": st.just({"any": 1})}
)


@pytest.fixture(scope="module")
def ways(tmp_path_factory):
    """The plain way and the general way."""
    folder = tmp_path_factory.mktemp("indexes")
    known = {"hex": (KNOWN_HEX, pl.UInt32), "int": (KNOWN_NUMBERS, pl.Int64), "string": (KNOWN_TEXTS, pl.String)}
    vocabularies = {"row": PlainIds(50)}
    for column in SCHEMA.sparse:
        if column.hash is None and column.name != "row":
            values, dtype = known[column.vocabulary_kind]
            values = [*values, None] if column.name == "hex" else values  # a missing value may have an id of its own
            counts = pl.DataFrame({"value": pl.Series(values, dtype=dtype), "count": [9] * len(values)})
            vocabulary = Vocabulary(column.name, column.vocabulary_kind, number_values(rank_counts(counts)))
            write_index(vocabulary, folder / column.name)
            vocabularies[column.name] = ValueIndex.open(
                folder / column.name, kind=column.vocabulary_kind, num_ids=2**31
            )
    reader = RowReader(SCHEMA)

    def general(rows):
        return EncodedRows.from_frame(encode(reader.read(rows), SCHEMA, DENSE, vocabularies), SCHEMA)

    return PlainRowEncoder(SCHEMA, DENSE, vocabularies).encode, general


def same_bits(one, other):
    return one.dense.tobytes() == other.dense.tobytes() and np.array_equal(one.sparse, other.sparse)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(PLAIN, min_size=1, max_size=3), copies=st.sampled_from([1, 1, 30]))
@example(rows=[{"age": -0.0, "price": 1e308, "count": -3}], copies=1)
@example(rows=[{}], copies=30)
def test_plain_rows_give_the_bits_of_the_general_way(ways, rows, copies):
    plain, general = ways
    rows = rows * copies  # few rows and many are looked up in different ways
    found = plain(rows)
    assert found is not None
    assert same_bits(found, general(rows))


@settings(max_examples=150, deadline=None)
@given(shared=PLAIN, rows=st.lists(PLAIN, min_size=1, max_size=3), copies=st.sampled_from([1, 30]), more=PLAIN)
def test_shared_cells_are_those_of_every_row_whichever_way_they_are_read(ways, shared, rows, copies, more):
    plain, general = ways
    own = [{name: cell for name, cell in row.items() if name not in shared} for row in rows * copies]
    together = joined([[more], SharedRows([(shared, own)]), [more, more]])
    written_out = [more, *({**shared, **row} for row in own), more, more]
    assert len(together) == len(written_out)
    assert list(together) == written_out
    assert same_bits(plain(together), plain(written_out))
    assert same_bits(general(together), general(written_out))


def test_a_text_that_is_too_long_is_left_to_the_general_way_which_refuses_it(ways):
    plain, general = ways
    for name in ("text", "text_hashed", "hex", "count"):
        rows = [{}, {name: "7" * (MAX_CELL_CHARACTERS + 1)}]
        assert plain(rows) is None
        with pytest.raises(RowError, match=f"row 1, column '{name}': the cell has 65,537 characters; at most 65,536"):
            general(rows)
    assert plain([{"text": "7" * MAX_CELL_CHARACTERS}]) is not None


@pytest.mark.parametrize(
    "cells",
    [
        {"hex": "1"},
        {"hex": "+0000001"},
        {"hex": "0x000001"},
        {"hex": "ab cd ef"},
        {"hex": "abcdef  "},
        {"hex": "0000000g"},
        {"hex": "\N{ARABIC-INDIC DIGIT ONE}" * 8},
        {"hex": "000000001"},
        {"hex": 7},
        {"count": "7"},
        {"count": 7.0},
        {"count": True},
        {"count": 2**63},
        {"count": [7]},
        {"price": "7"},
        {"price": math.nan},
        {"price": math.inf},
        {"price": 10**400},
        {"price": False},
        {"number": "7"},
        {"number": -(2**63) - 1},
        {"text": 7},
        {"text": "\ud800"},
        {"text_hashed": "\ud800"},
        {"label": 1},
        {"nme": 1},
        ["hex"],
        None,
    ],
)
@pytest.mark.parametrize("copies", [1, 30])
def test_other_cells_are_left_to_the_general_way(ways, cells, copies):
    plain, _ = ways
    assert plain([{}, *([cells] * copies)]) is None


def test_hex_digits_of_neighbours_are_not_mixed_up(ways):
    """Cells of 7 and 9 digits have together as many as two of 8."""
    plain, general = ways
    rows = [{"hex": "0000001"}, {"hex": "000000002"}]
    assert plain(rows) is None
    with pytest.raises(RowError, match="row 1, column 'hex'"):
        general(rows)


def test_lists_and_no_rows_are_left_to_the_general_way(ways):
    lists = SCHEMA.with_columns([LabelColumn(name="label"), SparseColumn(name="tags", hash=10, value_separator=";")])
    assert PlainRowEncoder(lists, {}, {}).encode([{"tags": "a;b"}]) is None
    assert ways[0]([]) is None


def test_transforms_of_numbers_are_those_of_columns_to_the_bit():
    generator = np.random.default_rng(0)
    numbers = np.concatenate(
        [
            np.arange(-10.0, 1e5),
            generator.lognormal(0, 30, 100_000) * generator.choice([-1, 1], 100_000),
            [math.nan, 1.7e308, -1.7e308],
        ]
    )
    column = pl.Series("x", numbers).fill_nan(None)
    steep = Standardize(missing=-1e307, shift=1e307, deviation=0.3)
    for fitted in (*DENSE.values(), steep):
        expected = column.to_frame().select(fitted.expression("x")).to_series().to_numpy()
        assert fitted.of_numbers(numbers).tobytes() == expected.tobytes(), fitted.transform


def test_a_logarithm_between_two_float32_falls_to_the_same_side():
    """There the last bit of a float64 logarithm decides; random numbers hardly ever lie there."""
    below = np.linspace(math.log(4.1), math.log(7.9), 50_000).astype(np.float32)
    halfway = (below.astype(np.float64) + np.nextafter(below, np.float32(np.inf)).astype(np.float64)) / 2
    around = np.exp(halfway).view(np.int64)[:, None] + np.arange(-3, 4)
    numbers = around.ravel().view(np.float64) - 3.0  # exact, and so is adding 3 again
    fitted = DENSE["count"]
    column = pl.DataFrame({"x": numbers}).select(fitted.expression("x")).to_series().to_numpy()
    assert fitted.of_numbers(numbers).tobytes() == column.tobytes()
