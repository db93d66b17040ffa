"""Measures the loader alone: rows per second from the Parquet files of a dataset to batches, without training."""

import statistics
import time
from typing import Any

from torchdlrm.data.dataset import Dataset
from torchdlrm.loader.loader import Loader
from torchdlrm.progress import SILENT, ProgressListener
from torchdlrm.training.processes.library_noise import silenced_libraries


@silenced_libraries()
def benchmark_loader(
    dataset: Dataset, *, batch_size_global: int, max_rows: int, rounds: int, progress: ProgressListener = SILENT
) -> dict[str, Any]:
    """Read the training split again and again, with the arguments of `dlrm bench loader`.

    Returns:
        `rows_per_s` (median over rounds, of one rank that reads whole batches), `rows` of a round, `batch_size_global`,
        `rounds`.

    Raises:
        DatasetError: the dataset has no training rows, or is damaged.
    """
    speeds_per_s = []
    progress.start_phase("bench loader", rounds + 1, unit="turns")
    for turn in range(rounds + 1):
        loader = Loader(dataset, "train", batch_size_global=batch_size_global, max_rows=max_rows)
        started_s = time.perf_counter()
        for _ in loader:
            pass
        if turn > 0:  # the first brings the files into the page cache
            speeds_per_s.append(loader.rows / (time.perf_counter() - started_s))
        progress.advance(1)
    settings = {"batch_size_global": batch_size_global, "rounds": rounds}
    return {"rows_per_s": statistics.median(speeds_per_s), "rows": loader.rows, **settings}
