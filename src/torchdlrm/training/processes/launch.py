"""Runs a function in one process or in many, on one node or several, through torch's elastic launcher."""

import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import parent_process, resource_tracker
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed.elastic.agent.server.api import WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import dynamic_rendezvous
from torch.distributed.elastic.rendezvous.api import RendezvousError, RendezvousInfo
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.multiprocessing import _prctl_pr_set_pdeathsig  # type: ignore[attr-defined]

from torchdlrm.errors import Interrupted, LostProcessError, TorchDLRMError, TrainingError, UserError
from torchdlrm.training.processes.agreement import LAUNCHER_VARIABLE, NNODES_VARIABLE
from torchdlrm.training.processes.library_noise import silenced_libraries
from torchdlrm.training.processes.process_group import join_process_group, refusing, restored_handlers

# Name of the file, before the rank, in which an exception is written down that was not raised on purpose.
_UNEXPECTED = "unexpected-"
# Seconds of a core until a process has loaded torch and TorchRec.
_LOAD_S = 5
# How long a process that has lost another waits for the launcher, which looks ten times a second.
_FIND_TIMEOUT_S = 1.0
# These end a job, as Ctrl-C does, unless it was started with them ignored.
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# To tell nodes that are waiting already; they may also have refused by themselves.
_REFUSAL_TIMEOUT_S = 15


@dataclass(frozen=True)
class Processes:
    """How many processes do the work, and what happens when one of them dies.

    Attributes:
        nproc_per_node: on each node.
        nnodes: number of nodes; the same command is started on each.
        rdzv_endpoint: HOST:PORT of one of the nodes, where they find each other.
        rdzv_id: name of the job, the same on all nodes.
        max_restarts: how often all processes are started again after one has died.
        shutdown_timeout_s: how long a process that is asked to stop may take to save.
        join_timeout_s: how long to wait for the other nodes.
    """

    nproc_per_node: int = 1
    nnodes: int = 1
    rdzv_endpoint: str = ""
    rdzv_id: str = "torchdlrm"
    max_restarts: int = 0
    shutdown_timeout_s: int = 600
    join_timeout_s: int = 600

    @property
    def world_size(self) -> int:
        """All processes together."""
        return self.nproc_per_node * self.nnodes

    @property
    def crowding(self) -> str:
        """What to expect where this machine has fewer cores than processes; empty where it has enough, or GPUs."""
        num_cores = len(os.sched_getaffinity(0))
        cores = "1 core" if num_cores == 1 else f"{num_cores} cores"
        if self.nproc_per_node <= max(num_cores, torch.cuda.device_count()):
            return ""
        return (
            f"this machine has {cores}, and at every step all processes wait for the last one; expect many times what "
            f"{num_cores} need, and {_LOAD_S * self.nproc_per_node / num_cores:.0f} s or more until all have loaded "
            f"torch: {num_cores} or fewer fit"
        )


def launch(entrypoint: Callable[..., Any], *args: object, processes: Processes) -> Any:
    """Call `entrypoint(*args)` in new processes, or right here when there is one and it need not be restarted.

    Args:
        entrypoint: a function of a module; the processes import it. Its result must be picklable.
        args: picklable arguments.
        processes: how many.

    Returns:
        What the entrypoint returned on rank 0; on a node without it, what the node's first process returned.

    Raises:
        TorchDLRMError: what a process has raised on purpose.
        TrainingError: a process failed otherwise; the message names the rank and why.
        Interrupted: SIGTERM or Ctrl-C; the processes were asked to end, have had time to save, and say what they saved.
    """
    if processes.world_size == 1 and not processes.max_restarts:
        return entrypoint(*args)
    several_nodes = processes.nnodes > 1
    launcher = uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=processes.nnodes,
        max_nodes=processes.nnodes,
        nproc_per_node=processes.nproc_per_node,
        run_id=processes.rdzv_id if several_nodes else launcher,
        rdzv_backend="c10d",
        rdzv_endpoint=processes.rdzv_endpoint if several_nodes else "localhost:0",
        rdzv_configs={"join_timeout": processes.join_timeout_s},
        max_restarts=processes.max_restarts,
        monitor_interval=0.1,
        shutdown_timeout=processes.shutdown_timeout_s,
        signals_to_handle="SIGQUIT",  # it wants one at least; the others are ours
    )
    with silenced_libraries(), tempfile.TemporaryDirectory(prefix="torchdlrm-") as folder:
        error_folder = Path(folder)
        try:
            with _signals_for_the_launcher(), _a_store_for_each_start():
                variables = {NNODES_VARIABLE: str(processes.nnodes), LAUNCHER_VARIABLE: launcher}
                results = elastic_launch(config, _recorded)(entrypoint, error_folder, variables, *args)
        except ChildFailedError as error:
            raise _why_it_failed(error, error_folder, processes) from error
        except RendezvousError as error:
            msg = (
                f"not all of {processes.nnodes} nodes have met at {processes.rdzv_endpoint} within "
                f"{processes.join_timeout_s} s; each needs the same `nnodes`, `rdzv_endpoint` and `rdzv_id`, and one "
                "that has refused to start says why"
            )
            raise _reported_error(error_folder) or TrainingError(msg) from error
        except dist.DistError as error:
            msg = (
                f"the machines of this training have lost each other while they met at {processes.rdzv_endpoint} to "
                "start again; end the command on all of them and start it again on all: it resumes from the last "
                "checkpoint"
            )
            raise _reported_error(error_folder) or LostProcessError(msg) from error
        except SignalException as error:
            msg = "interrupted; nothing was saved after the last checkpoint, if any; the same command resumes there"
            reported = _reported_error(error_folder)
            # The signal ends a process at once that has not begun to train; another that has begun has only lost it.
            raise (
                Interrupted(msg) if reported is None or isinstance(reported, LostProcessError) else reported
            ) from error
        refusal = _reported_error(error_folder)
    if isinstance(refusal, UserError):  # not a lost process that another start has made up for
        raise refusal
    return results[min(results)]


