"""The processes of a run: who I am among them, where I compute, and how the group begins and ends."""

import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from torchdlrm.errors import LostProcessError
from torchdlrm.training.agreement import Settings, agree


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: from 0; rank 0 writes files and talks to people.
        world_size: number of processes.
        local_world_size: number of processes on this host.
        device: where this process computes.
        timeout_s: how long to wait for a process that does not answer, in seconds.
    """

    rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    timeout_s: float = 600.0

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and talks to people."""
        return self.rank == 0

    @property
    def process_group(self) -> dist.ProcessGroup:
        """All processes of the run."""
        group = dist.group.WORLD
        assert group is not None, "the group exists inside `join_process_group`"
        return group

    def new_group(self) -> dist.ProcessGroup:
        """All processes once more, for messages that must not mix with those of the steps; every rank must call this.

        It loses patience when the group itself does: torch's default is half an hour, whatever the first group has.
        """
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        return group

    def from_first(self, value: Any) -> Any:
        """The value that rank 0 has; every rank must call this."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.process_group)
        return values[0]

    def are_fewer(self, error: RuntimeError) -> bool:
        """Whether an error says that another process is gone or late."""
        return self.world_size > 1 and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS)

    @contextmanager
    def raising_lost_process(self) -> Iterator[None]:
        """Inside, a process that died or hangs becomes one clear error on those that wait for it."""
        try:
            yield
        except RuntimeError as error:
            if not self.are_fewer(error):
                raise
            first_line = str(error).splitlines()[0]
            msg = (
                f"process {self.rank} of {self.world_size} has lost another one, which died or has not answered for "
                f"{self.timeout_s:g} s (train.timeout_s): {first_line}"
            )
            raise LostProcessError(msg) from error


# What gloo and NCCL say when a peer is gone or late.
_SIGNS_OF_A_LOST_PROCESS = ("imed out", "imeout", "onnection closed", "onnection reset", "roken pipe", "NCCL", "gloo")


@contextmanager
def join_process_group(timeout_s: float = 600.0, describe: Callable[[], Settings] = dict) -> Iterator[Ranks]:
    """Join the group that torch's launcher has described in the environment, or form one of a single process.

    NCCL where there is a GPU for each process of the host, gloo otherwise. On CPU each process takes its share of
    the cores that it may run on.

    Args:
        timeout_s: how long to wait for a process that does not answer before the job ends, in seconds.
        describe: gives the settings that all machines must have been started with, see `torchdlrm.training.agreement`.

    Raises:
        UserError: machines were started with different settings, or one cannot take part.
        LostProcessError: a process does not come, dies, or does not answer, also inside.
    """
    silence_library_warnings()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank, local_world_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and torch.cuda.device_count() >= local_world_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ranks = Ranks(rank, world_size, local_world_size, device, timeout_s)
    with ranks.raising_lost_process():
        if "RANK" in os.environ:
            _form_group(backend, device, timeout_s, describe)
        else:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
        try:
            yield ranks
        finally:
            dist.destroy_process_group()


def _form_group(backend: str, device: torch.device, timeout_s: float, describe: Callable[[], Settings]) -> None:
    """Connect to the other processes, under keys of the store that no earlier start of the job has used.

    The launcher's store outlives the processes. With the keys of a start before, gloo may find the address of a process
    that is dead, and both sides wait until the timeout.
    """
    store, rank, world_size = next(rendezvous("env://"))
    is_one_node = world_size == int(os.environ["LOCAL_WORLD_SIZE"])
    if is_one_node:
        start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    else:  # agents of several nodes count restarts each for itself: count who has come instead
        start = (store.add("torchdlrm/processes", 1) - 1) // world_size
    store = dist.PrefixStore(f"torchdlrm/start-{start}", store)  # type: ignore[attr-defined]
    if not is_one_node:
        settings = dist.PrefixStore("settings", store)  # type: ignore[attr-defined]
        agree(settings, describe, device=device, timeout_s=timeout_s)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if device.type == "cuda" else None,
    )


def silence_library_warnings() -> None:
    """Keep quiet what TorchRec and torch say of each other's interfaces: no user can act on it."""
    for message in ("Please use DTensor instead", "`broadcast_buffers` is deprecated"):
        warnings.filterwarnings("ignore", message=message, category=FutureWarning)
    # "The topology was constructed directly": its factory adds nothing but presets of Meta's own machines.
    logging.getLogger("torchrec.distributed.planner.types").setLevel(logging.ERROR)
    logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)
    # The launcher's own account of a failed process, with its traceback: `launch` tells it once, in our words.
    launcher = [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]
    for name in (*launcher, "torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
