"""Runs the competitors of a benchmark interleaved, each in processes of its own.

What one sets for its process (allocator, threads) does not affect another, and the machine's load is the same for all,
because they alternate within seconds.
"""

import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from multiprocessing.connection import Connection
from operator import truediv
from typing import Any

import torch
from torch import distributed as dist

from torchdlrm.config import DeviceChoice
from torchdlrm.progress import ProgressListener
from torchdlrm.training.processes.process_group import Ranks, join_process_group

Step = Callable[[], object]
# What a turn takes: with less, what one small step waits for decides. Of very long steps a few must do.
_TURN_S, _MIN_STEPS, _MAX_STEPS = 0.5, 10, 1000
# What a process gets besides numbers of steps.
_END, _CHOOSE_THREADS = 0, -1
_TRIAL_S, _MIN_TRIALS, _MAX_TRIALS = 2.0, 3, 20
# Ends with the process that has started it, whatever ends that one.
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(100_000))"


class Competitor:
    """N processes that do the same steps together, on demand.

    Args:
        build: called in each process with its ranks and `arguments`; returns the step. A function of a module.
        arguments: picklable.
        nproc: number of processes.
        device: where they compute, as `train.device` has it.
    """

    def __init__(
        self, build: Callable[..., Step], *arguments: object, nproc: int, device: DeviceChoice = "auto"
    ) -> None:
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pids: list[int] = []
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(nproc):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, nproc, port, device, build, arguments), daemon=True
            )
            process.start()
            theirs.close()
            assert process.pid is not None
            self.pids.append(process.pid)
            self._pipes.append(ours)
            self._processes.append(process)

    @cached_property
    def num_threads(self) -> int:
        """Of torch in each process; known when all have been built."""
        return max(pipe.recv() for pipe in self._pipes)

    def choose_threads(self) -> None:
        """Let each process go on with one thread or with all it has, whichever is faster; the others must be idle."""
        assert self.num_threads
        for pipe in self._pipes:
            pipe.send(_CHOOSE_THREADS)
        self.num_threads = max(pipe.recv() for pipe in self._pipes)

    def run(self, steps: int) -> float:
        """Let all processes do `steps` steps; seconds from start to end of the slowest."""
        assert self.num_threads  # each has said so first
        for pipe in self._pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(_END)
        for process in self._processes:
            process.join()


@dataclass(frozen=True)
class Turns:
    """What competitors took, by their names.

    Attributes:
        seconds: of a step, in each turn in order.
        steps: of a turn.
        num_threads: of torch in each process.
    """

    seconds: dict[str, list[float]]
    steps: dict[str, int]
    num_threads: dict[str, int]

    def rate(self, name: str, rows: int = 1) -> float:
        """Steps per second times the rows of a step, by the median of the turns."""
        return rows / statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """The time of one over that of another, median of the rounds' ratios."""
        return statistics.median(map(truediv, self.seconds[name], self.seconds[other]))

    def __or__(self, others: "Turns") -> "Turns":
        """With those of other competitors."""
        return Turns(self.seconds | others.seconds, self.steps | others.steps, self.num_threads | others.num_threads)


def choose_steps(
    phase: str,
    competitors: Mapping[str, Competitor],
    progress: ProgressListener,
    *,
    steps: int | None = None,
    at_least: int = _MIN_STEPS,
    choosing_threads: Collection[str] = (),
) -> dict[str, int]:
    """How many steps make a turn of each that is long enough to be stable.

    Args:
        phase: what `progress` calls it.
        competitors: by name.
        progress: receives every competitor.
        steps: the answer, where it is given.
        at_least: steps of a turn.
        choosing_threads: names of those that go on with one thread where that is faster.
    """
    assert all(competitor.num_threads for competitor in competitors.values())  # all are built: none disturbs the first
    progress.start_phase(phase, len(competitors), unit="competitors")
    found = {}
    for name, competitor in competitors.items():
        if name in choosing_threads:
            competitor.choose_threads()
        if steps is None:
            competitor.run(at_least)  # the first ones prepare
            step_s = competitor.run(at_least) / at_least
            found[name] = min(_MAX_STEPS, max(at_least, round(_TURN_S / step_s)))
        progress.advance(1)
    return found if steps is None else dict.fromkeys(competitors, steps)


@contextmanager
def busy_processes(number: int) -> Iterator[None]:
    """Inside, this number of other processes compute without a pause, as other programs of a machine may."""
    spinning = [subprocess.Popen([sys.executable, "-I", "-S", "-c", _SPIN]) for _ in range(number)]  # noqa: S603
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def take_turns(
    phase: str, competitors: Mapping[str, Competitor], steps: Mapping[str, int], rounds: int, progress: ProgressListener
) -> Turns:
    """Let competitors do their steps in turn, and end them.

    Args:
        phase: what `progress` calls it.
        competitors: by name.
        steps: of each, before the next has its turn.
        rounds: rounds that count, after one that warms up: allocator, pipeline, packed weights, page faults.
        progress: receives every turn.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    progress.start_phase(phase, (rounds + 1) * len(competitors), unit="turns")
    for turn in range(rounds + 1):
        for name, competitor in competitors.items():
            step_s = competitor.run(steps[name]) / steps[name]
            if turn > 0:
                seconds[name].append(step_s)
            progress.advance(1)
    num_threads = {name: competitor.num_threads for name, competitor in competitors.items()}
    for competitor in competitors.values():
        competitor.close()
    return Turns(seconds, dict(steps), num_threads)


def _serve(
    pipe: Connection,
    rank: int,
    nproc: int,
    port: int,
    device: DeviceChoice,
    build: Callable[..., Step],
    arguments: tuple[Any, ...],
) -> None:
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(nproc), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(nproc)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with join_process_group(device=device) as ranks:
        step = build(ranks, *arguments)
        pipe.send(torch.get_num_threads())
        while (steps := pipe.recv()) != _END:
            pipe.send(_fastest_threads(step) if steps == _CHOOSE_THREADS else _time(step, steps, ranks))


def _fastest_threads(step: Step) -> int:
    """Set torch's threads to one or to as many as there are now; each has the best time of some tries, by turns."""
    best_s = dict.fromkeys([torch.get_num_threads(), 1], float("inf"))
    if len(best_s) == 1:
        return 1
    started_s, trials = time.perf_counter(), 0
    while trials < _MIN_TRIALS or (trials < _MAX_TRIALS and time.perf_counter() - started_s < _TRIAL_S):
        trials += 1
        for number in best_s:
            torch.set_num_threads(number)
            step()  # its threads are awake, its caches warm
            began_s = time.perf_counter()
            step()
            best_s[number] = min(best_s[number], time.perf_counter() - began_s)
    fastest = min(best_s, key=lambda number: best_s[number])
    torch.set_num_threads(fastest)
    return fastest


def _time(step: Step, steps: int, ranks: Ranks) -> float:
    if ranks.world_size > 1:
        dist.barrier()
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter() - started_s
