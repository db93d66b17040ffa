"""Checkpoints on disks that are full or damaged."""

import errno

import pytest
import torch

from torchdlrm.errors import RunError
from torchdlrm.training.checkpoint import Checkpointer, Position, _TellingFileSystem, list_checkpoints
from torchdlrm.training.process_group import join_process_group


def test_a_full_disk_is_told_in_its_own_words():
    """Torch's archive would say `enforce fail at inline_container.cc: unexpected pos`."""
    with (
        pytest.raises(OSError, match="No space left on device") as caught,
        _TellingFileSystem().create_stream("/dev/full", "wb") as stream,
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
