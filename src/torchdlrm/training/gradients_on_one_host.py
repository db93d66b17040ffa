"""Adds up the dense parameters' gradients of two processes of one host in memory that both have mapped; on CPU.

Each rank writes a bucket of gradients where the other reads it, in place of DDP's way through gloo's sockets. Two
numbers have but one sum, so the bits are gloo's. Those of more ranks would depend on the order, and are left to gloo.

Two barriers keep the ranks apart: before a step's first bucket is written both have read the last step's, and before a
bucket is read both have written it. The backward of both ranks is the same graph, so they come to the same barriers in
the same order. The barriers are collectives of gloo: a process that has died, or is late, is noticed as anywhere else.
Why: docs/decisions/ranks-of-a-host-exchange-through-memory.md.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torchrec.distributed.model_parallel import DefaultDataParallelWrapper, DistributedModelParallel
from torchrec.distributed.types import ShardingEnv

from torchdlrm.shared_memory import SharedMemory
from torchdlrm.training.processes.process_group import Ranks

_PAGE_BYTES, _ALIGNMENT = 4096, 64


class AddedUpOnOneHost(DefaultDataParallelWrapper):  # type: ignore[misc]  # TorchRec is untyped
    """Holds dense parameters in TorchRec's `DistributedDataParallel`, whose hook adds up in memory where it can."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def wrap(self, dmp: DistributedModelParallel, env: ShardingEnv, device: torch.device) -> None:
        """Wrap the model; both ranks must call this."""
        super().wrap(dmp, env, device)
        for wrapper in [module for module in dmp.modules() if isinstance(module, DistributedDataParallel)]:
            sizes = [
                _aligned(param.nbytes)
                for name, param in wrapper.module.named_parameters()
                if param.requires_grad and name not in wrapper.parameters_to_ignore
            ]
            shared = SharedSum.of_two_ranks(sum(sizes), self._ranks)
            if shared is not None:
                wrapper.register_comm_hook(shared, lambda shared, bucket: shared.add_up_bucket(bucket))


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


class SharedSum:
    """Adds up gradients of two ranks in memory; the state of DDP's hook for buckets of them."""

    def __init__(self, memory: SharedMemory, num_bytes: int, group: dist.ProcessGroup) -> None:
        self._memory, self._group, self._rank = memory, group, dist.get_rank(group)
        self._places = [
            torch.frombuffer(memory.map, dtype=torch.uint8, count=num_bytes, offset=_PAGE_BYTES + rank * num_bytes)
            for rank in range(2)
        ]
        self._start = 0

    @classmethod
    def of_two_ranks(cls, num_bytes: int, ranks: Ranks) -> "SharedSum | None":
        """For gradients of `num_bytes`, each tensor aligned; None, on both, where they cannot share memory."""
        memory = SharedMemory.make_for_all("torchdlrm-gradients", _PAGE_BYTES + 2 * num_bytes, ranks.all_gather)
        return None if memory is None else cls(memory, num_bytes, ranks.new_group())

    def add_up_bucket(self, bucket: Any) -> Future[Tensor]:
        """The mean of both ranks' gradients, in the bucket itself."""
        grad = bucket.buffer()
        self.add_up(grad, is_first=bucket.index() == 0)  # they come in order
        done: Future[Tensor] = Future()
        done.set_result(grad)
        return done

    def add_up(self, grad: Tensor, *, is_first: bool) -> None:
        """Replace a part of the gradients by the mean of both ranks'; `is_first`: of this step's."""
        if is_first:
            self._wait_for_both()
            self._start = 0
        places = [place[self._start : self._start + grad.nbytes].view(grad.dtype) for place in self._places]
        self._start += _aligned(grad.nbytes)
        torch.mul(grad, 0.5, out=places[self._rank])
        self._wait_for_both()
        torch.add(*places, out=grad)

    def _wait_for_both(self) -> None:
        dist.barrier(group=self._group)
