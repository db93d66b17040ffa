"""Profiles where the time of a step goes: a Chrome trace of some steps, and its summary.

In: the steps of a run, once it is warm.  Out: run/profile/rank-0.json for chrome://tracing or Perfetto, one a rank, and
run/profile/summary.json: milliseconds a step by part, and how much of the communication was hidden.

Communication is hidden while this rank computes: threads of gloo, or a stream of its own on a GPU, do the sending,
which costs time only where the step has nothing else to do. So the hidden part is the time in which something was on
its way and something was computed, over the time in which something was on its way.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.profiler import ProfilerActivity

from torchdlrm.files import replacing, write_atomically

if TYPE_CHECKING:  # it needs TorchRec, which a report of what was profiled does not
    from torchdlrm.training.processes.process_group import Ranks

WARM_UP_STEPS = 5

PRODUCTS, SENDING, REST = "matrix products", "sending and waiting", "the rest"
# An operator belongs to the first of these parts whose names fit its own name,
_BY_OWN_NAME = (
    ("tables: update", ("split_embedding_backward", "embedding_backward")),
    ("tables: look up", ("fbgemm::", "split_embedding")),
    (PRODUCTS, ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear", "gemm", "cutlass")),
    (SENDING, ("c10d::", "All2All", "AllReduce")),
)
# else to the part of the innermost that encloses it, itself included: an autograd function or a step of an optimizer,
_BY_ENCLOSING = (
    ("tables: update", ("_LearntBackward", "tables: update")),
    ("tables: look up", ("_Learnt", "tables: look up")),
    ("interaction", ("_PairwiseDots",)),
    ("cross net", ("_CrossNet", "_FlatVectors")),
    ("dense optimizer", ("Optimizer.step#",)),
)
# and else to the first of these. Kernels of a GPU have nothing that encloses them.
_BY_KIND = (
    ("dense optimizer", ("aten::_fused", "multi_tensor_apply")),
    ("copies and casts", ("aten::copy_", "aten::cat", "Memcpy")),
    ("interaction", ("aten::index_",)),
    ("bias gradients", ("aten::sum",)),
    ("element by element", ("aten::clamp", "aten::relu", "aten::threshold", "aten::add", "aten::mul", "aten::div")),
    ("element by element", ("aten::fill", "aten::zero", "aten::mean", "aten::sigmoid", "aten::binary_cross_entropy")),
)
_COMMUNICATION = ("gloo:", "nccl")
_COMPUTATION = ("aten::", "fbgemm::", "tables: ", "_Learnt", "_PairwiseDots", "_CrossNet")


@dataclass(frozen=True)
class StepProfile:
    """What the profiler has seen on one rank.

    Attributes:
        rank: which.
        num_steps: how many steps.
        ms_per_step: wall time, the profiler's own cost included.
        ms_per_step_by_part: time of the operators themselves, by part of the step, largest first.
        communication_ms_per_step: time in which something was on its way to or from other ranks.
        hidden_share: of that, while this rank computed; None for a single rank.
    """

    rank: int
    num_steps: int
    ms_per_step: float
    ms_per_step_by_part: dict[str, float]
    communication_ms_per_step: float
    hidden_share: float | None


class StepProfiler:
    """Profiles some steps of a run, inside a `with`; every rank has one and must make the same calls.

    Args:
        folder: where to write; made when there is something to write.
        ranks: the processes of the run.
        after_step: the step after which profiling starts.
        num_steps: how many steps; none for 0.
    """

    def __init__(self, folder: Path, ranks: "Ranks", *, after_step: int, num_steps: int) -> None:
        self._folder, self._ranks, self._num_steps = folder, ranks, num_steps
        self._first, self._last = after_step, after_step + num_steps
        self._profiler: torch.profiler.profile | None = None
        self._profiled_steps = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._profiler is not None:  # nothing is written: the other ranks may not be there to say what they saw
            self._profiler.stop()

    def step_done(self, step: int) -> None:
        """Start after the step before the first one, write after the last."""
        if not self._num_steps:
            return
        if self._profiler is not None:
            self._profiled_steps += 1
        if step == self._first:
            activities = [ProfilerActivity.CPU]
            if self._ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
        elif step == self._last:
            self.close()

    def close(self) -> None:
        """Write what there is: all steps that were asked for, or fewer where the run has ended before."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        profiler.stop()
        if not self._profiled_steps:
            return
        self._folder.mkdir(exist_ok=True)
        with replacing(self._folder / f"rank-{self._ranks.rank}.json") as temporary:
            profiler.export_chrome_trace(str(temporary))
        mine = summarize(profiler.events() or (), self._ranks, num_steps=self._profiled_steps)
        everyone = self._ranks.all_gather(mine)
        if self._ranks.is_first:
            text = json.dumps([*map(asdict, everyone)], indent=1)
            write_atomically(self._folder / "summary.json", text + "\n")


def read_profiles(folder: Path) -> list[StepProfile]:
    """What a profiler has written into a run's profile/; empty when there is nothing."""
    path = folder / "summary.json"
    return [StepProfile(**record) for record in json.loads(path.read_text(encoding="utf-8"))] if path.exists() else []


def summarize(events: Iterable[Any], ranks: "Ranks", *, num_steps: int) -> StepProfile:
    """Add up the profiler's events of these steps, `FunctionEvent`s: on a GPU its kernels, on CPU the operators."""
    on_gpu = ranks.device.type == "cuda"
    computation: list[tuple[float, float]] = []  # start and end of each, in microseconds
    communication: list[tuple[float, float]] = []
    begin_us, end_us = math.inf, -math.inf
    parts: dict[str, float] = {}
    for event in events:
        if on_gpu and event.is_user_annotation:  # names of whole phases, which a GPU's timeline shows beside kernels
            continue
        interval = (event.time_range.start, event.time_range.end)
        begin_us, end_us = min(begin_us, interval[0]), max(end_us, interval[1])
        is_on_device = on_gpu == (event.device_type.name == "CUDA")
        if event.name.lower().startswith(_COMMUNICATION):
            if is_on_device:  # the host's `nccl:` ranges say when something was asked for, not when it was on its way
                communication.append(interval)
            continue
        if not is_on_device:
            continue
        if on_gpu or event.name.startswith(_COMPUTATION):
            computation.append(interval)
        part = _part_of(event)
        self_us = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        parts[part] = parts.get(part, 0.0) + self_us / 1e3 / num_steps
    sent_us = total_us(communication) if ranks.world_size > 1 else 0.0  # a single rank reduces with itself
    hidden_us = sent_us + total_us(computation) - total_us(communication + computation)
    return StepProfile(
        rank=ranks.rank,
        num_steps=num_steps,
        ms_per_step=max(0.0, end_us - begin_us) / 1e3 / num_steps,
        ms_per_step_by_part=dict(sorted(parts.items(), key=lambda item: -item[1])),
        communication_ms_per_step=sent_us / 1e3 / num_steps,
        hidden_share=hidden_us / sent_us if sent_us else None,
    )


def _part_of(event: Any) -> str:
    """The part of the step that the time of an operator itself belongs to."""
    part = _first_that_fits(event.name, _BY_OWN_NAME)
    enclosing = event
    while part is None and enclosing is not None:
        part = _first_that_fits(enclosing.name, _BY_ENCLOSING)
        enclosing = enclosing.cpu_parent
    return part or _first_that_fits(event.name, _BY_KIND) or REST


def _first_that_fits(name: str, parts: Iterable[tuple[str, tuple[str, ...]]]) -> str | None:
    return next((part for part, signs in parts if any(sign in name for sign in signs)), None)


def total_us(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(intervals):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
