"""A live model of a class of one's own: the class is given in each call, and is the one that was learnt."""

import pytest

from helpers.live_models import CONFIG, SCHEMA, WIDE, files_of
from torchdlrm import LiveModel, LiveSettings, advance
from torchdlrm.errors import ConfigError, LiveError
from torchdlrm.files import sha256_of
from torchdlrm.live.preview import preview_advance
from torchdlrm.training.job import train
from torchdlrm.training.run import Run

CODE = """
import torch
from torch import nn


class Wide(nn.Module):
    def __init__(self, num_sparse_features, embedding_dim):
        super().__init__()
        self.output_size = embedding_dim * (num_sparse_features + 1)

    def forward(self, dense_features, sparse_features):
        return torch.cat([dense_features, sparse_features.flatten(1)], dim=1)
"""


def test_a_class_of_ones_own_is_learnt_period_after_period(logs, dlrm, tmp_path):
    file, live = tmp_path / "mine.py", tmp_path / "live"
    first = {"config": CONFIG, "schema": SCHEMA, "settings": LiveSettings(gate=WIDE)}
    # What cannot be loaded is told before there is a folder.
    with pytest.raises(ConfigError, match=r"`model_class`: .*mine\.py cannot be imported"):
        advance(live, logs[0], model_class=f"{file}:Wide", **first)
    assert not live.exists()
    # Where the first training was not complete, a class that is corrected begins it again; nothing else is.
    file.write_text(CODE.replace("flatten(1)", "flatten(1) * 2"))
    with pytest.raises(ZeroDivisionError):
        advance(live, logs[0], model_class=f"{file}:Wide", train_by=train_and_stop, **first)
    encoded = (live / "days/0001/dataset").stat()
    file.write_text(CODE)
    assert advance(live, logs[0], model_class=f"{file}:Wide").published
    assert (live / "days/0001/dataset").stat() == encoded
    assert Run.open(live / "days/0001/run").model_class.sha256 == sha256_of(file)
    done = dlrm("advance", live, logs[1], "--model-class", f"{file}:Wide", "--nproc-per-node", 2)
    assert done.returncode == 0, done.stderr
    assert LiveModel.open(live).current == 2
    assert Run.open(live / "days/0002/run").model_class.sha256 == sha256_of(file)

    before = files_of(live)
    for place, error, said in (
        (None, LiveError, r"0002/run: the run is of a model class of its own: give `model_class` mine\.py:Wide"),
        (f"{file}:Wild", ConfigError, r"no Wild in .*mine\.py; did you mean Wide\?"),
        (f"{tmp_path}/none.py:Wide", ConfigError, r"none\.py cannot be imported"),
    ):
        for look in (preview_advance, advance):
            with pytest.raises(error, match=said):
                look(live, logs[2], model_class=place)
    told = dlrm("advance", live, logs[2], "--dry-run")
    assert (told.returncode, "give --model-class mine.py:Wide" in told.stderr) == (2, True)
    file.write_text(CODE + "# another\n")
    with pytest.raises(LiveError, match=r"mine\.py:Wide has changed since the run was written.*`allow_changed_model"):
        advance(live, logs[2], model_class=f"{file}:Wide")
    assert advance(live, logs[1]) == LiveModel.open(live).periods[1]  # nothing is left to do, and no class is needed
    assert files_of(live) == before
    record = advance(live, logs[2], model_class=f"{file}:Wide", allow_changed_model_class=True)
    assert (record.period, record.published) == (3, True)
    # Then the changed one is what was learnt.
    assert preview_advance(live, logs[3], model_class=f"{file}:Wide").draft.period == 4


def train_and_stop(*args, **kwargs):
    train(*args, **kwargs)
    raise ZeroDivisionError


def test_a_class_is_refused_where_another_model_was_learnt(copied, logs, tmp_path):
    (tmp_path / "mine.py").write_text(CODE)
    before = files_of(copied)
    with pytest.raises(LiveError, match=r"0003/run: `model_class`: the run is of the DLRM itself, got mine\.py:Wide"):
        advance(copied, logs[3], model_class=f"{tmp_path}/mine.py:Wide")
    assert files_of(copied) == before
