"""The rows that tables begin with: the same on any number of processes, and of the scale that the config says."""

import json

import numpy as np
import pytest
import torch

from helpers.trainings import state
from torchdlrm.bundle.manifest import BundleManifest
from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError
from torchdlrm.exporting.export import export
from torchdlrm.training.job import train

FROZEN = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "16,8",
    "model.over_arch_layer_sizes": "16,1",
    "train.freeze": "tables",
    "train.max_steps": "2",
    "logging.tensorboard": "false",
    "seed": "7",
}


def expected(dataset, scale):
    """U(-scale / sqrt(n), scale / sqrt(n)), each table from a stream of its own: the tables here are one block each."""
    rows = {f"t_{name}": rows for name, rows in dataset.num_embeddings.items()}
    assert max(rows.values()) <= 65_536
    found = {}
    for index, table in enumerate(sorted(rows)):
        drawn_RD = np.random.default_rng([7, index, 0]).random((rows[table], 8), np.float32)
        found[table] = scale / rows[table] ** 0.5 * (2 * drawn_RD - 1)
    return found


def tables(run, tmp_path):
    found = state(run, tmp_path, step=2)
    return {name.split(".")[-2]: value for name, value in found.items() if name.startswith("model/") and ".t_" in name}


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 0.125])
def test_initial_rows_are_of_the_scale_that_the_config_says(scale, small_dataset, dlrm, tmp_path):
    settings = FROZEN | ({} if scale == 1 else {"model.table_init_scale": str(scale)})
    train(load_config("criteo-small", settings), small_dataset, tmp_path / "one")
    one, rows = tables(tmp_path / "one", tmp_path), expected(small_dataset, scale)
    if scale != 1:
        flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
        arguments = ("--dataset", small_dataset.path, "--run", tmp_path / "two", "--nproc-per-node", 2)
        done = dlrm("train", "criteo-small", *arguments, *flags)
        assert done.returncode == 0, done.stderr
        two = tables(tmp_path / "two", tmp_path)
        assert two.keys() == one.keys()
        assert [name for name in one if not torch.equal(one[name], two[name])] == []
    assert one.keys() == rows.keys()
    for name, table in rows.items():
        np.testing.assert_allclose(one[name].numpy(), table, rtol=0, atol=1e-7 * scale)


def test_a_bundle_says_nothing_of_initial_rows(small_dataset, tmp_path):
    """So that older programs read it."""
    train(load_config("criteo-small", FROZEN | {"model.table_init_scale": "0.5"}), small_dataset, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.toml").model.table_init_scale == 0.5
    export(tmp_path / "run", tmp_path / "bundle")
    assert "table_init_scale" not in json.loads((tmp_path / "bundle" / "bundle.json").read_text())["model"]
    assert BundleManifest.read(tmp_path / "bundle").format_version == 2
    assert "table_init_scale" not in load_config("criteo-small").model.model_dump()


@pytest.mark.parametrize("value", ["0", "-1", "nan", "1001"])
def test_a_scale_that_is_none_is_refused(value):
    with pytest.raises(ConfigError, match=r"model\.table_init_scale"):
        load_config("criteo-small", {"model.table_init_scale": value})
