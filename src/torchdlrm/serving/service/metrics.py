"""Exposes metrics to Prometheus: requests, rows, batches, waiting times, and statistics of rows and predictions.

With several processes each writes its values to files of a shared folder (named by `PROMETHEUS_MULTIPROC_DIR`, which
is read when prometheus_client loads), and the process that is asked sums them up.  The folder is temporary, and may be
cleaned away: then the files are made again, and the counters begin at 0, as after a restart.
"""

import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import prometheus_client.values
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.serving.service.batcher import BatchReport

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("read", "queue", "encode", "model", "total")


class ServerMetrics:
    """The metrics of one process.

    Args:
        queued_rows: called at each scrape: how many rows are waiting; with several processes a gauge is set instead.

    Attributes:
        latency: how long a request took, by its stage.
        swaps: attempts to swap the bundle, by their outcome.
        lost_rows: that the log of predictions dropped.
    """

    def __init__(self, queued_rows: Callable[[], int]) -> None:
        folder = os.environ.get(MULTIPROCESS_FOLDER)
        self._files = None if folder is None else _SharedFiles(Path(folder))
        self._served: Callable[[], None] | None = None
        self._has_period = False
        self.registry = CollectorRegistry()
        self._queued_rows = queued_rows
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry, multiprocess_mode="livesum")
        histogram = partial(Histogram, registry=self.registry)
        about_unknown = "Values that the vocabulary of the feature does not have; of dlrm_rows_total in all."
        about_stages = "Time of a request: reading its body, in the queue, encoding its rows, the model, all in all."
        latency = histogram("dlrm_latency_seconds", about_stages, ["stage"], buckets=_SECONDS)
        self.latency = {stage: latency.labels(stage) for stage in STAGES}
        self._requests = counter("dlrm_requests", "Requests answered.", ["route", "code"])
        self._rows = counter("dlrm_rows", "Rows predicted.")
        self._queue = gauge("dlrm_queue_rows", "Rows that wait for the model.")
        self._batch_rows = histogram("dlrm_batch_rows", "Rows that the model was given at once.", buckets=_ROWS)
        self._unknown = counter("dlrm_unknown_values", about_unknown, ["feature"])
        about_filled = "Missing values of a number that was never missing in training; of dlrm_rows_total in all."
        self._filled = counter("dlrm_never_missing_values", about_filled, ["feature"])
        self._predictions = counter("dlrm_predictions_sum", "Sum of all predicted probabilities; of dlrm_rows_total.")
        self._bundle = gauge(
            "dlrm_bundle_workers", "Processes that serve this version of the model.", ["model", "version"]
        )
        self._period = gauge(
            "dlrm_bundle_period",
            "Number of the last period that the served model has learnt from; of several processes the lowest.",
            ["model"],
            multiprocess_mode="livemin",
        )
        self._patched = gauge(
            "dlrm_bundle_patched_bytes", "Memory for what deltas have changed of the bundle's files.", ["model"]
        )
        self.swaps = counter("dlrm_bundle_swaps", "Attempts to swap the bundle.", ["outcome"])
        self.lost_rows = counter("dlrm_log_dropped_rows", "Predicted rows that the log of predictions dropped.")

    def request_done(self, route: str, code: int, total_s: float) -> None:
        """Count a request that was answered."""
        self._requests.labels(route, str(code)).inc()
        self.latency["total"].observe(total_s)

    def batch_done(self, report: BatchReport) -> None:
        """Count a batch that was predicted; may be called in any thread."""
        self._rows.inc(report.total_rows)
        self._batch_rows.observe(report.total_rows)
        for part in report.predictions:
            of_first = np.atleast_2d(part.probabilities.T)[0]
            self._predictions.inc(float(of_first.sum(dtype="float64")))
            for feature, count in part.num_unknown.items():
                if count:
                    self._unknown.labels(feature).inc(count)
            for feature, count in part.num_filled.items():
                if count:
                    self._filled.labels(feature).inc(count)

    def bundle_served(self, model: str, bundle: Bundle, *, before: Bundle | None) -> None:
        """Note which bundle the process serves now, and which one before."""
        if before is not None:
            self._bundle.labels(model, before.version).set(0)
        self._served = partial(self._note_served, model, bundle.version, bundle.period, bundle.memory_bytes)
        self._served()

    def _note_served(self, model: str, version: str, period: int | None, patched_bytes: int) -> None:
        self._bundle.labels(model, version).set(1)
        self._patched.labels(model).set(patched_bytes)
        if period is not None or self._has_period:  # none any more is NaN
            self._has_period = True
            self._period.labels(model).set(math.nan if period is None else period)

    def note_queue(self) -> None:
        """Bring the gauge of waiting rows up to date, and the files back if they were removed."""
        if self._files is not None and self._files.restore() and self._served is not None:
            self._served()
        self._queue.set(self._queued_rows())

    def text(self) -> bytes:
        """Return all metrics, summed over the processes, in the format of Prometheus."""
        self.note_queue()
        if self._files is None:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)


class _SharedFiles:
    """The files of this process in the folder that the processes share, one for each type of metric."""

    _TYPES = ("counter", "gauge_livesum", "histogram")

    def __init__(self, folder: Path) -> None:
        self._folder, self._num_times_restored = folder, 0
        self._process = f"{os.getpid()}"  # `supervisor.py` knows the files of a process that has died by this
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # prometheus_client opens files of another name, with all values 0, when the process has another one.
        prometheus_client.values.ValueClass = prometheus_client.values.MultiProcessValue(  # type: ignore[no-untyped-call]
            lambda: self._process
        )

    def restore(self) -> bool:
        """Make the files again if one is missing; tell whether that was so."""
        if all((self._folder / f"{kind}_{self._process}.db").exists() for kind in self._TYPES):
            return False
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._num_times_restored += 1
        self._process = f"{os.getpid()}-{self._num_times_restored}"
        return True
