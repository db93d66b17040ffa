"""What is said before a training starts."""

import pytest
import torch

from torchdlrm.cli.train import preview_lines
from torchdlrm.config import load_config
from torchdlrm.errors import TrainingError
from torchdlrm.model.precision import Precision
from torchdlrm.sharding.machine import device_named
from torchdlrm.sharding.problem import Problem
from torchdlrm.sharding.solution import solve
from torchdlrm.sharding.tables import Table
from torchdlrm.training.job import TrainingPreview, preview_training
from torchdlrm.training.steps import Agenda


def hints(device, num_devices, rows):
    config = load_config(None, {"train.batch_size_global": str(rows)})
    machine = device_named(device).spread(num_devices)
    tables = (Table("t_a", 1_000, 128), Table("t_b", 50, 128))
    solution = solve(Problem.of(config, tables, machine))
    preview = TrainingPreview(config, Agenda.of(config, 10**6), solution, Precision(torch.float32, ""), 0, 0, ["label"])
    return [line for line in preview_lines(preview) if line.startswith("hint: ")]


def test_few_rows_a_gpu_are_told_with_the_batch_that_is_enough():
    (hint,) = hints("h100-80gb", 8, 16_384)
    assert "a GPU gets 2,048 rows a step" in hint
    assert "train.batch_size_global = 65,536 or more, which is now 16,384" in hint


def test_processes_on_cpu_whose_steps_are_short_are_told_that_one_is_faster():
    (hint,) = hints("cpu", 2, 8)
    assert "a step of 8 rows is so short that 2 processes exchange for longer than they compute" in hint


@pytest.mark.parametrize(
    ("device", "num_devices", "rows"), [("h100-80gb", 8, 65_536), ("cpu", 2, 2_048), ("cpu", 1, 8)]
)
def test_enough_rows_for_each_get_no_hint(device, num_devices, rows):
    assert hints(device, num_devices, rows) == []


def test_both_builds_of_fbgemm_are_refused_before_a_run_is_written(small_dataset, tmp_path, monkeypatch):
    for name in ("fbgemm-gpu", "fbgemm-gpu-cpu"):
        about = tmp_path / f"{name.replace('-', '_')}-1.8.0.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.8.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(TrainingError, match=r"are both installed.*pip uninstall --yes fbgemm-gpu fbgemm-gpu-cpu"):
        preview_training(load_config(None), small_dataset, tmp_path / "run", world_size=1, local_world_size=1)
    assert not (tmp_path / "run").exists()
