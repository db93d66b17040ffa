"""Processes that share what they decode, one of which is killed."""

import itertools
import multiprocessing
import os
import signal

import numpy as np

from torchdlrm.loader import shared
from torchdlrm.loader.loader import Loader

BATCH_ROWS = 100


def exchange(rank, pipe):
    def all_gather(value):
        pipe.send(value)
        values = [value, pipe.recv()]
        return values if rank == 0 else values[::-1]

    return all_gather


def read_and_be_killed(dataset, pipe):
    options = {"batch_size_global": BATCH_ROWS, "rank": 1, "world_size": 2}
    for index, _ in enumerate(Loader(dataset, "train", **options, all_gather=exchange(1, pipe))):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_whose_peer_is_killed_reads_all_its_rows_without_waiting_for_it(many_groups, monkeypatch):
    """Half of what comes was the other's to decode, and it will never say that it has read anything."""
    monkeypatch.setattr(shared, "_PATIENCE_S", 600.0)
    context = multiprocessing.get_context("spawn")
    mine, other = context.Pipe()
    peer = context.Process(target=read_and_be_killed, args=(many_groups, other))
    peer.start()
    options = {"batch_size_global": BATCH_ROWS, "rank": 0, "world_size": 2}
    batches = iter(Loader(many_groups, "train", **options, all_gather=exchange(0, mine)))
    found = [next(batches)]
    peer.join()
    assert peer.exitcode == -signal.SIGKILL
    found += batches
    for one, expected in itertools.zip_longest(found, Loader(many_groups, "train", **options)):
        np.testing.assert_array_equal(one.sparse_features.values(), expected.sparse_features.values())
