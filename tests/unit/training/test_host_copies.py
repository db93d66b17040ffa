"""What a checkpoint copies to the host, with tensors on the meta device in place of those of a GPU."""

import threading

import pytest
import torch
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.checkpoint import filesystem

from torchdlrm.training.checkpoint import Position
from torchdlrm.training.checkpointer import Checkpointer
from torchdlrm.training.host_copies import HostCopies, with_tensors
from torchdlrm.training.processes.process_group import Ranks, join_process_group

GPU = torch.device("cuda", 1)


def position_of(step):
    return Position(step, {"epoch": 0, "batches_consumed": step})


@pytest.fixture
def ranks():
    with join_process_group() as ranks:
        yield ranks


@pytest.mark.usefixtures("ranks")
def test_a_table_has_the_placement_of_where_it_is_copied_to():
    shard = Shard(torch.empty(4, 8, device="meta"), ShardMetadata([0, 0], [4, 8], "rank:0/meta"))
    table = ShardedTensor._init_from_local_shards([shard], 4, 8)

    def placements(state):
        return [str(shard.placement) for shard in state.metadata().shards_metadata]

    copied = with_tensors({"t": table}, lambda tensor: torch.zeros(tensor.shape))["t"]
    assert copied.local_shards()[0].tensor.device.type == "cpu"
    same = with_tensors(table, torch.Tensor.detach)
    assert [placements(state) for state in (copied, table, same)] == [["rank:0/cpu"], *[["rank:0/meta"]] * 2]


class Runtime:
    """CUDA's, as far as pinning needs it."""

    def __init__(self, problem=0):
        self.problem, self.pinned, self.waits = problem, [], 0

    def cudaHostRegister(self, address, num_bytes, flags):  # noqa: N802 - CUDA's name
        assert flags == 1
        self.pinned += [] if self.problem else [(address, num_bytes)]
        return self.problem

    def cudaHostUnregister(self, address):  # noqa: N802 - CUDA's name
        self.pinned = [block for block in self.pinned if block[0] != address]
        return 0

    def synchronize(self):
        self.waits += 1


@pytest.fixture
def runtime(monkeypatch, request):
    runtime = Runtime(getattr(request, "param", 0))
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: runtime if device == GPU else None)
    return runtime


def state_of(value):
    return {
        "model": {"a": torch.full((3, 5), value), "b": torch.full((), int(value), dtype=torch.int64)},
        "optimizer": {"a": torch.full((7,), value, dtype=torch.float64).expand(2, 7), "steps": 3},
    }


def assert_equal(found, value):
    torch.testing.assert_close(found["model"], state_of(value)["model"])
    torch.testing.assert_close(found["optimizer"]["a"], state_of(value)["optimizer"]["a"].contiguous())
    assert found["optimizer"]["steps"] == 3


def test_a_gpus_copies_lie_in_pinned_memory_which_is_kept_and_the_host_waits_once(runtime):
    copies = HostCopies(GPU)
    first = copies.take(state_of(1.0))
    (block,) = runtime.pinned
    assert_equal(first, 1.0)
    second = copies.take(state_of(2.0))
    assert_equal(second, 2.0)
    assert_equal(first, 2.0)  # the same memory
    assert (runtime.pinned, runtime.waits) == ([block], 2)
    for found in (second["model"]["a"], second["optimizer"]["a"]):
        assert block[0] <= found.data_ptr() < block[0] + block[1]
        assert found.untyped_storage().nbytes() == found.nbytes  # else torch would copy it once more to write it
    copies.take(state_of(3.0) | {"more": torch.zeros(1000)})
    assert [num_bytes > block[1] for _, num_bytes in runtime.pinned] == [True]
    copies.close()
    assert runtime.pinned == []


@pytest.mark.parametrize("runtime", [1], indirect=True)
def test_memory_that_cannot_be_pinned_takes_the_copies_all_the_same(runtime, caplog, monkeypatch):
    left = ["CUDA error: invalid argument"]  # of which the next kernel is told

    def full(*_, **options):
        assert options["device"] == GPU
        raise RuntimeError(left.pop())

    copies, state = HostCopies(GPU), state_of(1.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "full", full)
        copied = copies.take(state)
    assert left == []
    assert_equal(copied, 1.0)
    assert_equal(copies.take(state_of(2.0)), 2.0)
    copies.close()
    assert runtime.pinned == []
    assert caplog.text.count("cannot be pinned (CUDA error 1)") == 1


def test_copies_on_a_cpu_are_memory_of_their_own():
    copies = HostCopies(torch.device("cpu"))
    first, second = copies.take(state_of(1.0)), copies.take(state_of(2.0))
    assert_equal(first, 1.0)
    assert_equal(second, 2.0)


def test_the_writing_thread_computes_on_its_own_ranks_gpu(ranks, tmp_path, monkeypatch):
    """The current GPU is a thread's own, and torch's writer asks the current one: it would take memory of GPU 0."""
    chosen = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: chosen.append((threading.current_thread().name, device))
    )
    on_gpu = Ranks(0, 1, 1, GPU, _made_groups=ranks._made_groups)
    checkpointer = Checkpointer(tmp_path, torch.nn.Linear(2, 1), None, on_gpu)
    checkpointer._writer.submit(int).result()
    checkpointer.close()
    assert [(name.startswith("torchdlrm-checkpoint"), device) for name, device in chosen] == [(True, GPU)]


def test_a_save_that_is_waited_for_pins_nothing(ranks, runtime, tmp_path, monkeypatch):
    """Torch's loader that copies ahead would pin two shards of a GPU's tables at a time, and keep them."""
    ahead = []
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", lambda *_, **__: ahead.append(1) or 1 / 0)
    for name, made_up in (("set_device", None), ("synchronize", None), ("is_available", True)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, made_up=made_up: made_up)
    checkpointer = Checkpointer(
        tmp_path, torch.nn.Linear(2, 1), None, Ranks(0, 1, 1, GPU, _made_groups=ranks._made_groups)
    )
    assert checkpointer.save(position_of(10), wait=True)
    checkpointer.close()
    assert (ahead, runtime.pinned) == ([], [])


class Watched(torch.nn.Linear):
    """Notes when its state is asked for."""

    def __init__(self, events):
        super().__init__(2, 1)
        self.events = events

    def state_dict(self, *args, **options):
        self.events.append("state")
        return super().state_dict(*args, **options)


def test_a_checkpoint_of_a_gpu_waits_for_all_its_streams_and_is_read_back(ranks, runtime, tmp_path, monkeypatch):
    """A stream that prefetches rows changes a cached table while no step is computed."""
    events = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "synchronize", events.append)
    model = Watched(events)
    checkpointer = Checkpointer(tmp_path, model, None, Ranks(0, 1, 1, GPU, _made_groups=ranks._made_groups))
    expected = model.weight.detach().clone()
    checkpointer.save(position_of(10), wait=False)
    model.weight.data.zero_()
    checkpointer.join()
    assert events == [GPU, "state"]
    assert len(runtime.pinned) == 1
    assert checkpointer.restore().step == 10
    torch.testing.assert_close(model.weight.detach(), expected)
    assert checkpointer.save(position_of(20), wait=True)
    assert (len(runtime.pinned), runtime.waits) == (1, 2)  # through the memory of the first copy
    assert checkpointer.restore().step == 20
    torch.testing.assert_close(model.weight.detach(), expected)
    checkpointer.close()
    assert runtime.pinned == []
