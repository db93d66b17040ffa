"""A plan as one call, and what is said when tables do not fit, checked by planning again with what it says."""

import doctest
import math
from dataclasses import replace

import pytest

import torchdlrm.planning.plan
from helpers.random_problems import problem
from torchdlrm.config import load_config
from torchdlrm.errors import PlanError
from torchdlrm.planning.page import plan_page
from torchdlrm.planning.plan import plan
from torchdlrm.planning.plan_request import PlanRequest
from torchdlrm.planning.remedies import remedies, shortfall
from torchdlrm.planning.side_by_side import sweep
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.plan_json import read_plan
from torchdlrm.sharding.solution import solve, try_solve
from torchdlrm.sharding.tables import check_tables, preset_tables, read_tables


def asked(devices=4, optimizer="rowwise_adagrad", preset="criteo-1tb-40m"):
    return problem(preset_tables(preset, 128), devices, optimizer=optimizer)


def test_4_gpus_are_too_few_for_26_tables_of_40_million_and_it_says_by_how_much():
    missing = shortfall(asked())
    assert missing.needed_bytes == 26 * 40_000_000 * (128 * 4 + 4)
    assert missing.usable_bytes == 4 * 68 * 10**9
    assert missing.missing_bytes == missing.needed_bytes - missing.usable_bytes
    assert missing.rank_missing_bytes == math.ceil(missing.missing_bytes / 4)
    assert "264.6 GB are missing" in missing.message(asked())


@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad", "adagrad", "adam"])
def test_at_least_three_remedies_hold_when_planned_again(optimizer):
    found = remedies(asked(optimizer=optimizer))
    assert len(found) >= 3
    for remedy in found:
        again = solve(remedy.solution.problem)
        assert max(cost.device_bytes for cost in again.ranks) <= 0.85 * 80e9
        assert remedy.price


def test_the_fewest_devices_are_the_fewest():
    (first, *_) = remedies(asked())
    assert first.settings == {"devices": 8, "hosts": 1}
    for fewer in range(4, 8):
        assert try_solve(replace(asked(), machine=device_named("a100-80gb").spread(fewer))) is None


def test_a_leaner_optimizer_is_offered_where_it_is_enough():
    found = remedies(asked(devices=8, optimizer="adagrad"))
    assert any(remedy.settings == {"optimizer": "rowwise_adagrad"} for remedy in found)


def test_a_sweep_says_from_where_on_tables_fit():
    points = sweep(asked(), ["devices=1,2,4,8,16", "batch=8192,65536"])
    assert [point["num_devices"] for point in points if not point["fits"]] == [1, 2, 4] * 2
    for point in points:
        if point["fits"]:
            hourly = 3600 * point["batch_size_global"] / (point["step_ms"] / 1000) / point["num_devices"]
            assert point["rows_per_device_hour"] == pytest.approx(hourly)


@pytest.mark.parametrize("axis", ["devices=0", "devices=", "hosts=2", "devices=a", "batch=-1", "batch=1,,2"])
def test_a_wrong_axis_is_refused(axis):
    with pytest.raises(PlanError, match="`sweep`"):
        sweep(asked(), [axis])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("rows\n-5\n", "rows must be from 1"),
        ("rows,dim\n5,10\n", "multiple of 4"),
        ("rows,pooling_factor\n5,0\n", "pooling_factor must be above 0"),
        ("rows\nmany\n", "expected a number, got 'many'"),
        ("row\n5\n", "not one of name, rows, dim, pooling_factor"),
        ("name,rows\na,5\na,6\n", "two tables have this name"),
        ("rows\n", "there is no table"),
    ],
)
def test_a_wrong_table_file_is_refused(tmp_path, content, words):
    path = tmp_path / "tables.csv"
    path.write_text(content)
    with pytest.raises(PlanError) as failure:
        check_tables(read_tables(path, 16), str(path))
    assert words in str(failure.value)


def test_a_plan_for_gpus_that_are_not_here_says_that_a_machine_can_be_named():
    with pytest.raises(
        PlanError, match=r"train.device = cuda: .* or name a machine that need not be here \(`device`\)"
    ):
        plan(PlanRequest(tables="criteo-1tb", device="here"), load_config(None, {"train.device": "cuda"}))


def test_the_example_of_plan_is_what_it_returns():
    assert doctest.testmod(torchdlrm.planning.plan).attempted
    assert doctest.testmod(torchdlrm.planning.plan).failed == 0


def test_a_plan_of_a_run_takes_the_runs_config_and_tables(small_run):
    solution = plan(PlanRequest(run=small_run, device="a100-80gb", devices=2))
    config = load_config(small_run / "config.toml", is_of_run=True)
    assert solution.problem.batch_size_global == config.train.batch_size_global
    assert set(solution.layout) == set(read_plan(small_run / "plan.json")["tables"])
    with pytest.raises(PlanError, match="`run` and `tables`: give one of `dataset`, `run` and `tables`"):
        plan(PlanRequest(run=small_run, tables="criteo-1tb"))


def test_a_page_shows_names_as_text_and_every_shard_as_a_block(tmp_path):
    path = tmp_path / "tables.csv"
    path.write_text("name,rows\n<script>a,1000\nb,500\n")
    solution = plan(PlanRequest(tables=str(path), devices=2))
    page = plan_page(solution)
    assert "<script" not in page
    assert "&lt;script&gt;a: " in page
    shards = [shard for placed in solution.layout.values() for shard in placed.shards if shard.num_values]
    assert page.count("<rect") == len(shards) + (2 + 3) * 2  # state, activations; forward, backward, exchange
