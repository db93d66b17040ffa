"""A saved plan: read back as it was written, and refused with the reason where it does not match."""

import json
from dataclasses import replace

import pytest
import torch
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollection

from helpers.random_problems import problem
from torchdlrm.config import ModelConfig
from torchdlrm.errors import PlanError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.sharding.layout import sharding_plan, tables_of
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.plan_file import read_layout, write_plan
from torchdlrm.sharding.solution import solve
from torchdlrm.sharding.tables import Table

TABLES = (Table("t_a", 1000, 16), Table("t_b", 3, 16), Table("t_c", 50_000, 16))


def model(**rows):
    sizes = {table.name: table.rows for table in TABLES} | rows
    tables = [
        EmbeddingBagConfig(name=name, embedding_dim=16, num_embeddings=count, feature_names=[name])
        for name, count in sizes.items()
        if count
    ]
    return torch.nn.Sequential(EmbeddingBagCollection(tables=tables, device=torch.device("meta")))


@pytest.fixture
def saved(tmp_path):
    """A plan for 4 GPUs in which t_b, of three rows, leaves a rank without any."""
    solution = solve(problem(TABLES, 4, batch=1024, constraints=("t_b=row_wise",)))
    write_plan(tmp_path / "plan.json", solution)
    return tmp_path / "plan.json", solution.problem.machine, solution


@pytest.fixture
def cached(tmp_path):
    """A plan for a GPU with so little memory that a table is in that of the host, and its layout."""
    # Dense parts that leave most of so little memory to the tables.
    small = ModelConfig(embedding_dim=16, dense_arch_layer_sizes=(16,), over_arch_layer_sizes=(8, 1))
    asked = problem(TABLES, 1, batch=1024, cache_fraction=0.1, shape=ModelShape(small, 13, len(TABLES)))
    solution = solve(replace(asked, machine=replace(asked.machine, hbm_bytes=3_000_000)))
    write_plan(tmp_path / "plan.json", solution)
    return tmp_path / "plan.json", solution.problem.machine, solution.layout


def test_a_saved_plan_is_read_back_as_it_was_written(saved):
    path, machine, solution = saved
    assert read_layout(path, TABLES, machine) == solution.layout
    plan = sharding_plan(solution.layout, model(), machine)
    (tables,) = plan.plan.values()
    for name, placed in solution.layout.items():
        assert tables[name].sharding_type == placed.sharding_type
        assert [shard.placement.rank() for shard in tables[name].sharding_spec.shards] == placed.ranks


@pytest.mark.parametrize(
    ("rows", "devices", "reason"),
    [
        ({}, 2, "it is for 4 rank(s), there are 2"),
        ({}, 8, "it is for 4 rank(s), there are 8"),
        ({"t_c": 49_999}, 4, "t_c: the plan is for 50,000 rows of 16, the model has 49,999 of 16"),
        ({"t_d": 7}, 4, "t_d: the model has it, the plan does not"),
        ({"t_a": 0}, 4, "t_a: the plan has it, the model does not"),
    ],
)
def test_a_plan_for_another_model_or_world_size_is_refused(saved, rows, devices, reason):
    path, _, _ = saved
    with pytest.raises(PlanError) as failure:
        read_layout(path, tables_of(model(**rows)), device_named("a100-80gb").spread(devices))
    assert reason in str(failure.value)
    assert str(path) in str(failure.value)


def test_tables_that_gpus_cache_are_refused_on_cpu(cached):
    with pytest.raises(PlanError, match="t_c: unknown kernel 'fused_uvm_caching', or not for cpu"):
        read_layout(cached[0], TABLES, device_named("cpu").spread(1))


@pytest.mark.parametrize("kind", ["table_row_wise", "grid_shard"])
def test_tables_cut_within_a_host_are_refused_where_hosts_have_another_number_of_ranks(kind, tmp_path):
    asked = problem(TABLES, 4, "cpu", 2, "adagrad", 1024, constraints=(f"t_c={kind}",))
    path = tmp_path / "plan.json"
    write_plan(path, solve(asked))
    read_layout(path, TABLES, asked.machine)
    with pytest.raises(PlanError, match=rf"t_c: {kind} needs its shards on all 4 rank\(s\) of a host"):
        read_layout(path, TABLES, device_named("cpu").spread(4))


@pytest.mark.parametrize("change", ["gap", "overlap", "rank", "version", "key", "text"])
def test_a_damaged_plan_is_refused(saved, change):
    path, machine, _ = saved
    content = json.loads(path.read_text())
    first = content["tables"]["t_b"]["shards"]
    if change == "gap":
        first.pop(0)
    elif change == "overlap":
        first[1]["offsets"] = first[0]["offsets"]
    elif change == "rank":
        first[0]["rank"] = 9
    elif change == "version":
        content["format_version"] = 99
    elif change == "key":
        del content["tables"]["t_a"]["shards"]
    path.write_text("{" if change == "text" else json.dumps(content))
    with pytest.raises(PlanError):
        read_layout(path, TABLES, machine)


def test_a_plan_of_the_first_format_version_is_read(cached):
    path, machine, layout = cached
    content = json.loads(path.read_text())
    content |= {"format_version": 1, "host_cache_share": content.pop("cache_fraction")}
    for table in content["tables"].values():
        table["cache_share"] = table.pop("cache_fraction")
    path.write_text(json.dumps(content))
    assert any(placed.cache_fraction for placed in layout.values())
    assert read_layout(path, TABLES, machine) == layout


def test_the_json_adds_up(saved):
    path, _, solution = saved
    content = json.loads(path.read_text())
    for key in ("weight_bytes", "state_bytes", "activation_bytes", "total_bytes"):
        assert sum(rank[key] for rank in content["ranks"]) == content["total"][key]
        assert sum(table[key] for table in content["tables"].values()) == content["total"][key]
    assert content["estimate"]["step_ms"] == pytest.approx(solution.step_ms)
