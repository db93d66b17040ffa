"""Dimensions under a number of bytes, and quotients and remainders, compared with sums by hand and with all others."""

import itertools
from dataclasses import replace

import pytest

from helpers.random_problems import problem as problem_with
from torchdlrm.config import FeatureConfig, load_config
from torchdlrm.errors import ConfigError, PlanError
from torchdlrm.features.tables import Feature
from torchdlrm.planning.plan import problem_of
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.planning.remedies import remedies
from torchdlrm.planning.smaller_tables import with_quotients, with_smaller_dims
from torchdlrm.sharding.solution import try_solve
from torchdlrm.sharding.tables import Table, preset_tables, tables_of_model

KAGGLE = problem_with(preset_tables("criteo-kaggle", 128), 1)


def size_bytes(tables):
    """Weights, a value of state a row, and projections, all in float32."""
    return sum(4 * (t.rows * (t.dim + 1) + (128 * t.dim if t.dim < 128 else 0)) for t in tables)


@pytest.mark.parametrize(("max_bytes", "alpha"), [(8e9, 0.3), (2e9, 0.1), (3e9, 0.0)])
def test_dimensions_are_those_of_the_largest_factor_that_fits(max_bytes, alpha):
    """Which is looked for among many factors: d = factor * rows^-alpha, rounded to the nearest ratio."""
    tables, levels = KAGGLE.tables, (4, 8, 16, 32, 64, 128)

    def rounded(table, factor):
        wanted = factor * table.rows**-alpha
        dim = next((low for low, high in itertools.pairwise(levels) if wanted < (low * high) ** 0.5), 128)
        return replace(table, dim=dim if table.rows > 200 else 128)

    tried = [[rounded(table, 1.004**power) for table in tables] for power in range(300, 2_500)]
    expected = max((made for made in tried if size_bytes(made) <= max_bytes), key=size_bytes)
    found = with_smaller_dims(KAGGLE, max_bytes, alpha)
    if alpha:  # equal for all else: of tables with the same step the first ones may take it
        assert list(found.tables) == expected
    assert size_bytes(expected) <= size_bytes(found.tables) <= max_bytes
    smaller = {t.name.removeprefix("t_"): FeatureConfig(embedding_dim=t.dim) for t in found.tables if t.dim < 128}
    assert found.shape.config.features == smaller


def test_what_fits_stays_and_what_cannot_fit_is_said():
    assert with_smaller_dims(KAGGLE, size_bytes(KAGGLE.tables)) == KAGGLE
    assert with_smaller_dims(KAGGLE, 0.5e9) is None
    with pytest.raises(PlanError, match="even with dimension 4 the tables take more than 500 MB"):
        problem_of(PlanRequest(tables="criteo-kaggle", table_bytes="0.5GB"), load_config(None))
    with pytest.raises(PlanError, match=r"`alpha`: .* under `table_bytes`; give that too"):
        problem_of(PlanRequest(tables="criteo-kaggle", alpha=0.2), load_config(None))
    with pytest.raises(PlanError, match="`alpha`: must be from 0 to 10, got -1"):
        problem_of(PlanRequest(tables="criteo-kaggle", table_bytes="1GB", alpha=-1.0), load_config(None))


def test_as_few_tables_as_are_needed_are_divided_and_multiplied_only_where_cells_have_one_value():
    tables = (Table("t_a", 1_001, 128), Table("t_b", 900, 128, 3.0), Table("t_c", 90, 128), Table("t_d", 800, 128))
    problem = problem_with(tables, 1, multi_valued=frozenset({"t_d"}))
    found = with_quotients(problem, problem.table_bytes - 516 * 1_300, 4)
    assert {(t.name, t.rows, t.pooling_factor) for t in found.tables} == {
        *(("t_a_q", 251, 1.0), ("t_a_r", 4, 1.0), ("t_b_q", 225, 3.0), ("t_b_r", 4, 3.0)),
        *(("t_c", 90, 1.0), ("t_d", 800, 1.0)),
    }
    assert {name: f.quotient_remainder for name, f in found.shape.config.features.items()} == {"a": "mult", "b": "add"}
    all_of_them = with_quotients(problem, 516 * 800, 4)
    assert all_of_them.shape.config.features["d"].quotient_remainder == "add"
    assert with_quotients(problem, 516 * 10, 4) is None


def test_what_becomes_of_the_values_of_a_list_stays():
    """And a table whose single rows are looked up is not divided."""
    config = KAGGLE.shape.config.with_features({"history": FeatureConfig(pooling="last")})
    features = Feature("history", 1_000_000, is_multi_valued=True, max_values=3), Feature("item", 900_000)
    shape = replace(KAGGLE.shape, config=config, num_sparse=2, known_features=features)
    asked = replace(KAGGLE, shape=shape, tables=tuple(tables_of_model(shape.tables)))
    smaller = with_smaller_dims(asked, asked.table_bytes / 4).shape.config.features
    assert smaller["history"].pooling == "last"
    assert smaller["history"].embedding_dim < 128
    divided = with_quotients(asked, asked.table_bytes * 0.7, 4).shape.config.features
    assert divided["item"].quotient_remainder == "mult"
    assert divided["history"] == FeatureConfig(pooling="last")


def test_products_that_project_are_counted():
    small = with_smaller_dims(KAGGLE, 2e9)
    dims = [table.dim for table in small.tables if table.dim < 128]
    assert small.shape.multiply_adds - KAGGLE.shape.multiply_adds == sum(128 * dim for dim in dims)
    assert small.shape.num_weights - KAGGLE.shape.num_weights == sum(128 * dim for dim in dims)
    assert small.shape.num_activations - KAGGLE.shape.num_activations == sum(dims)


def test_both_are_offered_where_tables_do_not_fit_and_both_are_true():
    problem = replace(KAGGLE, machine=replace(KAGGLE.machine, hbm_bytes=10 * 10**9))
    found = {
        name: r
        for r in remedies(problem)
        for name in ("embedding_dim", "quotient_remainder")
        if name in str(r.settings)
    }
    assert set(found) == {"embedding_dim", "quotient_remainder"}
    for remedy in found.values():
        config = load_config(None, {name: str(value) for name, value in remedy.settings.items()})
        request = PlanRequest(tables="criteo-kaggle", devices=1, device="a100-80gb", hbm="10GB")
        config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size_global": 65_536})})
        again = problem_of(request, config)
        assert again.tables == remedy.solution.problem.tables
        assert again.table_bytes == remedy.as_dict()["table_bytes"] < 0.85 * 10e9
        assert try_solve(again) is not None


def test_features_of_a_preset_are_checked():
    config = load_config(
        None, {"model.features.cat_26.embedding_dim": "8", "model.features.cat_20.quotient_remainder": "mult"}
    )
    with pytest.raises(ConfigError) as error:
        problem_of(PlanRequest(tables="mlperf-dcnv2"), config)
    assert "there is no sparse feature cat_26" in str(error.value)
    assert "cat_20 may have several values a cell" in str(error.value)
