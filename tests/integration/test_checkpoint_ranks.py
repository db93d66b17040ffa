"""Several processes verify a checkpoint together."""

import json
import threading
from dataclasses import replace

import pytest
import torch

from torchdlrm.errors import RunError, TrainingError
from torchdlrm.training import checkpointer as module
from torchdlrm.training.checkpoint import Position, list_checkpoints
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group


def slowly(look):
    """A disk on which each part of a file takes a while."""

    def parts(*args, **options):
        for _ in range(10):
            threading.Event().wait(0.3)
            yield None
        yield from look(*args, **options)

    return parts


def verify_what_is_damaged(folder):
    with join_process_group() as ranks:
        model = torch.nn.Linear(2, 1)
        position = Position(10, {"epoch": 0, "batches_consumed": 10})
        assert Checkpointer(folder, model, None, ranks).save(position, wait=True)
        checkpointer = Checkpointer(folder, model, None, replace(ranks, timeout_s=2.5))
        look = module.look_for_damage
        module.look_for_damage = slowly(look) if ranks.rank == 1 else look
        assert checkpointer.restore() == position  # it has taken longer than the timeout
        module.look_for_damage = look
        if ranks.is_first:
            with (folder / "step-00000010" / "__0_0.distcp").open("ab") as file:
                file.write(b"more")
        torch.distributed.barrier()
        try:
            checkpointer.load(10)
        except RunError as error:
            (folder / f"rank-{ranks.rank}").write_text(json.dumps([str(error), error.is_everywhere]))
            raise


def test_ranks_verify_together_without_losing_each_other_and_all_name_the_damaged_file(tmp_path):
    with pytest.raises(RunError, match=r"__0_0.distcp: damaged, its sha256 is not that in checkpoint.json"):
        launch(verify_what_is_damaged, tmp_path, processes=Processes(2))
    told = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(2)]
    assert told[0] == told[1]
    assert told[0][1] is True


def save_what_is_not_finite_on_one_rank(folder):
    with join_process_group() as ranks:
        model = torch.nn.Linear(2, 1)
        checkpointer = Checkpointer(folder, model, None, ranks)
        told = []
        for step in (10, 20, 30):
            model.weight.data.fill_(torch.nan if step == 20 and ranks.rank == 1 else 0.0)
            loss = torch.tensor(torch.nan if step == 30 and not ranks.is_first else 0.0)
            try:
                checkpointer.save(Position(step, {"epoch": 0, "batches_consumed": step}), wait=True, loss=loss)
            except TrainingError as error:
                told.append(str(error))
        return ranks.all_gather(told)


def test_what_is_not_finite_on_one_rank_is_saved_by_none_and_told_by_all(tmp_path):
    told = launch(save_what_is_not_finite_on_one_rank, tmp_path, processes=Processes(2))
    assert told[0] == told[1]
    assert ["in weight," in told[0][0], "in the loss," in told[0][1]] == [True, True]
    assert list_checkpoints(tmp_path) == [10]
