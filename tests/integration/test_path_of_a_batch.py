"""From a training step to the kernels of the tables lie few frames and files of ours, which the docs list."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import torchdlrm
from torchdlrm.config import load_config
from torchdlrm.kernels import threads
from torchdlrm.tables import collection
from torchdlrm.training.job import train

SOURCE = Path(torchdlrm.__file__).parent
DOCUMENT = (SOURCE.parents[1] / "docs" / "architecture.md").read_text()
KERNELS = {"look_up": "tables/kernels.py", "update": "tables/updates.py"}


def frames_of_ours():
    """Function and file of each frame of the package down from `Trainer._train_step`."""
    found, frame = [], sys._getframe(2)  # not this one, nor `noted`
    while frame is not None and (not found or found[0][0] != "_train_step"):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(SOURCE):
            found.insert(0, (frame.f_code.co_name, file.relative_to(SOURCE).as_posix()))
        frame = frame.f_back
    return found


def noted(found, name, kernel, *arguments):
    frames = frames_of_ours()
    if frames[0][0] == "_train_step":  # and not on torch's second thread
        found[name] = [*frames, (name, KERNELS[name])]
    kernel(*arguments)


@pytest.fixture(scope="module")
def paths(small_dataset, tmp_path_factory):
    """By kernel the frames of a step that lead to it where two threads share the work, the kernel's own the last."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for name in KERNELS:
            patch.setattr(collection, name, partial(noted, found, name, getattr(collection, name)))
        patch.setattr(threads, "MIN_FLOATS", 0)
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        settings = {"train.max_steps": "1", "train.num_threads": "2", "logging.tensorboard": "false"}
        train(load_config("criteo-small", settings), small_dataset, tmp_path_factory.mktemp("path") / "run")
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_batch_is_followed_from_the_step_to_a_kernel_through_few_frames_and_files(kernel, paths):
    assert len(paths[kernel]) <= 9
    assert len({file for _, file in paths[kernel]}) <= 6


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_document_lists_the_frames(kernel, paths):
    section = DOCUMENT.split("## The path of a batch\n")[1].split("\n## ")[0]
    tables = [
        re.findall(r"^\| `([\w.<>]+)` \| `([\w/]+\.py)` \|", part, re.MULTILINE) for part in section.split("\n\n")
    ]
    listed = [[(name.split(".")[-1], file) for name, file in table] for table in tables if table]
    assert listed[list(KERNELS).index(kernel)] == paths[kernel]
