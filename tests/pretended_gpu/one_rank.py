"""One rank of many in this process: its GPU and NCCL are pretended, and every other rank is a copy of it."""

import os
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
import torch.testing._internal.distributed.fake_pg
from torch import distributed as dist
from torchrec.distributed import comm

from torchdlrm.training import checkpointer


@contextmanager
def one_rank_of(world_size, *, nproc_per_node=8):
    """Inside, this process is rank 0 of so many; `torchdlrm` finds and uses the process group."""
    local_world_size = min(nproc_per_node, world_size)
    environment = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": str(local_world_size)}
    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment))
        stack.enter_context(mock.patch.multiple(dist, **_OBJECTS, new_group=_without_gloo(dist.new_group)))
        stack.enter_context(mock.patch.object(checkpointer, "save_distributed", _save_this_rank))
        dist.init_process_group(
            "cpu:fake,cuda:nccl",
            rank=0,
            world_size=world_size,
            store=dist.HashStore(),
            device_id=torch.device("cuda", 0),
        )
        try:
            yield
        finally:
            dist.destroy_process_group()
            comm._INTRA_PG = comm._CROSS_PG = None  # TorchRec keeps them for the process


def _without_gloo(new_group):
    def new_fake_group(ranks=None, timeout=None, backend=None, **options):
        return new_group(ranks, timeout, "fake" if backend == "gloo" else backend, **options)

    return new_fake_group


def _all_gather_object(object_list, obj, group=None):
    object_list[:] = [obj] * len(object_list)


def _gather_object(obj, object_gather_list=None, dst=None, group=None, group_dst=None):
    _all_gather_object(object_gather_list, obj)  # this is rank 0, where all is gathered


def _broadcast_object_list(object_list, src=None, group=None, device=None, group_src=None):
    """This is rank 0, which has them."""


_OBJECTS = {
    "all_gather_object": _all_gather_object,
    "gather_object": _gather_object,
    "broadcast_object_list": _broadcast_object_list,
}


def _save_this_rank(state, storage_writer, process_group=None):
    """In place of torch's save, which refuses a state without the shards of the ranks that are not there."""
    (storage_writer.path / ".metadata").write_bytes(b"")
    saved.append({device.type for device in _devices(state)})


saved: list[set[str]] = []  # for each checkpoint: the kinds of device that its tensors were on


def _devices(state):
    if isinstance(state, dict):
        for value in state.values():
            yield from _devices(value)
    elif hasattr(state, "local_shards"):
        yield from (shard.tensor.device for shard in state.local_shards())
    elif isinstance(state, torch.Tensor):
        yield state.device
