"""Tries whether processes of this machine can exchange what a training exchanges.

A file of its own: each of the processes imports it, and what it imports.
"""

import statistics
import time

import torch
from torch import distributed as dist

from torchdlrm.config import DeviceChoice
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.units import show_bytes

_NUM_VALUES = 2**20
_TIMEOUT_S = 60.0
_ROUNDS = 5


def exchange_all_to_all(place: DeviceChoice, num_processes: int) -> str:
    """Let processes exchange numbers, and check that each has what was meant for it."""
    seconds: float = launch(_exchange, place, processes=Processes(num_processes))
    sent_bytes = 4 * _NUM_VALUES
    return f"{show_bytes(sent_bytes)} of each process in {1000 * seconds:.2f} ms"


def _exchange(place: DeviceChoice) -> float:
    with join_process_group(_TIMEOUT_S, device=place) as ranks:
        n = _NUM_VALUES // ranks.world_size
        sent = torch.arange(ranks.world_size, device=ranks.device).repeat_interleave(n).float() + 1000 * ranks.rank
        received = torch.empty_like(sent)
        meant_for_us = 1000.0 * torch.arange(ranks.world_size, device=ranks.device).repeat_interleave(n) + ranks.rank
        times = []
        for _ in range(_ROUNDS):
            started_s = time.perf_counter()
            dist.all_to_all_single(received, sent)
            is_right = torch.equal(received, meant_for_us)  # waits for a GPU
            times.append(time.perf_counter() - started_s)
            assert is_right, f"rank {ranks.rank} got what was meant for another"
    return statistics.median(times)
