"""The synthetic log with several values in a cell: how many, which, and what it leaves as it was."""

import numpy as np
import pytest

from torchdlrm.features.schema_file import load_schema
from torchdlrm.synthetic.log import schema_path
from torchdlrm.synthetic.rows import BLOCK_ROWS
from torchdlrm.synthetic.shapes import MULTI_HOT_SIZES, PRESETS
from torchdlrm.synthetic.synthesize import synthesize
from torchdlrm.synthetic.values import draw_companions

NUM_ROWS = 4_500  # more than a block


def cells_of(path):
    """Of each row the label and dense cells, and the values of each sparse cell."""
    lines = [line.split("\t") for line in path.read_text().splitlines()]
    return [line[:14] for line in lines], [[cell.split(",") for cell in line[14:]] for line in lines]


@pytest.fixture(scope="module", params=["uniform", "pareto"])
def made(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("multi-hot") / "log.tsv"
    truth = synthesize(path, rows=NUM_ROWS, seed=3, preset="criteo-1tb", multi_hot=request.param)
    return path, truth, request.param


def test_cells_hold_as_many_values_as_in_the_benchmark(made):
    _, sparse = cells_of(made[0])
    assert len(sparse) == NUM_ROWS
    assert sum(MULTI_HOT_SIZES) == 214
    for row in sparse:
        assert tuple(map(len, row)) == MULTI_HOT_SIZES
        assert all(len(value) == 8 and int(value, 16) >= 0 for cell in row for value in cell)


def test_equal_first_values_have_equal_companions_of_the_same_column(made):
    _, sparse = cells_of(made[0])
    firsts, companions = set(), [set() for _ in MULTI_HOT_SIZES]
    for column, cardinality in enumerate(shape.cardinality for shape in PRESETS["criteo-1tb"].sparse):
        cell_of = {}
        for row in sparse:
            assert cell_of.setdefault(row[column][0], row[column]) == row[column]
        assert len(set(map(tuple, cell_of.values()))) == len(cell_of)
        assert not firsts & set(cell_of)  # no two columns share a value
        firsts |= set(cell_of)
        companions[column] = {value for cell in cell_of.values() for value in cell[1:]}
        assert len(companions[column]) <= cardinality
    assert len(set().union(*companions)) == sum(map(len, companions))


def test_everything_else_is_the_log_without_companions(made, tmp_path):
    """So the truth is, too: companions follow from the first value, and add nothing to what a row tells."""
    plain_truth = synthesize(tmp_path / "plain.tsv", rows=NUM_ROWS, seed=3, preset="criteo-1tb")
    plain_fixed, plain_sparse = cells_of(tmp_path / "plain.tsv")
    fixed, sparse = cells_of(made[0])
    assert fixed == plain_fixed
    stand_ins = [set() for _ in MULTI_HOT_SIZES]
    for row, plain in zip(sparse, plain_sparse, strict=True):
        for column, (cell, (value,)) in enumerate(zip(row, plain, strict=True)):
            if value:
                assert cell[0] == value
            else:
                stand_ins[column].add(cell[0])
    # A missing value is a value like others: one a column, which nothing else is.
    assert {len(found) for found in stand_ins} == {0, 1}
    assert not set().union(*stand_ins) & {value for row in plain_sparse for (value,) in row}
    assert (made[1].auc, made[1].logloss, made[1].splits) == (plain_truth.auc, plain_truth.logloss, plain_truth.splits)
    assert (made[1].multi_hot, plain_truth.multi_hot) == (made[2], None)


def test_uniform_companions_are_spread_evenly_and_pareto_ones_are_not():
    ranks = np.arange(BLOCK_ROWS, dtype=np.uint32)
    keys = np.random.default_rng(7).integers(2**32, size=25, dtype=np.uint32)
    even = draw_companions(ranks, keys, 1_000, "uniform")
    assert even.shape == (25, BLOCK_ROWS)
    counts = np.bincount(even.ravel().astype(int), minlength=1_000)
    assert len(counts) == 1_000
    assert abs(counts / even.size * 1_000 - 1).max() < 0.5  # 102 of each, by chance 10 more or less
    skewed = draw_companions(ranks, keys, 40_000_000, "pareto").ravel()
    assert skewed.max() < 40_000_000
    # NumPy's own draws, as the benchmark's are made.
    drawn = np.floor(np.random.default_rng(0).pareto(0.25, 10**6))
    for value in range(4):
        assert (skewed == value).mean() == pytest.approx((drawn == value).mean(), abs=0.01)
    assert (skewed > 10**5).mean() == pytest.approx((drawn % 40_000_000 > 10**5).mean(), abs=0.01)


def test_schema_next_to_the_log_sets_the_tables(made, tmp_path):
    cardinalities = [column.cardinality for column in PRESETS["criteo-1tb"].sparse]
    schema = load_schema(schema_path(made[0]))
    assert [column.hash for column in schema.sparse] == cardinalities
    assert [column.max_values or 1 for column in schema.sparse] == list(MULTI_HOT_SIZES)
    assert {column.kind for column in schema.sparse} == {"hex"}
    synthesize(tmp_path / "log.tsv.gz", rows=10, multi_hot=made[2], preset="criteo-1tb", max_embeddings=1_000)
    cut = load_schema(schema_path(tmp_path / "log.tsv.gz"))
    assert [column.hash for column in cut.sparse] == [min(rows, 1_000) for rows in cardinalities]
