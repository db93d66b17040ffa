"""The learning rate falls when the val AUC no longer rises, and a resumed run knows how far it has fallen."""

import pytest
import torch

from helpers.trainings import logged, state
from torchdlrm.config import load_config
from torchdlrm.progress import SilentProgress
from torchdlrm.training.job import train

OPTIONS = {
    "model.embedding_dim": "8",
    "model.dense_arch_layer_sizes": "16,8",
    "model.over_arch_layer_sizes": "16,1",
    "train.batch_size_global": "256",
    "table_optimizer.learning_rate": "0.5",  # so high that the AUC falls now and then
    "dense_optimizer.learning_rate": "0.1",
    "schedule.name": "plateau",
    "schedule.plateau_factor": "0.5",
    "schedule.plateau_patience_validations": "2",
    "validation.every_steps": "1",
    "logging.every_steps": "1",
    "logging.tensorboard": "false",
}


class Notes(SilentProgress):
    """Keeps what a training says in lines."""

    def __init__(self):
        self.lines = []

    def note(self, line):
        self.lines.append(line)


def by_step(run, split, name):
    return {line["step"]: line[name] for line in logged(run, split)}


def test_the_rate_falls_as_the_val_auc_says_and_a_resumed_run_has_the_same_bytes(small_dataset, tmp_path):
    def trained(run, max_steps):
        notes = Notes()
        config = load_config(None, {**OPTIONS, "train.max_steps": str(max_steps)})
        train(config, small_dataset.path, tmp_path / run, progress=notes)
        return state(tmp_path / run, tmp_path, max_steps), notes.lines

    whole, notes = trained("whole", 12)
    trained("parts", 7)
    parts, _ = trained("parts", 12)

    aucs, rates = by_step(tmp_path / "whole", "val", "auc"), by_step(tmp_path / "whole", "train", "learning_rate")
    best, stale, rate, falls = 0.0, 0, 0.1, []
    for step in range(1, 13):
        assert rates[step] == pytest.approx(rate)
        best, stale = (aucs[step], 0) if aucs[step] > best else (best, stale + 1)
        if stale == 2:
            stale, rate = 0, rate / 2
            falls.append(step)
    assert min(falls) < 7  # before the interruption
    assert any(7 < step < 12 for step in falls)  # and after it
    told = [int(line.split()[1].rstrip(":")) for line in notes if "learning rates" in line]
    assert told == falls

    assert by_step(tmp_path / "parts", "train", "learning_rate") == rates
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(torch.as_tensor(whole[name]), torch.as_tensor(parts[name]))] == []
