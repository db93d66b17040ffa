"""Measures the training step: ours, plain TorchRec's, a plain torch loop's, the floor, and what it takes of the host.

What the host takes is measured by our step on so few rows that there is hardly anything to compute.

On CPU all are interleaved. On GPUs each is built when the one before has ended: the tables of one may fill the memory.
"""

import os
import statistics
from dataclasses import dataclass
from operator import truediv
from typing import Any

import torch

from torchdlrm.bench.interleaved import Competitor, busy_processes, enough_steps, take_turns
from torchdlrm.bench.parts import measure_parts
from torchdlrm.bench.plain_torch import plain_torch_step
from torchdlrm.bench.step_competitors import floor_step, host_step, our_step, shape_of, torchrec_step
from torchdlrm.bench.upstream import check_torchrec_has
from torchdlrm.config import Config
from torchdlrm.model.precision import bfloat16_unit
from torchdlrm.processor import describe_processor
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.sharding.topology import host_memory_bytes
from torchdlrm.tables.optimizers import check_plain_torchrec
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.processes.device import rank_device

_OTHERS = ("torchrec", "plain_torch", "floor")
_MAX_PROFILED_STEPS = 200  # their operators are read one by one


@dataclass(frozen=True)
class StepBenchmark:
    """Rows per second (medians over rounds) and what they were measured on.

    Attributes:
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

    rows_per_s: float
    torchrec_rows_per_s: float
    plain_torch_rows_per_s: float | None
    floor_rows_per_s: float
    ratio_to_torchrec: float
    ratio_to_plain_torch: float | None
    ratio_to_floor_time: float
    host_ms: float
    parts_ms: dict[str, float] | None
    batch_size_global: int
    precision: str
    processor: str
    instructions: str
    num_processes: int
    num_threads: dict[str, int]
    num_busy_processes: int
    steps_per_round: dict[str, int]
    rounds: int


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
) -> StepBenchmark:
    """Measure the training step on random batches that lie in memory, with the arguments of `dlrm bench step`.

    One round more is run than counts: the first warms up.
    """
    choice = config.train.device
    device = rank_device(0, nproc, choice)
    check_plain_torchrec(config.table_optimizer, device)
    check_torchrec_has(config.model)
    precision = choose_precision(config, shape_of(config, num_embeddings, model_class), device)
    in_its_precision = (config, num_embeddings, precision.dtype, model_class)
    builds: dict[str, tuple[Any, ...]] = {
        "ours": (our_step, *in_its_precision),
        "torchrec": (torchrec_step, config, num_embeddings, model_class),
        "plain_torch": (plain_torch_step, config, num_embeddings),
        "floor": (floor_step, *in_its_precision),
        "host": (host_step, *in_its_precision),
    }
    is_its_model = config.table_optimizer.name == "rowwise_adagrad" and config.model.interaction != "projection"
    if nproc > 1 or model_class is not None or not is_its_model or not _plain_loop_fits(config, num_embeddings, device):
        del builds["plain_torch"]
    seconds: dict[str, list[float]] = {}  # of a step
    num_threads, steps, parts_ms = {}, {}, None
    with busy_processes(num_busy):
        for names in [[name] for name in builds] if device.type == "cuda" else [list(builds)]:
            competitors = {name: Competitor(*builds[name], nproc=nproc, device=choice) for name in names}
            progress.start_phase("bench step: prepare", len(names), unit="competitors")
            for name, competitor in competitors.items():
                if device.type == "cpu" and name in _OTHERS:
                    competitor.choose_threads()
                steps[name] = steps_per_round or enough_steps(competitor)
                num_threads[name] = competitor.num_threads
                progress.advance(1)
            turns = take_turns("bench step", competitors, steps, rounds, progress)
            seconds |= {name: [turn_s / steps[name] for turn_s in turns[name]] for name in names}
        if with_parts:
            progress.start_phase("bench step: parts", 1, unit="profiles")
            parts_ms = measure_parts(*in_its_precision, num_steps=min(steps["ours"], _MAX_PROFILED_STEPS), nproc=nproc)
            progress.advance(1)
    rows_per_s = {name: config.train.batch_size_global / statistics.median(times) for name, times in seconds.items()}

    def ratio(name: str, other: str) -> float:
        """The time of one over that of another, median of the rounds."""
        return statistics.median(map(truediv, seconds[name], seconds[other]))

    return StepBenchmark(
        rows_per_s=rows_per_s["ours"],
        torchrec_rows_per_s=rows_per_s["torchrec"],
        plain_torch_rows_per_s=rows_per_s.get("plain_torch"),
        floor_rows_per_s=rows_per_s["floor"],
        ratio_to_torchrec=ratio("torchrec", "ours"),
        ratio_to_plain_torch=ratio("plain_torch", "ours") if "plain_torch" in seconds else None,
        ratio_to_floor_time=ratio("ours", "floor"),
        host_ms=1000 * statistics.median(seconds["host"]),
        parts_ms=parts_ms,
        batch_size_global=config.train.batch_size_global,
        precision=str(precision),
        processor=describe_processor(),
        instructions=_instructions(precision.dtype),
        num_processes=nproc,
        num_threads=num_threads,
        num_busy_processes=num_busy,
        steps_per_round=steps,
        rounds=rounds,
    )


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
