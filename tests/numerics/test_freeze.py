"""Frozen parts do not change by a bit, weights and optimizer state, and all others learn."""

from pathlib import Path

import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    EmbeddingLocation,
    SplitTableBatchedEmbeddingBagsCodegen,
)

from helpers.trainings import state
from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError
from torchdlrm.model.architecture import ModelShape
from torchdlrm.tables.state import FrozenTables
from torchdlrm.training.job import train
from torchdlrm.training.sharded import check_freeze

FINAL_NET = f"{Path(__file__).parents[2] / 'examples' / 'finalnet.py'}:FinalNet"
# Weight decay reaches parameters and rows whose gradient is zero, too.
SETTINGS = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "16,8",
    "model.over_arch_layer_sizes": "16,1",
    "table_optimizer.weight_decay": "0.1",
    "dense_optimizer.weight_decay": "0.1",
    "logging.tensorboard": "false",
    "validation.max_rows": "64",
    "checkpoint.every_steps": "1",
    "checkpoint.keep_last": "2",
}
SMALLER = {
    "model.features": '{cat_1 = {embedding_dim = 4}, cat_2 = {quotient_remainder = "add", num_collisions = 3}}',
    "table_optimizer.name": "adam",
    "table_optimizer.weight_decay_mode": "lazy",
    "dense_optimizer.name": "adamw",
}
CASES = {
    "tables": ({}, "tables", lambda name: ".t_" in name and "projections" not in name),
    "dense": ({}, "dense", lambda name: ".t_" not in name),
    "module": ({}, "over_arch", lambda name: ".over_arch." in name),
    "one_layer": ({}, "dense_arch.model._mlp.0", lambda name: ".dense_arch.model._mlp.0." in name),
    "features": (
        SMALLER,
        "cat_1,cat_2",
        lambda name: any(f".t_cat_{which}" in name for which in ("1.", "2_q.", "2_r.")),
    ),
}


def changed(run, tmp_path):
    """The names of all tensors of a run, and of those that its last step has changed."""
    last = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    before, after = (state(run, tmp_path, step) for step in (last - 1, last))
    names = {name for name in before if "param_groups" not in name}
    return names, {name for name in names if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize("case", CASES)
def test_frozen_parts_stay_and_all_others_learn(case, small_dataset, tmp_path):
    changes, freeze, is_frozen = CASES[case]
    config = load_config("criteo-small", {**SETTINGS, **changes, "train.freeze": freeze, "train.max_steps": "3"})
    train(config, small_dataset, tmp_path / "run")
    names, learnt = changed(tmp_path / "run", tmp_path)
    frozen = {name for name in names if is_frozen(name)}
    assert any(name.startswith("optimizer") for name in frozen)
    assert learnt == names - frozen


def test_running_statistics_of_frozen_modules_stay(small_dataset, tmp_path):
    """Also after a validation, which sets the model into evaluation mode and back."""
    config = {**SETTINGS, "train.max_steps": "3", "validation.every_steps": "1"}
    train(load_config("criteo-small", config), small_dataset, tmp_path / "first", model_class=FINAL_NET)
    assert any("running_mean" in name for name in changed(tmp_path / "first", tmp_path)[1])
    frozen = load_config("criteo-small", {**config, "train.freeze": "dense", "warm_start.checkpoint": "last"})
    train(frozen, small_dataset, tmp_path / "second", from_run=tmp_path / "first", model_class=FINAL_NET)
    names, learnt = changed(tmp_path / "second", tmp_path)
    assert learnt == {name for name in names if ".t_" in name}
    first, second = (state(tmp_path / name, tmp_path, 3) for name in ("first", "second"))
    buffers = [name for name in names if "running_" in name]
    assert buffers
    assert all(torch.equal(first[name], second[name]) for name in buffers)


def test_kernels_of_fbgemm_update_all_of_their_tables_or_none(seed):
    specs = [(9, 8, EmbeddingLocation.HOST, ComputeDevice.CPU), (5, 4, EmbeddingLocation.HOST, ComputeDevice.CPU)]
    options = {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 0.1, "table_names": ["t_a", "t_b"]}
    ids, offsets = torch.tensor([1, 2, 3, 4]), torch.arange(5)
    found = []
    for kind in (FrozenTables, SplitTableBatchedEmbeddingBagsCodegen):
        torch.manual_seed(seed)
        tables = kind(specs, **options)
        tables.init_embedding_weights_uniform(-1.0, 1.0)
        before = tables.weights_host.clone()
        found.append(tables(ids, offsets))
        found[-1].sum().backward()  # other ranks may wait for it
        assert torch.equal(tables.weights_host, before) == (kind is FrozenTables)
    assert torch.equal(*found)


def test_some_tables_are_not_frozen_on_gpus_before_anything_is_written(small_dataset):
    config = load_config("criteo-small", {**SETTINGS, "train.freeze": "cat_1"})
    shape = ModelShape.of(config.model, small_dataset)
    check_freeze(config, shape, torch.device("cpu"))
    with pytest.raises(
        ConfigError, match=r"^train.freeze: on GPUs .* this names t_cat_1; freeze tables, all of them, or"
    ):
        check_freeze(config, shape, torch.device("cuda", 0))
    whole = config.model_copy(update={"train": config.train.model_copy(update={"freeze": ("tables",)})})
    check_freeze(whole, shape, torch.device("cuda", 0))
