"""Machines of one training must have been started with the same settings: what is compared, and what is said."""

import json
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist

from torchdlrm.config import load_config, settings
from torchdlrm.config.sections import ANY_FEATURE
from torchdlrm.errors import ConfigError, DatasetError, LostProcessError
from torchdlrm.model.architecture import built_in
from torchdlrm.training.processes.agreement import agree, find_problems, settings_of

CPU = torch.device("cpu")


@pytest.fixture
def nodes(small_dataset, monkeypatch):
    """Settings of two machines, by the overrides and options of each, as they stand in the store."""
    of_torch = (("GROUP_WORLD_SIZE", "2"), ("GROUP_RANK", "0"))
    of_all = (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
    for name, value in (*of_torch, *of_all):
        monkeypatch.setenv(name, value)

    def record(overrides=(), *, dataset=small_dataset, restart=False):
        config = load_config(None, dict(overrides))
        return {"host": "a", "settings": settings_of(config, dataset, built_in("dot"), restart=restart)}

    return record


CHANGES = {
    "seed": "7",
    "table_optimizer.learning_rate": "0.3",
    "dense_optimizer.name": "sgd",
    "train.timeout_s": "5",
    "train.batch_size_global": "128",
    "model.over_arch_layer_sizes": "[8, 1]",
    "logging.every_steps": "7",
    "logging.profile_steps": "20",
    "checkpoint.every_steps": "9",
    "stop.target_auc": "0.8",
    "sharding.constraints": "['t_cat_3=row_wise']",
}


def test_every_key_of_the_config_is_compared(nodes):
    of_features = {
        "model.features.cat_3.embedding_dim": "4",
        "model.features.cat_4.quotient_remainder": "add",
        "model.features.cat_4.num_collisions": "8",
        "model.settings.num_heads": "4",
        "train.labels": "click,purchase",
        "model.heads.after.purchase": "click",
    }
    known = {name for name, _ in settings() if ANY_FEATURE not in name} - {"model.settings", "model.heads.after"}
    assert known | of_features.keys() <= nodes(of_features)["settings"].keys()
    assert find_problems([nodes(), nodes()], 0) == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_key_that_differs_is_named_with_both_values_and_who_has_them(nodes, name):
    value = CHANGES[name]
    before, now = nodes()["settings"][name].shown, nodes({name: value})["settings"][name].shown
    assert value in now or value[0] == "["
    first, problem, remedy = find_problems([nodes(), nodes({name: value})], 1)
    assert first == "the machines of this training were started with different settings:"
    assert problem == f"{name}: {before} on node 0 (a); {now} on node 1 (a, this one)"
    assert "the same command" in remedy


def test_content_counts_and_not_where_it_is(nodes, small_dataset, tmp_path):
    """Machines may have the dataset, or a plan, in different folders; another dataset or plan is another setting."""
    for folder, text in (("one", "{}"), ("two", "{}"), ("three", "{ }")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "plan.json").write_text(text)
    one, two, three = (nodes({"sharding.plan": str(tmp_path / n / "plan.json")}) for n in ("one", "two", "three"))
    assert find_problems([one, two], 0) == []
    (problem,) = find_problems([one, three], 0)[1:-1]
    assert problem.startswith(f"sharding.plan: {tmp_path}/one/plan.json (sha256 ")
    assert f"; {tmp_path}/three/plan.json (sha256 " in problem
    with pytest.raises(ConfigError, match=r"nowhere.json: cannot be read: No such file"):
        nodes({"sharding.plan": "nowhere.json"})

    class Elsewhere:
        path = tmp_path / "one"

    (tmp_path / "one" / "dataset.json").write_bytes((small_dataset.path / "dataset.json").read_bytes())
    assert find_problems([nodes(), nodes(dataset=Elsewhere)], 0) == []
    (tmp_path / "one" / "dataset.json").write_text("{}")
    (problem,) = find_problems([nodes(), nodes(dataset=Elsewhere)], 0)[1:-1]
    assert problem.startswith(f"`dataset`: {small_dataset.path}/dataset.json (sha256 ")
    assert find_problems([nodes(), nodes(restart=True)], 0)[1].startswith("`restart`: False on node 0 (a, this one)")


def test_many_machines_are_told_by_value():
    records = [{"host": f"h{i}", "settings": {"seed": ("9", "9") if i == 6 else ("1", "1")}} for i in range(8)]
    expected = "seed: 1 on node 0 (h0), node 1 (h1), node 2 (h2) and 4 more; 9 on node 6 (h6, this one)"
    assert find_problems(records, 6)[1] == expected


def test_what_the_launcher_and_the_versions_say_is_compared_before_the_ranks_talk(nodes, monkeypatch):
    """Through a real store: both machines raise the same, also the one whose own settings are right."""
    store = dist.HashStore()
    other = {"host": "b", "settings": {**nodes()["settings"]}}
    store.set("1", json.dumps(other))
    with pytest.raises(ConfigError) as caught:
        agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=1)
    assert caught.value.is_everywhere
    for text in (f"version of torch: {torch.__version__} on node 0", "`nproc_per_node`: 1 on", "device: cpu on"):
        assert text in str(caught.value)
    mine = json.loads(store.get("0"))
    store.set("1", json.dumps({**mine, "host": "b"}))
    agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"`nproc_per_node`: 2 on node 0 .*, this one\); 1 on node 1 \(b\)"):
        agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=1)


def test_a_machine_that_cannot_take_part_ends_the_others(nodes, monkeypatch):
    store = dist.HashStore()
    store.set("1", json.dumps({"host": "b", "problem": "/data: is not a folder"}))
    with pytest.raises(ConfigError, match=r"node 1 \(b\): /data: is not a folder"):
        agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=1)

    def refuse():
        message = "mine"
        raise DatasetError(message)

    with pytest.raises(DatasetError, match=r"^mine$"):
        agree(store, refuse, device=CPU, timeout_s=1)
    assert json.loads(store.get("0"))["problem"] == "mine"


def test_launchers_that_only_number_the_processes_will_do(nodes, monkeypatch):
    monkeypatch.delenv("GROUP_WORLD_SIZE")
    monkeypatch.delenv("GROUP_RANK")
    store = dist.HashStore()
    for rank, local_rank in (("2", "0"), ("3", "1")):
        for name, value in (("RANK", rank), ("WORLD_SIZE", "4"), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", "2")):
            monkeypatch.setenv(name, value)
        store.set("0", json.dumps({"host": "b", "problem": "no disk"}))
        with pytest.raises(ConfigError, match=r"node 0 \(b\): no disk"):
            agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=1)
    assert json.loads(store.get("1"))["settings"]["`nnodes`"] == ["2", "2"]


def test_a_machine_that_does_not_come_is_named(nodes, monkeypatch):
    monkeypatch.setattr("torchdlrm.training.processes.agreement._LEAST_WAIT_S", 0.1)
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.1))
    with pytest.raises(LostProcessError, match=r"node 1 of 2 has joined the job and then said nothing for 0.1 s"):
        agree(store, lambda: nodes()["settings"], device=CPU, timeout_s=0.1)
