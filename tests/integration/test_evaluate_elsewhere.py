"""A run is evaluated on any machine: whatever optimizer, constraints, plan and processes it was trained with."""

import json
import shutil

import pytest
import torch

from helpers.trainings import two_nodes
from torchdlrm import evaluate
from torchdlrm.cli.evaluate import evaluate as command
from torchdlrm.config import ShardingConfig, config_toml
from torchdlrm.errors import ConfigError, PlanError
from torchdlrm.tables.optimizers import table_kernels
from torchdlrm.training.run import Run


@pytest.fixture
def trained_with(small_run, tmp_path):
    """Makes a copy of `small_run` whose config says that it was trained with other settings of a section."""

    def make(section, **settings):
        path = tmp_path / "run"
        shutil.copytree(small_run, path)
        config = Run.open(path).config
        changed = getattr(config, section).model_copy(update=settings)
        (path / "config.toml").write_text(config_toml(config.model_copy(update={section: changed})))
        return path

    return make


@pytest.fixture(scope="module")
def expected(small_run):
    return evaluate(small_run, split="val+test")


@pytest.mark.parametrize(
    ("section", "settings"),
    [
        ("table_optimizer", {"name": "adam"}),
        ("table_optimizer", {"name": "partial_rowwise_lamb"}),
        ("sharding", {"constraints": ("cat_0@1",)}),
        ("sharding", {"constraints": ("cat_*=grid_shard",)}),
        ("sharding", {"plan": "plan-of-another-machine.json"}),
        ("sharding", {"hbm_bytes": 1000, "host_memory_bytes": 1000}),
    ],
)
def test_what_the_training_asked_of_its_machine_is_not_asked_of_another(trained_with, expected, section, settings):
    assert evaluate(trained_with(section, **settings), split="val+test") == expected


def test_rules_of_its_own_are_followed(small_run):
    with pytest.raises(PlanError, match="rank 1 is not among 0 to 0"):
        evaluate(small_run, sharding=ShardingConfig(constraints=("cat_0@1",)))
    with pytest.raises(PlanError, match=r"the tables do not fit on 1 rank\(s\) with [01] B each"):
        command(small_run, "--sharding.host-memory-bytes", "1kB")


def test_an_option_that_is_none_is_refused_with_what_was_meant(small_run):
    with pytest.raises(ConfigError) as caught:
        command(small_run, "--splt", "val", "--train.epochs", "2")
    first, second = str(caught.value).splitlines()
    assert first == "--splt: dlrm evaluate has no such option; did you mean --split?"
    assert second == "--train.epochs: dlrm evaluate overrides sharding.* alone; the run keeps its config"


def test_no_state_of_an_optimizer_is_allocated_and_no_product_is_rounded(small_run, monkeypatch):
    from torchdlrm.evaluation import split_rows as module

    seen = {}

    def spy(model, *args):
        seen["state"] = [kernel.split_optimizer_states() for kernel in table_kernels(model)]
        return original(model, *args)

    original = module.predict_loaders
    monkeypatch.setattr(module, "predict_loaders", spy)
    torch.set_float32_matmul_precision("medium")
    try:
        rounded = evaluate(small_run, split="test")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert rounded == evaluate(small_run, split="test")
    assert [values for states in seen["state"] for values in states if values] == []


@pytest.mark.slow
def test_two_machines_evaluate_together_what_one_process_does(small_run, expected):
    nodes = two_nodes("--split", "val+test", "--json", verb=("evaluate", small_run))
    (first, second) = (node.wait() for node in nodes)
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    # Output holds both streams: JSON is the last line of one of them, the other says nothing.
    told = [json.loads(line) for _, output in (first, second) for line in output.splitlines() if line.startswith("{")]
    (result,) = told
    for name, interval in expected["intervals"].items():
        assert result["intervals"][name] == pytest.approx(interval, abs=1e-6), name
        assert result[name] == pytest.approx(expected[name], abs=1e-6), name
    assert result.keys() == expected.keys()


def test_a_split_that_is_named_twice_is_refused(small_run):
    with pytest.raises(ConfigError, match=r"`split`: val\+test\+val names a split twice"):
        evaluate(small_run, split="val+test+val")
