"""Measures the training step: ours, plain TorchRec's, a plain torch loop's, the floor, and what it takes of the host.

What the host takes is measured by our step on few rows, with hardly anything to compute.

On CPU all are interleaved. On GPUs each is built when the one before has ended: the tables of one may fill the memory.

Where the time of a step of ours goes, part by part, is measured in one more process. The profiler sees the operators of
torch, and autograd functions as a whole; what a step takes beside them is Python, autograd itself and the pipeline. The
profiler costs time between operators above all, so that remainder is what the same process's steps take without it; how
long they take with it is in the result too. Of small steps it makes all parts longer, and nothing may be left for the
rest.
"""

import itertools
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from torchdlrm.bench.competitors import Case, check_torchrec_has, floor_step, host_step, our_step, torchrec_step
from torchdlrm.bench.interleaved import Competitor, Step, Turns, busy_processes, choose_steps, take_turns
from torchdlrm.bench.plain_torch import plain_torch_step
from torchdlrm.config import Config
from torchdlrm.model.precision import bfloat16_unit
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.machine import host_memory_bytes
from torchdlrm.tables.optimizers import check_plain_torchrec
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device
from torchdlrm.training.processes.process_group import Ranks
from torchdlrm.training.step_profile import REST, StepProfiler, read_profiles

WHOLE, PROFILED = "whole step", "whole step while profiled"
_OTHERS = ("torchrec", "plain_torch", "floor")
_MAX_PROFILED_STEPS = 200  # their operators are read one by one
_WARM_UP_STEPS = 10


def benchmark_step(
    config: Config,
    *,
    num_embeddings: dict[str, int],
    rounds: int,
    steps_per_round: int | None = None,
    nproc: int = 1,
    num_busy: int = 0,
    with_parts: bool = False,
    model_class: str | None = None,
    progress: ProgressListener = SILENT,
) -> dict[str, Any]:
    """Measure the training step on random batches that lie in memory, with the arguments of `dlrm bench step`.

    One round more is run than counts: the first warms up.

    Returns:
        Rows per second (medians over rounds) and what they were measured on, as `--json` prints it:

        rows_per_s: ours.
        torchrec_rows_per_s: TorchRec's own class of the model, row-wise Adagrad, TrainPipelineSparseDist, float32.
        plain_torch_rows_per_s: a plain loop with one table in float32; None for several processes, another optimizer of
            the tables than row-wise Adagrad, projections, or no memory for it.
        floor_rows_per_s: the step's matrix products alone, in the precision of ours.
        ratio_to_torchrec: ours over TorchRec's, median of the rounds' ratios.
        ratio_to_plain_torch: ours over the plain loop's, likewise.
        ratio_to_floor_time: our time over the floor's, likewise.
        host_ms: of our step whatever its rows, median over rounds: Python, launches of kernels, waits for them.
        parts_ms: milliseconds of a step of ours by part, as `measure_parts` gives them; None if not asked for.
        batch_size_global: rows per step.
        precision: of ours and of the floor, and why; products that stay float32 are TF32 on GPUs where `train.tf32`
            says so, of all competitors.
        processor: its name and units.
        instructions: which of them the kernels of torch use.
        num_processes: of each competitor.
        num_threads: of torch in each process, by competitor. Ours has as many as `dlrm train` gives it; the others on
            CPU have one or all, whichever is faster.
        num_busy_processes: that kept cores busy beside them.
        steps_per_round: by competitor.
        rounds: how often each was measured.
    """
    choice = config.train.device
    device = rank_device(0, nproc, choice)
    check_plain_torchrec(config.table_optimizer, device)
    check_torchrec_has(config.model)
    case = Case(config, num_embeddings, model_class)
    precision = choose_precision(config, case.shape, device)
    case = replace(case, dtype=precision.dtype)
    builds: dict[str, Callable[[Ranks, Case], Step]] = {
        "ours": our_step,
        "torchrec": torchrec_step,
        "plain_torch": plain_torch_step,
        "floor": floor_step,
        "host": host_step,
    }
    is_its_model = config.table_optimizer.name == "rowwise_adagrad" and config.model.interaction != "projection"
    if nproc > 1 or model_class is not None or not is_its_model or not _plain_loop_fits(config, num_embeddings, device):
        del builds["plain_torch"]
    found, parts_ms = Turns({}, {}, {}), None
    with busy_processes(num_busy):
        for names in [[name] for name in builds] if device.type == "cuda" else [list(builds)]:
            competitors = {name: Competitor(builds[name], case, nproc=nproc, device=choice) for name in names}
            others = _OTHERS if device.type == "cpu" else ()
            steps = choose_steps(
                "bench step: prepare", competitors, progress, steps=steps_per_round, choosing_threads=others
            )
            found |= take_turns("bench step", competitors, steps, rounds, progress)
        if with_parts:
            progress.start_phase("bench step: parts", 1, unit="profiles")
            parts_ms = measure_parts(case, num_steps=min(found.steps["ours"], _MAX_PROFILED_STEPS), nproc=nproc)
            progress.advance(1)
    batch_rows, has_plain_loop = config.train.batch_size_global, "plain_torch" in found.seconds
    return {
        "rows_per_s": found.rate("ours", batch_rows),
        "torchrec_rows_per_s": found.rate("torchrec", batch_rows),
        "plain_torch_rows_per_s": found.rate("plain_torch", batch_rows) if has_plain_loop else None,
        "floor_rows_per_s": found.rate("floor", batch_rows),
        "ratio_to_torchrec": found.ratio("torchrec", "ours"),
        "ratio_to_plain_torch": found.ratio("plain_torch", "ours") if has_plain_loop else None,
        "ratio_to_floor_time": found.ratio("ours", "floor"),
        "host_ms": 1000 / found.rate("host"),
        "parts_ms": parts_ms,
        "batch_size_global": batch_rows,
        "precision": str(precision),
        "processor": describe_processor(),
        "instructions": _instructions(precision.dtype),
        "num_processes": nproc,
        "num_threads": found.num_threads,
        "num_busy_processes": num_busy,
        "steps_per_round": found.steps,
        "rounds": rounds,
    }


