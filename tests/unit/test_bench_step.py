"""The benchmark of the step: who runs beside whom. What it finds is tested in `integration/test_bench.py`."""

import pytest
import torch

from torchdlrm.bench import step
from torchdlrm.config import load_config


@pytest.mark.parametrize(("device", "most"), [("cuda", 1), ("cpu", 4)])
def test_on_gpus_one_is_gone_before_the_next_takes_the_memory(device, most, monkeypatch):
    alive, together = set(), []

    class Competitor:
        def __init__(self, build, config, *arguments, nproc, device):
            del arguments, nproc, device
            self.rows = config.train.batch_size_global
            alive.add(self)
            together.append((len(alive), build.__name__))

        def run(self, steps):
            return self.rows * steps * 1e-3

        def close(self):
            alive.remove(self)

    monkeypatch.setattr(step, "Competitor", Competitor)
    monkeypatch.setattr(step, "rank_device", lambda *_: torch.device(device))
    config = load_config(None, {"train.batch_size_global": "1024", "train.precision": "float32"})
    found = step.benchmark_step(config, num_embeddings={"a": 5}, steps_per_round=2, rounds=3)
    assert [name for _, name in together] == ["our_step", "torchrec_step", "floor_step", "our_step"]
    assert max(number for number, _ in together) == most
    assert not alive
    assert found.rows_per_s == pytest.approx(1000)
    assert found.host_ms == pytest.approx(16)  # of 16 rows