@contextmanager
def refusing_everywhere(processes: Processes) -> Iterator[None]:
    """What is refused inside, before `launch`, is refused on the other nodes too, which would wait for this one."""
    try:
        yield
    except UserError as error:
        if processes.nnodes > 1:
            with suppress(TorchDLRMError):  # this very error, or no other node is waiting
                launch(_refuse, error, processes=replace(processes, max_restarts=0, join_timeout_s=_REFUSAL_TIMEOUT_S))
        raise


def _refuse(error: UserError) -> None:
    with join_process_group(describe=refusing(error), device="cpu"):
        pass


@contextmanager
def _a_store_for_each_start() -> Iterator[None]:
    """Inside, the processes of each start get a store that no earlier one has used.

    Torch's launchers keep that of their first start, and tell its address in that start alone: a machine that takes the
    place of another would wait for it in vain, and keys of processes that died on the way would stay.
    """
    meet, name = DynamicRendezvousHandler.next_rendezvous, dynamic_rendezvous.get_method_name

    def meet_anew(handler: Any) -> RendezvousInfo:
        handler._bootstrap_store_info = None
        return meet(handler)

    DynamicRendezvousHandler.next_rendezvous = meet_anew  # type: ignore[assignment, method-assign]
    dynamic_rendezvous.get_method_name = str  # for records not kept it reads the source of all modules: 1.5 s of a core
    try:
        yield
    finally:
        DynamicRendezvousHandler.next_rendezvous, dynamic_rendezvous.get_method_name = meet, name  # type: ignore[method-assign]


@contextmanager
def _signals_for_the_launcher() -> Iterator[None]:
    """Inside, Ctrl-C, SIGTERM and SIGHUP become a SIGTERM to the processes, which ends them quietly or lets them save.

    While torch starts the processes a signal waits: torch would forget those that it has started, and they would print
    tracebacks. The terminal sends Ctrl-C to them as well, while they import torch for seconds: so they start with it
    blocked, until `_recorded` ignores it.
    """
    with restored_handlers(signal.SIGINT, *_STOP_SIGNALS, signal.SIGQUIT) as may_change:
        if not may_change:
            yield
            return
        start = LocalElasticAgent._start_workers
        postponed: list[int] = []
        is_starting = is_over = False

        def stop(number: int, frame: FrameType | None = None) -> None:
            nonlocal is_over
            if is_starting:
                postponed.append(number)
                return
            if is_over and number == signal.SIGINT:
                signal.default_int_handler(number, frame)  # a second Ctrl-C is from a person in a hurry
            is_over = True
            raise SignalException(signal.Signals(number).name, signal.SIGTERM)

        def start_in_peace(agent: LocalElasticAgent, group: WorkerGroup) -> dict[int, Any]:
            nonlocal is_starting
            is_starting = True
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                return start(agent, group)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                is_starting = False
                if postponed:
                    stop(postponed[0])

        resource_tracker.ensure_running()  # multiprocessing starts it with the first process, and then unblocks Ctrl-C
        for number in _STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # by nohup
                signal.signal(number, stop)
        signal.signal(signal.SIGINT, stop)
        LocalElasticAgent._start_workers = start_in_peace  # type: ignore[method-assign]
        try:
            yield
        finally:
            LocalElasticAgent._start_workers = start  # type: ignore[method-assign]