def measure_parts(case: Case, *, num_steps: int, nproc: int) -> dict[str, float]:
    """Milliseconds of a step of ours on the first rank by part, of the rest, and of the whole step.

    Args:
        case: what is trained.
        num_steps: how many are timed, and how many are profiled.
        nproc: number of processes.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "profile"
        competitor = Competitor(_profiled_step, case, folder, num_steps, nproc=nproc, device=case.config.train.device)
        competitor.run(_WARM_UP_STEPS)
        whole_ms = 1000 * competitor.run(num_steps) / num_steps
        competitor.run(1)  # starts the profiler
        competitor.run(num_steps)
        competitor.close()
        profile = read_profiles(folder)[0]
    parts_ms = {part: ms for part, ms in profile.ms_per_step_by_part.items() if part != REST}
    rest_ms = max(0.0, whole_ms - sum(parts_ms.values()))
    return {**parts_ms, REST: rest_ms, WHOLE: whole_ms, PROFILED: profile.ms_per_step}


def _profiled_step(ranks: Ranks, case: Case, folder: Path, num_steps: int) -> Step:
    """Our step, of which after the warm-up `num_steps` are not profiled, and the next are, into `folder`."""
    step, numbers = our_step(ranks, case), itertools.count(1)
    profiler = StepProfiler(folder, ranks, after_step=_WARM_UP_STEPS + num_steps + 1, num_steps=num_steps)

    def run() -> None:
        step()
        profiler.step_done(next(numbers))

    return run


def _plain_loop_fits(config: Config, num_embeddings: dict[str, int], device: torch.device) -> bool:
    """Whether there is memory for its table with float32 weights; on CPU beside the two others' tables."""
    table_bytes = 4 * (config.model.embedding_dim + 1) * sum(num_embeddings.values())
    return (1 if device.type == "cuda" else 3) * table_bytes < 0.8 * _memory_bytes(device)


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return host_memory_bytes()


def _instructions(dtype: torch.dtype) -> str:
    """What of the processor's units the kernels of torch use; both of its limits are settings of the environment."""
    level = torch.backends.cpu.get_cpu_capability()
    limit = f" (at most {os.environ['ONEDNN_MAX_CPU_ISA']})" if "ONEDNN_MAX_CPU_ISA" in os.environ else ""
    if dtype != torch.bfloat16:
        return f"products and everything else: {level}{limit}"
    return f"bfloat16 products: {bfloat16_unit() or level}{limit}; everything else: {level}"
