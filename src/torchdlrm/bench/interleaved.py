"""Runs the competitors of a benchmark interleaved, each in processes of its own.

What one sets for its process (allocator, threads) does not affect another, and the machine's load is the same for all,
because they alternate within seconds.
"""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import distributed as dist

from torchdlrm.config import DeviceChoice
from torchdlrm.progress import ProgressListener
from torchdlrm.training.processes.process_group import Ranks, join_process_group

Step = Callable[[], object]


class Competitor:
    """N processes that do the same steps together when they are told to.

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
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(nproc):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, rank, nproc, port, device, build, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, steps: int) -> float:
        """Let all processes do `steps` steps; seconds from start to end of the slowest."""
        for pipe in self._pipes:
            pipe.send(steps)
        return max(pipe.recv() for pipe in self._pipes)

    def close(self) -> None:
        """End the processes."""
        for pipe in self._pipes:
            pipe.send(0)
        for process in self._processes:
            process.join()


def take_turns(
    phase: str, competitors: Mapping[str, Competitor], steps: Mapping[str, int], rounds: int, progress: ProgressListener
) -> dict[str, list[float]]:
    """Let competitors do their steps in turn, and end them.

    Args:
        phase: what `progress` calls it.
        competitors: by name.
        steps: of each, before the next has its turn.
        rounds: rounds that count, after one that warms up: allocator, pipeline, packed weights, page faults.
        progress: receives every turn.

    Returns:
        The seconds of each competitor's turns, in order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    progress.start_phase(phase, (rounds + 1) * len(competitors), unit="turns")
    for turn in range(rounds + 1):
        for name, competitor in competitors.items():
            elapsed_s = competitor.run(steps[name])
            if turn > 0:
                seconds[name].append(elapsed_s)
            progress.advance(1)
    for competitor in competitors.values():
        competitor.close()
    return seconds


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
        while steps := pipe.recv():
            pipe.send(_time(step, steps, ranks))


def _time(step: Step, steps: int, ranks: Ranks) -> float:
    if ranks.world_size > 1:
        dist.barrier()
    started_s = time.perf_counter()
    for _ in range(steps):
        step()
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    return time.perf_counter() - started_s
