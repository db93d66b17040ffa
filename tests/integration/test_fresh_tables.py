"""`train.fresh_tables`: later epochs begin with tables as a new run has them, whatever interrupts the run."""

import numpy as np
import pytest
import torch

from helpers.trainings import state
from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError, RunError
from torchdlrm.training.job import train

STEPS_PER_EPOCH = 9  # 4,286 rows
SETTINGS = {
    "train.batch_size_global": "500",
    "train.epochs": "2",
    "train.fresh_tables": "true",
    "logging.tensorboard": "false",
    "table_optimizer.weight_decay": "0.1",
    "table_optimizer.weight_decay_mode": "lazy",
}


def test_each_epoch_begins_with_rows_of_its_own(small_dataset, tmp_path):
    still = {"table_optimizer.learning_rate": "1e-30", "seed": "3"}  # so tables stay as the last epoch began
    for name, settings in (("one", {"train.epochs": "1", "train.fresh_tables": "false"}), ("two", {})):
        train(load_config("criteo-small", SETTINGS | still | settings), small_dataset, tmp_path / name)
    for name, epoch in (("one", ()), ("two", (1,))):
        tensors = state(tmp_path / name, tmp_path, STEPS_PER_EPOCH * (1 + len(epoch)))
        tables = sorted(key for key in tensors if key.startswith("model/") and ".embedding_bags." in key)
        assert len(tables) == 26
        for index, key in enumerate(tables):
            rows, dim = tensors[key].shape
            drawn = np.random.default_rng([3, index, 0, *epoch]).random((rows, dim), dtype=np.float32)
            np.testing.assert_allclose(tensors[key], (2 * drawn - 1) * rows**-0.5, atol=1e-6)


def test_a_run_interrupted_around_an_epochs_end_equals_an_uninterrupted_one(small_dataset, tmp_path):
    train(load_config("criteo-small", SETTINGS), small_dataset, tmp_path / "whole")
    for limit in (
        {"train.epochs": "1", "train.fresh_tables": "false"},  # to be chosen for the second epoch
        {"train.max_steps": str(STEPS_PER_EPOCH + 4)},
        {},
    ):
        history = train(load_config("criteo-small", SETTINGS | limit), small_dataset, tmp_path / "resumed")
    assert history.summary.step == 2 * STEPS_PER_EPOCH
    assert history.summary.resumed_from_step == STEPS_PER_EPOCH + 4
    whole, resumed = (state(tmp_path / run, tmp_path, 2 * STEPS_PER_EPOCH) for run in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert [name for name in whole if not torch.equal(whole[name], resumed[name])] == []
    last_steps = torch.cat([value for name, value in whole.items() if name.endswith("prev_iter")])
    assert last_steps.max() == STEPS_PER_EPOCH  # counted from the epoch's begin, as in a new run


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train.epochs": "1"}, "set train.epochs = 2"),
        ({"train.freeze": "cat_3"}, r"train.freeze keeps \(cat_3\)"),
        ({"sharding.cache_fraction": "0.2"}, "sharding.cache_fraction"),
    ],
)
def test_what_does_not_go_together_is_refused(settings, words):
    with pytest.raises(ConfigError, match=rf"train.fresh_tables: .*{words}"):
        load_config("criteo-small", SETTINGS | settings)


def test_a_run_that_takes_tables_over_does_not_forget_them(small_dataset, small_run, tmp_path):
    config = load_config("criteo-small", {"train.epochs": "2", "train.fresh_tables": "true"})
    with pytest.raises(RunError, match=r"train.fresh_tables: the tables would forget"):
        train(config, small_dataset, tmp_path / "run", from_run=small_run)
