"""How a process leaves its group, and what it says when it runs out of memory or loses another one."""

import os
import warnings
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch import distributed as dist
from torchrec.distributed import comm

from torchdlrm.config import load_config
from torchdlrm.errors import ConfigError, LostProcessError, RunError, TrainingError
from torchdlrm.features.tables import features_of_sizes
from torchdlrm.model.architecture import ModelShape
from torchdlrm.training.processes import process_group
from torchdlrm.training.processes.agreement import NNODES_VARIABLE
from torchdlrm.training.processes.process_group import Ranks, _leave, join_process_group
from torchdlrm.training.sharded import build_sharded_model

GPU = torch.device("cuda", 1)


def test_memory_that_runs_out_is_told_with_what_helps_and_the_group_can_be_joined_again():
    with (
        pytest.raises(
            TrainingError, match=r"^process 0 of 1 has too little memory: it asked for 1,126 TB; it has held up to "
        ),
        join_process_group(),
    ):
        torch.empty(1 << 50, dtype=torch.uint8)
    with join_process_group(), pytest.raises(RuntimeError, match="shape"):
        torch.zeros(2) @ torch.zeros(3, 3)


@pytest.fixture
def gpu_memory(monkeypatch):
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 60 * 10**9 if device == GPU else 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 75 * 10**9 if device == GPU else 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10**9, 80 * 10**9) if device == GPU else (0, 0))


@pytest.mark.usefixtures("gpu_memory")
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 1 has a total capacity of ..."),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("NCCL error in: NCCLUtils.hpp:77, Cuda failure 2 'out of memory'"),
    ],
)
def test_memory_of_a_gpu_that_runs_out_is_told_in_numbers(error):
    with pytest.raises(TrainingError) as caught, Ranks(1, 8, 8, GPU).explaining_failures():
        raise error
    told = str(caught.value)
    assert type(caught.value) is TrainingError
    assert told.startswith("process 1 of 8 has too little memory: ")
    assert "on cuda:1, where 60 GB are allocated, 75 GB reserved by torch, and 1 GB of 80 GB free" in told
    for remedy in ("sharding.reserved_fraction", "sharding.cache_fraction", "train.batch_size_global", "expandable"):
        assert remedy in told
    assert ("it asked for 2.50 GiB" in told) == isinstance(error, torch.OutOfMemoryError)
    assert ("it was the host's memory" in told) != isinstance(error, torch.OutOfMemoryError)  # pinned: the same words


def test_a_process_on_a_gpu_takes_its_share_of_the_cores(monkeypatch):
    """Casts and copies of drawn tables run on them, eight ranks at a time."""
    init = dist.init_process_group
    monkeypatch.setattr(process_group, "rank_device", lambda *_: GPU)
    monkeypatch.setattr(process_group, "_restored_settings", lambda _: nullcontext())
    monkeypatch.setattr(dist, "init_process_group", lambda _, **options: init("gloo", **options))
    for name, value in (("LOCAL_WORLD_SIZE", "8"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(24)))
    before = torch.get_num_threads()
    try:
        with join_process_group() as ranks:
            assert (ranks.device, torch.get_num_threads()) == (GPU, 3)
    finally:
        torch.set_num_threads(before)


def test_a_launcher_that_numbers_processes_and_tells_no_more_is_explained(monkeypatch):
    """As srun and mpirun with two variables set by hand do."""
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "16"), ("MASTER_ADDR", "here"), ("MASTER_PORT", "29500")):
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(ConfigError, match=r"but LOCAL_RANK, LOCAL_WORLD_SIZE are not set; .*SLURM_LOCALID"),
        join_process_group(),
    ):
        pass


@pytest.mark.parametrize(
    ("text", "is_lost"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 2000ms for recv", True),
        ("NCCL error: remote process exited or there was a network error, ncclRemoteError", True),
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4", False),
        ("NCCL error in: NCCLUtils.hpp:77, invalid usage, ncclInvalidUsage", False),
    ],
)
def test_only_what_says_so_is_taken_for_a_lost_process(text, is_lost):
    ranks = Ranks(0, 2, 2, torch.device("cpu"))
    with pytest.raises(LostProcessError if is_lost else RuntimeError) as caught, ranks.explaining_failures():
        raise RuntimeError(text)
    assert str(caught.value).startswith("process 0 of 2 has lost another one") == is_lost


@pytest.mark.parametrize(
    ("error", "world_size", "device", "is_launched", "expected"),
    [
        (None, 2, GPU, True, "destroyed"),
        (RunError("in use").everywhere(), 2, GPU, True, "destroyed"),
        (ZeroDivisionError(), 2, GPU, True, ""),  # it ends when it has told its launcher
        (ZeroDivisionError(), 2, GPU, False, "aborted"),  # it may go on, and join another
        (ZeroDivisionError(), 1, GPU, False, "aborted"),
        (ZeroDivisionError(), 2, torch.device("cpu"), True, "destroyed"),  # gloo waits for nobody
    ],
)
def test_after_an_error_of_its_own_a_process_waits_for_nobody(
    error, world_size, device, is_launched, expected, monkeypatch
):
    done = []
    monkeypatch.setattr(dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: done.append("aborted"))
    if is_launched:
        monkeypatch.setenv(NNODES_VARIABLE, "1")
    _leave(Ranks(0, world_size, world_size, device), error, is_ours=True)
    assert "".join(done) == expected


@pytest.mark.parametrize("timeout_s", [7.0, 11.0])  # the second one with groups of its own
@pytest.mark.parametrize("kind", ["table_row_wise", "grid_shard"])
def test_groups_within_and_across_hosts_have_the_timeout_of_the_run(kind, timeout_s):
    config = load_config("criteo-small", {"sharding.constraints": f'["t_cat_0={kind}"]'})
    with join_process_group(timeout_s) as ranks:
        shape = ModelShape(config.model, num_dense=2, num_sparse=1, known_features=features_of_sizes({"cat_0": 9}))
        build_sharded_model(config, shape, dense_sample=None, ranks=ranks)
        for group in (comm._INTRA_PG, comm._CROSS_PG):
            assert group._get_backend(torch.device("cpu")).options._timeout.total_seconds() == timeout_s
    assert comm._INTRA_PG is None
    assert comm._CROSS_PG is None


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
