"""What the libraries say while a training runs reaches nobody, and is heard again afterwards."""

import os
import warnings
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed import comm

from torchdlrm.training.processes.process_group import join_process_group


def say_everything():
    warnings.warn("TBE B200 optimization: device_major=9, feature_enabled=0", UserWarning, stacklevel=1)
    one = torch.ones(1)
    dist.reduce_scatter_tensor(torch.zeros(1), one)
    dist.all_gather_into_tensor(torch.zeros(1), one)
    with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "1"}):
        comm.intra_and_cross_node_pg(torch.device("cpu"), backend="gloo")


def test_libraries_are_silent_in_a_group_of_processes(caplog):
    with join_process_group():
        say_everything()  # a warning that is heard is an error in tests
    assert [record.getMessage() for record in caplog.records if record.name.startswith("torchrec")] == []


def test_what_is_no_noise_is_heard():
    with join_process_group(), pytest.warns(UserWarning, match="another"):
        warnings.warn("another", UserWarning, stacklevel=1)
