"""`dlrm plan` as its users run it, and training that obeys it."""

import json
import re
import tomllib

import pytest
from rich.console import Console

from torchdlrm.cli.main import app
from torchdlrm.errors import PlanError

CONFIG = """
[model]
embedding_dim = 16
dense_arch_layer_sizes = [32, 16]
over_arch_layer_sizes = [32, 1]
[train]
batch_size_global = 512
max_steps = 2
[logging]
tensorboard = false
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(CONFIG)
    return path


def placed(plan):
    return {name: (table["sharding_type"], table["shards"]) for name, table in plan["tables"].items()}


@pytest.fixture
def plan(capsys, monkeypatch):
    """Runs the verb in this process, which has torch already, and gives back what a program and a person would read."""

    monkeypatch.setattr("torchdlrm.cli.terminal.console", Console(stderr=True, highlight=False, width=200))

    def run(*arguments):
        app(["plan", *map(str, arguments)], exit_on_error=False)
        return capsys.readouterr()

    return run


@pytest.mark.slow
def test_a_saved_plan_is_obeyed_and_refused_on_another_world_size(dlrm, plan, config, small_dataset, tmp_path):
    path = tmp_path / "plan.json"
    rules = ["--constraint", "cat_0@1", "--constraint", "cat_1@0,1"]
    plan(config, "--dataset", small_dataset.path, "--devices", 2, "--out", path, *rules)
    train = ["train", str(config), "--dataset", str(small_dataset.path), "--plan", str(path)]
    with pytest.raises(PlanError, match=r"it is for 2 rank\(s\), there are 1"):
        app([*train, "--run", str(tmp_path / "one")], exit_on_error=False)
    assert not (tmp_path / "one").exists()
    done = dlrm(*train, "--run", tmp_path / "two", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    used = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert placed(used) == placed(json.loads(path.read_text()))
    assert used["tables"]["t_cat_0"]["ranks"] == [1]
    assert used["tables"]["t_cat_1"]["ranks"] == [0, 1]


def test_a_plan_is_written_as_json_and_as_one_page_that_fetches_nothing(plan, tmp_path):
    asked = ["--tables", "criteo-1tb-40m", "--devices", 8, "--hbm", "80GB", "--json"]
    shown = plan(*asked, "--out", tmp_path / "plan.json", "--html", tmp_path / "plan.html")
    assert json.loads(shown.out) == json.loads((tmp_path / "plan.json").read_text())
    for words in ("bottleneck", "t_cat_25", "532.5 GB", "lower bound", "rows/s", "█"):
        assert words in shown.err
    page = (tmp_path / "plan.html").read_text()
    assert page.count("<rect") > 26
    assert not re.search(r"(src|href)=|https?://|<script", page)
    compared = plan("--compare", tmp_path / "plan.json", tmp_path / "plan.json", "--json")
    assert json.loads(compared.out)["tables"] == []


def test_rates_measured_with_more_tables_than_ranks_replace_those_of_the_datasheet(plan, tmp_path):
    (tmp_path / "tables.csv").write_text("rows,dim\n" + "1000,16\n" * 3)
    small = ["--model.embedding-dim", 16, "--model.dense-arch-layer-sizes", "16", "--train.batch-size-global", 64]
    shown = plan("--tables", tmp_path / "tables.csv", "--device", "here", "--devices", 2, "--measure", "--json", *small)
    answer = json.loads(shown.out)
    assert answer["machine"]["source"] == "measured on this machine"
    assert answer["estimate"]["dense"]["compute_ms"] > 0
    assert "measured on this machine" in shown.err


def test_tables_that_do_not_fit_get_a_clear_no_and_what_helps(dlrm):
    done = dlrm("plan", "--tables", "criteo-1tb-40m", "--devices", 4, "--hbm", "80GB", "--json")
    assert done.returncode == 2
    assert "264.6 GB are missing" in done.stderr
    answer = json.loads(done.stdout)
    assert answer["fits"] is False
    assert len(answer["remedies"]) >= 3


def test_dimensions_under_a_number_of_bytes_are_shown_as_toml_that_gives_the_same_plan(plan, tmp_path):
    shown = plan("--tables", "criteo-kaggle", "--table-bytes", "2GB", "--json")
    answer = json.loads(shown.out)
    assert answer["fits"] is True
    assert sum(t["weight_bytes"] + t["state_bytes"] for t in answer["tables"].values()) <= 2e9
    (tmp_path / "smaller.toml").write_text(shown.err[shown.err.index("[model.features.") :].partition("--measure")[0])
    assert tomllib.loads((tmp_path / "smaller.toml").read_text())["model"]["features"] == answer["features"]
    again = json.loads(plan(tmp_path / "smaller.toml", "--tables", "criteo-kaggle", "--json").out)
    assert again["tables"] == answer["tables"]


def test_a_sweep_fits_a_terminal_of_80_columns(plan, monkeypatch):
    monkeypatch.setattr("torchdlrm.cli.terminal.console", Console(stderr=True, highlight=False, width=80))
    shown = plan("--tables", "criteo-1tb-40m", "--sweep", "devices=4,8", "batch=8192", "--json")
    lines = [line.split() for line in shown.err.splitlines()]
    assert ["4", "8,192", "no", "264.6", "GB", "missing"] in lines
    point = json.loads(shown.out)["sweep"][1]
    assert [line[-1] for line in lines if line[:3] == ["8", "8,192", "yes"]] == [
        f"{point['rows_per_device_hour']:,.0f}"
    ]
