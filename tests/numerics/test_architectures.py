"""Every architecture that the config can choose trains the same on any number of processes, and resumes."""

import pytest
import torch

from helpers.days import last_state
from helpers.trainings import losses
from torchdlrm.config import config_toml
from torchdlrm.training.job import train
from torchdlrm.training.run import Run


def test_two_processes_train_what_one_does(interaction_run, small_dataset, dlrm, tmp_path):
    (tmp_path / "config.toml").write_text(config_toml(Run.open(interaction_run).config))
    two = tmp_path / "two"
    done = dlrm(
        *("train", tmp_path / "config.toml", "--dataset", small_dataset.path, "--run", two, "--nproc-per-node", 2)
    )
    assert done.returncode == 0, done.stderr
    assert len(losses(two)) == 30
    assert losses(two) == pytest.approx(losses(interaction_run), abs=1e-4)


def test_a_resumed_run_ends_with_the_bytes_of_an_uninterrupted_one(interaction_run, small_dataset, tmp_path):
    config = Run.open(interaction_run).config
    first = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 11})})
    assert train(first, small_dataset, tmp_path / "run").summary.step == 11
    assert train(config, small_dataset, tmp_path / "run").summary.step == 30
    found, expected = last_state(tmp_path / "run", tmp_path), last_state(interaction_run, tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in found)
