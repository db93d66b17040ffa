"""Copies a training's state to host memory, where it can be written while the training goes on.

In: the state dict of a sharded model and its optimizer, on any device.  Out: the same, on the host.  Copies of a GPU's
state are in one block of pinned memory, which is kept from save to save: transfers into pageable memory take several
times as long, and the steps wait for them.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import Shard, ShardedTensor
from torch.distributed.remote_device import _remote_device

_NUMPY_HAS = (torch.float32, torch.float16, torch.float64, torch.int32, torch.int64)
_ALIGNMENT_BYTES = 64  # a line of the cache, and more than any data type needs
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU, whichever is current
logger = logging.getLogger("torchdlrm")


class HostCopies:
    """Copies of one rank's state. The last ones are overwritten by the next, where the rank's device is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block: torch.Tensor | None = None
        self._is_pinned = False

    @property
    def has_memory(self) -> bool:
        """Whether there is memory of earlier copies, which the next ones will overwrite."""
        return self._block is not None

    def take(self, state: dict[str, Any]) -> dict[str, Any]:
        """Copy the state as it is after everything that the current stream of this thread has been given to do."""
        if self._device.type == "cpu":
            return with_tensors(state, lambda tensor: tensor.detach().to("cpu", copy=True))
        needed_bytes = sum(map(_room, tensors_of(state)))
        if self._block is None or len(self._block) < needed_bytes:
            self.close()
            self._block = self._pinned(needed_bytes)
        end_byte = 0

        def put(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal end_byte
            assert self._block is not None
            place = self._block[end_byte : end_byte + tensor.numel() * tensor.element_size()]
            end_byte += _room(tensor)
            copied = in_own_storage(place.view(tensor.dtype).view(tensor.shape))
            return copied.copy_(tensor.detach(), non_blocking=self._is_pinned)

        copied = with_tensors(state, put)
        torch.cuda.current_stream(self._device).synchronize()
        return copied

    def close(self) -> None:
        """Give the memory back; nothing may be reading the last copies any more."""
        if self._block is not None and self._is_pinned:
            torch.cuda.cudart().cudaHostUnregister(self._block.data_ptr())
        self._block, self._is_pinned = None, False

    def _pinned(self, num_bytes: int) -> torch.Tensor:
        """Memory that is pinned here and not by torch's allocator, which would round it up to a power of two."""
        # Filled by all threads: CUDA would ask for each page with one, tens of seconds for a large rank's tables.
        block = torch.empty(num_bytes, dtype=torch.uint8).fill_(0)
        problem = int(torch.cuda.cudart().cudaHostRegister(block.data_ptr(), num_bytes, _PORTABLE))
        self._is_pinned = not problem
        if problem:
            logger.warning(
                "checkpoints: %.1f GB of host memory cannot be pinned (CUDA error %d), so steps wait longer for a copy",
                num_bytes / 1e9,
                problem,
            )
            with suppress(RuntimeError):  # CUDA keeps the error, and torch would find it after its next kernel
                torch.full((1,), 0.0, device=self._device)
        return block


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """This rank's tensors of a nested state, in the order in which `with_tensors` visits them."""
    if isinstance(state, dict):
        for value in state.values():
            yield from tensors_of(value)
    elif isinstance(state, ShardedTensor):
        yield from (shard.tensor for shard in state.local_shards())
    elif isinstance(state, torch.Tensor):
        yield state


def with_tensors(state: Any, task: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same nested state with what the task makes of its tensors, and copies of everything else."""
    if isinstance(state, dict):
        return {key: with_tensors(value, task) for key, value in state.items()}
    if isinstance(state, ShardedTensor):
        return _with_shards(state, [task(shard.tensor) for shard in state.local_shards()])
    return task(state) if isinstance(state, torch.Tensor) else copy.deepcopy(state)


def _with_shards(state: ShardedTensor, tensors: list[torch.Tensor]) -> ShardedTensor:
    """The same shards with other tensors, which may be on the host by now: torch compares them with the metadata."""
    is_on_host = all(tensor.device.type == "cpu" for tensor in tensors)

    def placed(shard: Any) -> Any:
        found = copy.deepcopy(shard)
        if is_on_host:
            found.placement = _remote_device(f"rank:{shard.placement.rank()}/cpu")
        return found

    metadata = copy.deepcopy(state.metadata())
    metadata.shards_metadata = [placed(shard) for shard in metadata.shards_metadata]
    metadata.tensor_properties.pin_memory = any(tensor.is_pinned() for tensor in tensors)
    shards = [
        Shard(tensor, placed(shard.metadata)) for tensor, shard in zip(tensors, state.local_shards(), strict=True)
    ]
    return ShardedTensor._init_from_local_shards_and_global_metadata(shards, metadata)


def in_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as a storage that ends where the tensor ends.

    FBGEMM keeps all tables in one buffer, and torch saves of a part of a storage a copy: a table's worth of memory for
    each of them, which the allocator may not find again.
    """
    tensor = tensor.detach()
    if tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.dtype in _NUMPY_HAS:
        return torch.from_numpy(tensor.numpy())
    return tensor


def _room(tensor: torch.Tensor) -> int:
    """Bytes that a tensor takes in the block, so that the next one begins well."""
    return math.ceil(tensor.numel() * tensor.element_size() / _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
