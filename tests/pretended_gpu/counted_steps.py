"""What a training step costs its host: time, waits for the GPU and launches, by step."""

import time
import traceback
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import pretend
import torch

from torchdlrm.training.trainer import Trainer


@dataclass
class Steps:
    """One entry a step.

    Attributes:
        counts: what the host asked of the GPU, by `pretend.COUNTS`.
        wall_ms: from the start of a step to its end.
        thread_ms: of the main thread's processor time in it.
        waits: how often the host waited at which line, in the step that was looked at.
    """

    counts: list[dict[str, int]] = field(default_factory=list)
    wall_ms: list[float] = field(default_factory=list)
    thread_ms: list[float] = field(default_factory=list)
    waits: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted_steps(*, look_at=0):
    """Inside, every training step of this process is counted; of step `look_at` the lines that wait are noted."""
    found, train_step = Steps(), Trainer._train_step

    def counted(self, step, batches):
        before, wall_s, thread_s = pretend.counts(), time.perf_counter(), time.thread_time()
        with _noting_waits(found.waits) if step == look_at else _nothing():
            train_step(self, step, batches)
        found.wall_ms.append(1e3 * (time.perf_counter() - wall_s))
        found.thread_ms.append(1e3 * (time.thread_time() - thread_s))
        found.counts.append({name: count - before[name] for name, count in pretend.counts().items()})

    with mock.patch.object(Trainer, "_train_step", counted):
        yield found


@contextmanager
def _nothing():
    yield


@contextmanager
def _noting_waits(places):
    """torch warns of each wait; note from where."""

    def note(message, *_, **__):
        if "synchroniz" in str(message):
            frames = [frame for frame in traceback.extract_stack() if "warnings.py" not in frame.filename][:-1]
            if "pretended_gpu" in frames[-1].filename:
                return
            names = [f"{frame.filename.rpartition('site-packages/')[2]}:{frame.lineno}" for frame in frames[-3:]]
            places[" < ".join(reversed(names))] += 1

    with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", note):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