def _recorded(entrypoint: Callable[..., Any], error_folder: Path, variables: dict[str, str], *args: object) -> Any:
    """Call the entrypoint; what it raises on purpose is written down for the parent, who knows only exit codes."""
    _die_with_the_launcher()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    unexpected = error_folder / f"{_UNEXPECTED}{os.environ.get('RANK', '0')}"
    unexpected.unlink(missing_ok=True)  # of a start before
    if (earlier := _reported_error(error_folder)) and not isinstance(earlier, LostProcessError):
        raise earlier  # started again, but an error of this kind would only come again
    try:
        return entrypoint(*args)
    except TorchDLRMError as error:
        kind = type(error)
        record = {"module": kind.__module__, "class": kind.__name__, "message": str(error)}
        _write_down(record, error_folder / f"error-{os.environ.get('RANK', '0')}.json")
        if isinstance(error, UserError) and error.is_everywhere:
            return None  # every process of every machine: the launchers part in peace, and none starts another round
        if isinstance(error, LostProcessError):
            # The launcher ends this one as soon as it has found a process that died, and then reports that one.
            signal.sigtimedwait({signal.SIGTERM}, _FIND_TIMEOUT_S)
    except Exception as error:  # noqa: BLE001 - the process ends with it
        # The launcher tells of one process that has failed, which may be another that has only lost this one.
        record = {"message": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        _write_down(record, unexpected)
    finally:
        gc.freeze()  # as the command does when it ends
    sys.stdout.flush()
    sys.stderr.flush()
    # What is left of the group would wait for the other processes, for as long as they may be silent.
    os._exit(1)


def _write_down(record: dict[str, str], path: Path) -> None:
    """Write a record that is whole or not there, and let no signal end this process meanwhile or from then on."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    partial = path.with_name(f"{os.getpid()}.partial")
    partial.write_text(json.dumps(record), encoding="utf-8")
    partial.rename(path)


def _die_with_the_launcher() -> None:
    """From here on this process is killed when the launcher is, also while it is stopped or hangs.

    torch has asked for SIGINT, on which a training continues until its ranks agree to stop, and would save while the
    job is started again. Linux sends the signal when the thread that has started us ends: it stays in `launch`.
    """
    _prctl_pr_set_pdeathsig(signal.SIGKILL)
    if (launcher := parent_process()) and os.getppid() != launcher.pid:  # it died before we could ask
        os.kill(os.getpid(), signal.SIGKILL)


def _reported_error(error_folder: Path) -> TorchDLRMError | None:
    """What a process has raised on purpose; that it lost another one only where no process says why."""
    found: list[TorchDLRMError] = []
    for path in sorted(error_folder.glob("error-*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        kind = getattr(importlib.import_module(record["module"]), record["class"], TorchDLRMError)
        # Without __init__, which may want more than the message; str() and the exit code need no more than that.
        found.append(kind.__new__(kind, record["message"]))
    return min(found, key=lambda error: isinstance(error, LostProcessError), default=None)


def _why_it_failed(error: ChildFailedError, error_folder: Path, processes: Processes) -> TorchDLRMError:
    """What was raised on purpose, else an unexpected exception; a lost process only where there is neither."""
    reported = _reported_error(error_folder)
    if reported is not None and not isinstance(reported, LostProcessError):
        return reported
    unexpected = sorted(error_folder.glob(f"{_UNEXPECTED}*"), key=lambda path: path.stat().st_mtime_ns)
    rank, failure = error.get_first_failure()
    note = ""
    if unexpected:
        record = json.loads(unexpected[0].read_text(encoding="utf-8"))
        rank, reason, note = int(unexpected[0].name.removeprefix(_UNEXPECTED)), record["message"], record["traceback"]
    elif failure.exitcode < 0:
        reason = _killed_by(-failure.exitcode)
    elif reported is not None:
        return reported
    else:
        said: Any = failure.message  # of an exception torch has written down message, traceback and time
        reason = said["message"] if isinstance(said, dict) else f"exit code {failure.exitcode}"
    after = f" (after {processes.max_restarts} restarts)" if processes.max_restarts else ""
    found = TrainingError(f"process {rank} of {processes.world_size} failed{after}: {reason}")
    if note:
        found.add_note(note.rstrip())
    return found


# What most often sends them.
_SENDERS = {
    signal.SIGKILL: "Linux does so to a process when memory runs out, and dmesg then says so; fewer processes on a "
    "machine, smaller batches and checkpoint.asynchronous = false need less (docs/faq.md#out-of-memory)",
    signal.SIGABRT: "NCCL does so on GPUs when another process has not answered for train.timeout_s, and other "
    "libraries where a check of theirs has failed; they write why above",
    signal.SIGBUS: "Linux does so when there is no room for shared memory in /dev/shm (docs/faq.md#no-room-in-devshm)",
}


def _killed_by(number: int) -> str:
    try:
        name = signal.Signals(number)
    except ValueError:
        return f"it was ended by signal {number}"
    why = f": {_SENDERS[name]}" if name in _SENDERS else ""
    return f"it was ended by {name.name}{why}"
