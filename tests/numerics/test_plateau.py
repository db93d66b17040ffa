"""The learning rate falls when the val AUC no longer rises, and a resumed run knows how far it has fallen."""

import json

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

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


def state(run, step, tmp_path):
    """Every tensor of a checkpoint by its path."""
    dcp_to_torch_save(run / "checkpoints" / f"step-{step:08d}", tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    leaves, _ = torch.utils._pytree.tree_flatten_with_path(loaded)
    return {torch.utils._pytree.keystr(path): torch.as_tensor(leaf) for path, leaf in leaves}


def logged(run, split, name):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line[name] for line in lines if line["split"] == split}


def test_the_rate_falls_as_the_val_auc_says_and_a_resumed_run_has_the_same_bytes(small_dataset, tmp_path):
    def trained(run, max_steps):
        notes = Notes()
        config = load_config(None, {**OPTIONS, "train.max_steps": str(max_steps)})
        train(config, small_dataset.path, tmp_path / run, progress=notes)
        return state(tmp_path / run, max_steps, tmp_path), notes.lines

    whole, notes = trained("whole", 12)
    trained("parts", 7)
    parts, _ = trained("parts", 12)

    aucs, rates = logged(tmp_path / "whole", "val", "auc"), logged(tmp_path / "whole", "train", "learning_rate")
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

    assert logged(tmp_path / "parts", "train", "learning_rate") == rates
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []
