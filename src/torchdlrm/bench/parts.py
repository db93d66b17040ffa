"""Measures where the time of a training step of ours goes: by part, in a process of its own.

The profiler sees the operators of torch, and autograd functions as a whole; what a step takes beside them is Python,
autograd itself and the pipeline. The profiler costs time between operators above all, so that remainder is what the
same process's steps take without it; how long they take with it is told too. Of small steps it makes all parts longer,
and nothing may be left for the rest.
"""

import itertools
import tempfile
from pathlib import Path

import torch

from torchdlrm.bench.interleaved import Competitor, Step
from torchdlrm.bench.step_competitors import our_step
from torchdlrm.config import Config
from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.step_profile import REST, StepProfiler, read_profiles

_WARM_UP_STEPS = 10
WHOLE, PROFILED = "whole step", "whole step while profiled"


def profiled_step(
    ranks: Ranks,
    config: Config,
    num_embeddings: dict[str, int],
    dtype: torch.dtype,
    model_class: str | None,
    folder: Path,
    num_steps: int,
) -> Step:
    """Our step, profiled from the one after the warm-up and twice `num_steps` on; the profile is in `folder` then."""
    step, numbers = our_step(ranks, config, num_embeddings, dtype, model_class), itertools.count(1)
    profiler = StepProfiler(folder, ranks, after_step=_WARM_UP_STEPS + num_steps + 1, num_steps=num_steps)

    def run() -> None:
        step()
        profiler.step_done(next(numbers))

    return run


def measure_parts(
    config: Config,
    num_embeddings: dict[str, int],
    dtype: torch.dtype,
    model_class: str | None = None,
    *,
    num_steps: int,
    nproc: int,
) -> dict[str, float]:
    """Milliseconds of a step of ours on the first rank by part, of the rest, and of the whole step.

    Args:
        config: of the training.
        num_embeddings: rows of each table.
        dtype: in which the dense parts compute.
        model_class: a model of somebody's own, where it stands.
        num_steps: so many are timed, and as many profiled.
        nproc: number of processes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "profile"
        arguments = (config, num_embeddings, dtype, model_class, folder, num_steps)
        competitor = Competitor(profiled_step, *arguments, nproc=nproc, device=config.train.device)
        competitor.run(_WARM_UP_STEPS)
        whole_ms = 1000 * competitor.run(num_steps) / num_steps
        competitor.run(1)  # starts the profiler
        competitor.run(num_steps)
        competitor.close()
        profile = read_profiles(folder)[0]
    parts_ms = {part: ms for part, ms in profile.ms_per_step_by_part.items() if part != REST}
    rest_ms = max(0.0, whole_ms - sum(parts_ms.values()))
    return {**parts_ms, REST: rest_ms, WHOLE: whole_ms, PROFILED: profile.ms_per_step}
