"""Manages the processes of a run: which one this is, where it computes, and how the group begins and ends."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import count
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous
from torchrec.distributed import comm

from torchdlrm.config import DeviceChoice
from torchdlrm.errors import ConfigError, LostProcessError, TrainingError, UserError
from torchdlrm.training.processes.agreement import NNODES_VARIABLE, Settings, agree
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.processes.memory import describe_shortage, is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all.

    Attributes:
        rank: from 0; rank 0 writes files and reports progress.
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
    _made_groups: list[dist.ProcessGroup] = field(default_factory=list, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    @property
    def process_group(self) -> dist.ProcessGroup:
        """All processes of the run."""
        group = dist.group.WORLD
        assert group is not None, "the group exists inside `join_process_group`"
        return group

    def new_group(self) -> dist.ProcessGroup:
        """All processes once more, for messages that must not mix with those of the steps; every rank must call this.

        It has the timeout of the group itself: torch's default is half an hour, whatever the first group has.
        """
        group: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.timeout_s))
        self._made_groups.append(group)
        return group

    def set_timeout_of_host_groups(self) -> None:
        """Give TorchRec's groups of ranks within a host and across hosts, where it has made them, the same timeout.

        It makes them once for the whole process, for tables that are cut within a host, with torch's default.
        """
        set_timeout = (
            getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
        )  # public in torch 2.14
        for group in (comm._INTRA_PG, comm._CROSS_PG):
            if group is not None:
                set_timeout(timedelta(seconds=self.timeout_s), group)

    def from_first(self, value: Any, group: dist.ProcessGroup | None = None) -> Any:
        """The value that rank 0 has; every rank must call this, and give the same group where it is another one."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=group or self.process_group)
        return values[0]

    def on_first(self, task: Callable[[], T]) -> T:
        """What a task gives on rank 0; the UserError that it raises there is raised on every rank."""
        result: T | None = None
        problem: UserError | None = None
        if self.is_first:
            try:
                result = task()
            except UserError as error:
                problem = error
        result, problem = self.from_first((result, problem))
        if problem is not None:
            raise problem.everywhere()
        return result

    def all_gather(self, value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
        """The values of all ranks, by rank; every rank must call this, and give the same group."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value, group=group or self.process_group)
        return values

    def are_fewer(self, error: RuntimeError) -> bool:
        """Whether an error says that another process is gone or late."""
        return self.world_size > 1 and any(sign in str(error) for sign in _SIGNS_OF_A_LOST_PROCESS)

    @contextmanager
    def explaining_failures(self) -> Iterator[None]:
        """Inside, memory that runs out, and a process that others have lost, become one clear error each."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                why = describe_shortage(error, self.device)
                raise TrainingError(f"process {self.rank} of {self.world_size} has too little memory: {why}") from error
            if isinstance(error, MemoryError) or not self.are_fewer(error):
                raise
            first_line = str(error).splitlines()[0]
            raise LostProcessError(
                f"process {self.rank} of {self.world_size} has lost another one, which died or has not answered for "
                f"{self.timeout_s:g} s (train.timeout_s): {first_line}"
            ) from error


# What gloo and NCCL say when a peer is gone or late; they say other things too, such as that messages do not match.
_SIGNS_OF_A_LOST_PROCESS = (
    *("imed out", "imeout", "onnection closed", "onnection reset", "onnection refused", "roken pipe", "ocket closed"),
    *("remote process exit", "ncclRemoteError", "communicator was aborted"),
)


_OF_A_LAUNCHER = ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_groups_of_this_process = count()


@contextmanager
def join_process_group(
    timeout_s: float = 600.0,
    describe: Callable[[], Settings] = dict,
    *,
    device: DeviceChoice = "auto",
    setting: str = "train.device",
) -> Iterator[Ranks]:
    """Join the group that torch's launcher has described in the environment, or form one of a single process.

    NCCL where the processes compute on GPUs, gloo otherwise. Each process takes its share of the cores that it may run
    on. Where a group exists already, it is used and left as it is. Afterwards torch's number
    of threads, random state, current GPU and matrix precision, the filters of warnings and the levels of other
    libraries' loggers are what they were.

    Args:
        timeout_s: how long to wait for a process that does not answer before the job ends, in seconds.
        describe: gives the settings that all machines must have been started with, as `settings_of` does.
        device: where to compute, see `choose_device_type`; in a group that exists already and has no NCCL, on CPU.
        setting: what messages call that choice.

    Raises:
        UserError: machines were started with different settings, or one cannot take part, for example because it lacks
            the GPUs that the others have; or a launcher has not given this process all that it must.
        LostProcessError: a process does not come, dies, or does not answer, also inside.
        TrainingError: this process runs out of memory inside.
    """
    is_ours = not dist.is_initialized()
    if is_ours and "RANK" in os.environ:
        _check_launcher()
    if is_ours:
        rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    else:
        rank, world_size = dist.get_rank(), dist.get_world_size()
    local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", "1" if is_ours else str(world_size)))
    has_nccl = is_ours or "cuda:nccl" in str(dist.get_backend_config())
    local_rank = int(os.environ.get("LOCAL_RANK", str(rank % local_world_size)))
    place = torch.device("cpu")
    try:
        if has_nccl:
            place = rank_device(local_rank, local_world_size, device, setting)
    except UserError as error:
        if world_size == local_world_size:
            raise error.everywhere() from None  # all processes of a machine see the same GPUs
        describe = refusing(error)
    ranks = Ranks(rank, world_size, local_world_size, place, timeout_s)
    with silenced_libraries(), _restored_settings(place), ranks.explaining_failures():
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_world_size))
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        if is_ours and "RANK" in os.environ:
            _form_group(backend, place, timeout_s, describe)
        elif is_ours:
            dist.init_process_group(backend, rank=0, world_size=1, store=dist.HashStore())  # type: ignore[attr-defined]
        try:
            yield ranks
        except BaseException as error:
            _leave(ranks, error, is_ours=is_ours)
            raise
        _leave(ranks, None, is_ours=is_ours)


