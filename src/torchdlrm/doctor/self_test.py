"""Tries whether processes exchange what a training exchanges, and, on a few hundred rows, what people do with millions.

Each function gives in words what was seen, and raises whatever goes wrong.
"""

import math
import os
import statistics
import time
from pathlib import Path

import torch
from torch import distributed as dist

from torchdlrm.config import Config, DeviceChoice, load_config
from torchdlrm.doctor.probe import Findings
from torchdlrm.evaluation.evaluate import evaluate
from torchdlrm.exporting.export import export
from torchdlrm.features.schema import NUM_CRITEO_DENSE, criteo_schema
from torchdlrm.model.architecture import ModelShape
from torchdlrm.model.precision import precision_of_processor
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.preprocessing.options import PreprocessOptions
from torchdlrm.preprocessing.preprocess import preprocess
from torchdlrm.synthetic.synthesize import synthesize
from torchdlrm.training.compute import choose_precision
from torchdlrm.training.job import train
from torchdlrm.training.processes.launch import Processes, launch
from torchdlrm.training.processes.process_group import join_process_group
from torchdlrm.units import show_bytes

_NUM_ROWS, _NUM_STEPS, _BATCH_ROWS = 4_000, 6, 256
_NUM_VALUES, _ROUNDS = 2**20, 5  # of the exchange
_TIMEOUT_S = 60.0


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


def make_dataset(findings: Findings, folder: Path) -> str:
    """Write a log and preprocess it; say what trainings will use here."""
    log = folder / "log.tsv"
    synthesize(log, rows=_NUM_ROWS)
    preprocess([log], folder / "dataset", criteo_schema(), PreprocessOptions(min_count=2), progress=False)
    findings.tell("uses", _uses(findings.num_gpus, is_refused="device" not in findings.worked))
    return f"{_NUM_ROWS:,} rows written and preprocessed"


def _uses(num_gpus: int, *, is_refused: bool) -> dict[str, str]:
    """What the paper's model trains with here, by default."""
    config = Config()
    shape = ModelShape(config.model, NUM_CRITEO_DENSE, 26)
    num_cores = len(os.sched_getaffinity(0))
    device = torch.device("cuda", 0) if num_gpus else torch.device("cpu")
    place = f"{num_gpus} x cuda (--nproc-per-node {num_gpus})" if num_gpus else "cpu"
    return {
        "device": "none, see the checks; with --train.device cpu the processor" if is_refused else place,
        "communication": "NCCL, embeddings in float16" if num_gpus else "gloo",
        "precision of the paper's model": str(choose_precision(config, shape, device)),
        "tables": "FBGEMM's CUDA kernels, one launch for all tables of a GPU"
        if num_gpus
        else f"our kernels, compiled for this processor, on {num_cores} threads",
        "predictions": f"on the processor; dense parts, where the bundle allows it, in {precision_of_processor()}",
    }


def train_steps(folder: Path, place: DeviceChoice, num_processes: int) -> str:
    """Train a few steps, with checkpoints that are written meanwhile."""
    losses = launch(_train, str(folder), place, processes=Processes(num_processes))
    assert losses, "no step has a loss that is a number"
    assert all(map(math.isfinite, losses)), f"losses are not finite: {losses}"
    steps = f"{_NUM_STEPS} steps of {_BATCH_ROWS} rows in {num_processes} process(es)"
    return f"{steps}, loss {losses[0]:.3f} to {losses[-1]:.3f}"


def _train(folder: str, place: DeviceChoice) -> list[float] | None:
    history = train(_config(place), f"{folder}/dataset", f"{folder}/run-{place}", progress=False)
    return None if history is None else [loss for _, loss in history.series("train", "loss")]


def _config(place: DeviceChoice) -> Config:
    settings = {
        "train.device": place,
        "train.max_steps": _NUM_STEPS,
        "train.batch_size_global": _BATCH_ROWS,
        "train.timeout_s": _TIMEOUT_S,
        "checkpoint.every_steps": _NUM_STEPS // 2,
        "logging.every_steps": 1,
        "logging.tensorboard": "false",
    }
    return load_config("criteo-small", {name: str(value) for name, value in settings.items()})


def load_checkpoint(folder: Path, place: DeviceChoice) -> str:
    """Load what was saved, and evaluate it on every row of the test split."""
    found = evaluate(folder / f"run-{place}", split="test", checkpoint="last", device=place, progress=False)
    assert found is not None
    assert math.isfinite(found["logloss"]), f"logloss is {found['logloss']}"
    return f"saved, loaded and evaluated: logloss {found['logloss']:.3f} on {found['rows']:,} rows"


def score_by_bundle(folder: Path, place: str) -> str:
    """Export the run, open the bundle, and score rows of the log by it."""
    export(folder / f"run-{place}", folder / "bundle", progress=False)
    predictor = Predictor.open(folder / "bundle")
    predictor.check_sample()
    scores = predictor.predict([{"int_0": count, "cat_0": "68fd1e64"} for count in range(100)])
    assert ((scores > 0) & (scores < 1)).all(), "scores are no probabilities"
    return f"exported, opened and {len(scores)} rows scored"
