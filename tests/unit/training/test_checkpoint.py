"""Checkpoints on disks that are full or damaged."""

import errno
import json
import shutil

import pytest
import torch

from torchdlrm.errors import RunError
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


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again(tmp_path):
    """A disk that is away for a moment must not cost the run."""
    with join_process_group() as ranks:
        model = torch.nn.Linear(2, 1)
        checkpointer = Checkpointer(tmp_path, model, None, ranks, keep_last=3)
        assert checkpointer.restore() is None
        for step in (10, 20):
            checkpointer.save(Position(step, {"epoch": 0, "batches_consumed": step}), wait=True)
        (tmp_path / "step-00000020" / "__0_0.distcp").write_bytes(b"")
        assert checkpointer.restore().step == 10
        (tmp_path / "step-00000010" / "__0_0.distcp").write_bytes(b"")
        with pytest.raises(RunError, match=r"all 2 checkpoints are damaged, the oldest: .*step-00000010") as caught:
            checkpointer.restore()
        assert caught.value.is_everywhere
        assert list_checkpoints(tmp_path) == [10, 20]
        checkpointer.close()


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


def test_a_checkpoint_that_has_lost_its_record_is_damaged_and_not_absent(saved, tmp_path):
    """Else a run whose only checkpoint has lost it would begin anew without a word."""
    (tmp_path / "step-00000020" / "checkpoint.json").unlink()
    assert list_checkpoints(tmp_path) == [10, 20]
    assert saved.restore().step == 10
    (tmp_path / "step-00000010" / "checkpoint.json").unlink()
    with pytest.raises(RunError, match=r"all 2 checkpoints are damaged, .*step-00000010/checkpoint.json: damaged"):
        saved.restore()


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
    told = [list(look_for_damage(path, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert sum(len(parts) for parts in told) == 2  # both files are small
    assert {problem for parts in told for problem in parts} == {None}
    with (path / name).open("ab") as file:
        file.write(b"more")
    told = [list(look_for_damage(path, rank=rank, world_size=world_size)) for rank in range(world_size)]
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