def _check_launcher() -> None:
    """See that the launcher that has numbered this process has set all that its group needs; Slurm and MPI set less."""
    missing = [name for name in _OF_A_LAUNCHER if name not in os.environ]
    if missing:
        raise ConfigError(
            f"RANK says that a launcher has started this process, but {', '.join(missing)} are not set; start "
            "`dlrm train` with `nnodes` and `rdzv_endpoint` once on each machine (srun --ntasks-per-node=1), or "
            "set them for each process (of Slurm: LOCAL_RANK=$SLURM_LOCALID, LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE)"
        )


def _leave(ranks: Ranks, error: BaseException | None, *, is_ours: bool) -> None:
    """Leave the group, or where it existed before, those that we have made.

    The orderly end of NCCL waits for all that has been sent and received. After an error of this process alone that
    would be for processes that wait for this one, until `train.timeout_s` is over and before any has heard of the
    error. Aborting may wait for the others too, so a process of `launch` does not even do that: it ends as soon as it
    has reported to its launcher.
    """
    if not is_ours:
        for group in ranks._made_groups:  # of gloo, which does not wait
            dist.destroy_process_group(group)
        return
    comm._INTRA_PG = comm._CROSS_PG = None  # TorchRec's, which end with this one: it makes new ones
    is_alone = error is not None and not (isinstance(error, UserError) and error.is_everywhere)
    if not is_alone or ranks.device.type == "cpu":
        dist.destroy_process_group()
    elif ranks.world_size == 1 or NNODES_VARIABLE not in os.environ:
        dist.distributed_c10d._abort_process_group()


def refusing(error: UserError) -> Callable[[], Settings]:
    """What describes a machine that cannot take part to the others, which raise the same error."""

    def refuse() -> Settings:
        raise error

    return refuse


def _form_group(backend: str, device: torch.device, timeout_s: float, describe: Callable[[], Settings]) -> None:
    """Connect to the other processes, under keys of the store that no earlier start or group of the job has used.

    The launcher's store outlives the processes and their groups. With the keys of one before, gloo may find an address
    where no process listens any more: of one that is dead, or of this one when it trained something else.
    """
    store, rank, world_size = next(rendezvous("env://"))
    is_one_node = world_size == int(os.environ["LOCAL_WORLD_SIZE"])
    if is_one_node:
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        start = f"{restarts}-{next(_groups_of_this_process)}"
    else:  # agents of several nodes count restarts each for itself: count who has come instead
        start = str((store.add("torchdlrm/processes", 1) - 1) // world_size)
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


@contextmanager
def _restored_settings(device: torch.device) -> Iterator[None]:
    """Afterwards what torch keeps for the whole process is what it was; inside, the device is the current one."""
    num_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    on_gpu = device.type == "cuda"
    with torch.cuda.device(device) if on_gpu else nullcontext(), torch.random.fork_rng([device] if on_gpu else []):
        try:
            yield
        finally:
            torch.set_num_threads(num_threads)
            torch.set_float32_matmul_precision(precision)


@contextmanager
def restored_handlers(*numbers: signal.Signals) -> Iterator[bool]:
    """Afterwards signals have the handlers that they had; gives whether this thread, the main one, may set any."""
    may_change = threading.current_thread() is threading.main_thread()  # a library's user may run us in another
    before = {number: signal.getsignal(number) for number in numbers} if may_change else {}
    try:
        yield may_change
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether this run was asked to stop, by SIGTERM or Ctrl-C.

    Args:
        ranks: the processes, which must all stop after the same step.
    """

    # How often the ranks ask each other; a single process asks itself after every step.
    AGREE_EVERY_STEPS = 8

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._asked = False
        self._group = ranks.new_group() if ranks.world_size > 1 else None

    def poll(self, step: int, *, save_is_due: bool) -> tuple[bool, bool]:
        """Whether to stop after `step`, and whether to save: the same answer on every rank.

        Args:
            step: the step that is done.
            save_is_due: this rank's wish; clocks differ, so the ranks must agree.
        """
        if self._group is None:
            return self._asked, save_is_due
        if step % self.AGREE_EVERY_STEPS:
            return False, False
        wishes = torch.tensor([self._asked, save_is_due], dtype=torch.int32)
        dist.all_reduce(wishes, op=dist.ReduceOp.MAX, group=self._group)
        return bool(wishes[0]), bool(wishes[1])

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the first SIGTERM or Ctrl-C asks to stop; a second Ctrl-C interrupts a lone process at once."""

        def ask(number: int, _: FrameType | None) -> None:
            # A process of several hears of a Ctrl-C twice: from the terminal, and by its launcher.
            if self._asked and number == signal.SIGINT and "RANK" not in os.environ:
                raise KeyboardInterrupt
            self._asked = True

        numbers = (signal.SIGTERM, signal.SIGINT)
        with restored_handlers(*numbers) as may_change:
            for number in numbers if may_change else ():
                signal.signal(number, ask)
            if self._group is not None:  # a rank that a signal would still end takes those with it that have begun
                dist.barrier(self._group)
            yield
