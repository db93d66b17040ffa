"""SIGTERM and Ctrl-C: asked to stop, a run finishes its step, saves and exits."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import distributed as dist

from torchdlrm.training.process_group import Ranks


class StopRequest:
    """Whether somebody has asked this run to stop.

    Args:
        ranks: the processes, which must all stop after the same step.
    """

    # Every so many steps the ranks ask each other; a single process asks itself after every step.
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
        if threading.current_thread() is not threading.main_thread():  # a library's user runs us in a thread
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

        def ask(number: int, _: FrameType | None) -> None:
            # A process of several hears of a Ctrl-C twice: from the terminal, and by its launcher.
            if self._asked and number == signal.SIGINT and "RANK" not in os.environ:
                raise KeyboardInterrupt
            self._asked = True

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
