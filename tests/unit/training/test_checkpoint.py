"""Checkpoints on disks that are full or damaged."""

import errno
import json
import shutil

import pytest
import torch

from torchdlrm.errors import RunError, TrainingError
from torchdlrm.progress import SILENT
from torchdlrm.training import checkpointer as checkpointer_module
from torchdlrm.training.checkpoint import Position, find_damage, list_checkpoints, look_for_damage
from torchdlrm.training.checkpointer import Checkpointer, _ReportingFileSystem
from torchdlrm.training.processes.process_group import join_process_group


def test_a_full_disk_is_told_in_its_own_words():
    """Torch's archive would say `enforce fail at inline_container.cc: unexpected pos`."""
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        _ReportingFileSystem().create_stream("/dev/full", "wb") as stream,
    ):
        torch.save(torch.zeros(100_000), stream)
    assert caught.value.errno == errno.ENOSPC


@pytest.fixture
def saved(tmp_path):
    """A checkpointer whose steps 10 and 20 are saved."""
    with join_process_group() as ranks:
        checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 1), None, ranks, keep_last=3)
        for step in (10, 20):
            position = Position(step, {"epoch": 0, "batches_consumed": step}, best_auc=0.75, best_step=10)
            assert checkpointer.save(position, wait=True)
        yield checkpointer
        checkpointer.close()


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b""), lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["__0_0.distcp", "checkpoint.json"])
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(name, damage, saved, tmp_path):
    """A disk that is away for a moment must not cost the run; a checkpoint without a record is there all the same."""
    damage(tmp_path / "step-00000020" / name)
    assert saved.restore().step == 10
    damage(tmp_path / "step-00000010" / name)
    with pytest.raises(RunError, match=r"all 2 checkpoints are damaged or .*, the oldest: .*step-00000010") as caught:
        saved.restore()
    assert caught.value.is_everywhere
    assert list_checkpoints(tmp_path) == [10, 20]


def test_a_copy_beside_a_checkpoint_is_no_checkpoint(saved, tmp_path):
    for name in ("step-00000020.old", "step-copy", "step-20", "step-²"):
        shutil.copytree(tmp_path / "step-00000020", tmp_path / name)
    assert list_checkpoints(tmp_path) == [10, 20]
    assert saved.restore().step == 20


@pytest.mark.parametrize(
    ("written", "damaged"), [('"step": 20', '"step": 21'), ("0.75", "0.35"), ('"best_step"', '"best_stop"')]
)
def test_a_position_that_has_changed_is_damage(written, damaged, saved, tmp_path):
    path = tmp_path / "step-00000020" / "checkpoint.json"
    text = path.read_text()
    assert find_damage(path.parent) is None
    path.write_text(text.replace(written, damaged))
    assert "checkpoint.json: damaged" in find_damage(path.parent)
    assert saved.restore().step == 10
    content = json.loads(text)
    del content["sha256"]["checkpoint.json"]  # as early versions have it
    path.write_text(json.dumps(content))
    assert saved.restore().step == 20


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp"])
@pytest.mark.usefixtures("saved")
def test_every_file_of_a_checkpoint_is_read_by_one_rank(name, world_size, tmp_path):
    path = tmp_path / "step-00000020"
    told = [list(look_for_damage(path, SILENT, rank, world_size)) for rank in range(world_size)]
    assert sum(len(parts) for parts in told) == 2  # both files are small
    assert {problem for parts in told for problem in parts} == {None}
    with (path / name).open("ab") as file:
        file.write(b"more")
    told = [list(look_for_damage(path, SILENT, rank, world_size)) for rank in range(world_size)]
    (problem,) = {parts[-1] for parts in told if parts} - {None}
    assert problem == f"{path / name}: damaged, its sha256 is not that in checkpoint.json"
    assert find_damage(path) == problem


def test_whoever_saves_learns_that_it_failed(saved, tmp_path, caplog):
    shutil.rmtree(tmp_path)
    tmp_path.write_text("no folder")
    position = Position(30, {"epoch": 0, "batches_consumed": 30})
    assert not saved.save(position, wait=True)
    assert "the checkpoint of step 30 could not be written" in caplog.text
    tmp_path.unlink()
    tmp_path.mkdir()
    assert saved.save(position, wait=True)
    assert list_checkpoints(tmp_path) == [30]


class Masked(torch.nn.Linear):
    """A model of one's own that means the infinity in a buffer."""

    def __init__(self):
        super().__init__(2, 1)
        self.register_buffer("mask", torch.tensor([0.0, -torch.inf]))


def position_of(step, best_step=None):
    return Position(step, {"epoch": 0, "batches_consumed": step}, best_step=best_step)


@pytest.mark.parametrize("wait", [True, False])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_saved_and_removes_nothing(value, wait, tmp_path):
    with join_process_group() as ranks:
        model = Masked()
        checkpointer = Checkpointer(tmp_path, model, None, ranks, keep_last=1)
        assert checkpointer.save(position_of(10), wait=wait, loss=torch.tensor(0.5))
        with pytest.raises(
            TrainingError,
            match=r"after step 20 there is NaN or infinity in the loss, so .*last checkpoint is of step 10$",
        ):
            checkpointer.save(position_of(20), wait=wait, loss=torch.tensor(value))
        model.weight.data[0, 1] = value
        with pytest.raises(
            TrainingError, match=r"after step 20 there is NaN or infinity in weight, so .* lower .*learning_rate"
        ):
            checkpointer.save(position_of(20), wait=wait, loss=torch.tensor(0.5))
        checkpointer.close()
        assert list_checkpoints(tmp_path) == [10]


@pytest.fixture
def with_nan_of_an_older_version(tmp_path, monkeypatch):
    """A checkpointer that keeps one, whose step 10, the best, is finite, and whose steps 20 and 30 are not."""
    with join_process_group() as ranks, monkeypatch.context() as patch:
        patch.setattr(checkpointer_module, "find_not_finite", lambda *_: [])
        model = Masked()
        checkpointer = Checkpointer(tmp_path, model, None, ranks, keep_last=2)
        for step in (10, 20, 30):
            checkpointer.save(position_of(step, best_step=10), wait=True)
            model.weight.data.fill_(torch.nan)
        patch.undo()
        yield model, checkpointer
        checkpointer.close()


def test_a_run_goes_on_from_the_last_finite_checkpoint_which_others_do_not_push_out(
    with_nan_of_an_older_version, tmp_path, caplog
):
    model, checkpointer = with_nan_of_an_older_version
    assert list_checkpoints(tmp_path) == [10, 20, 30]
    assert checkpointer.restore().step == 10
    assert torch.isfinite(model.weight).all()
    for step in (20, 30):
        assert f"step-{step:08d}: NaN or infinity in weight; going back" in caplog.text
    for step, kept in ((12, [10, 12, 20, 30]), (14, [12, 14, 20, 30]), (20, [14, 20, 30])):
        assert checkpointer.save(position_of(step, best_step=10 if step == 12 else None), wait=True)
        assert list_checkpoints(tmp_path) == kept
        assert checkpointer.restore().step == step


def test_a_run_without_a_finite_checkpoint_is_refused(with_nan_of_an_older_version, tmp_path):
    shutil.rmtree(tmp_path / "step-00000010")
    with pytest.raises(
        RunError, match=r"all 2 checkpoints are damaged or not finite, the oldest: .*step-00000020: NaN"
    ):
        with_nan_of_an_older_version[1].restore()
