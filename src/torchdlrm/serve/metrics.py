"""What Prometheus may ask: requests, rows, batches, waiting times, and what the rows and predictions are like.

With several processes each writes its figures to files of a shared folder (named by `PROMETHEUS_MULTIPROC_DIR`, which
is read when prometheus_client loads), and whichever process is asked sums them up.
"""

import os
from collections.abc import Callable

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from torchdlrm.serve.batch import BatchReport

MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
STAGES = ("read", "queue", "encode", "model", "total")


class ServerMetrics:
    """The figures of one process.

    Args:
        queued_rows: asked, at each scrape, how many rows are waiting; with several processes a gauge is set instead.
    """

    def __init__(self, queued_rows: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        self._queued_rows = queued_rows
        self._requests = Counter("dlrm_requests", "Requests answered.", ["route", "code"], registry=self.registry)
        self._rows = Counter("dlrm_rows", "Rows predicted.", registry=self.registry)
        self._queue = Gauge(
            "dlrm_queue_rows", "Rows that wait for the model.", registry=self.registry, multiprocess_mode="livesum"
        )
        self._batch_rows = Histogram(
            "dlrm_batch_rows", "Rows that the model was given at once.", buckets=_ROWS, registry=self.registry
        )
        latency = Histogram(
            "dlrm_latency_seconds",
            "Time of a request: reading its body, in the queue, encoding its rows, the model, all in all.",
            ["stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._latency = {stage: latency.labels(stage) for stage in STAGES}
        self._unknown = Counter(
            "dlrm_unknown_values",
            "Values that the vocabulary of the feature does not have; of dlrm_rows_total in all.",
            ["feature"],
            registry=self.registry,
        )
        self._predictions = Counter(
            "dlrm_predictions_sum", "Sum of all predicted probabilities; of dlrm_rows_total.", registry=self.registry
        )
        self._bundle = Gauge(
            "dlrm_bundle_workers",
            "Processes that serve this version of the model.",
            ["model", "version"],
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self._swaps = Counter("dlrm_bundle_swaps", "Attempts to swap the bundle.", ["outcome"], registry=self.registry)
        self._lost_rows = Counter(
            "dlrm_log_dropped_rows", "Predicted rows that the log of predictions dropped.", registry=self.registry
        )

    def request_done(self, route: str, code: int, total_s: float) -> None:
        """A request was answered."""
        self._requests.labels(route, str(code)).inc()
        self._latency["total"].observe(total_s)

    def stage_done(self, stage: str, seconds: float) -> None:
        """A request has passed a stage."""
        self._latency[stage].observe(seconds)

    def batch_done(self, report: BatchReport) -> None:
        """A batch was predicted; may be called in any thread."""
        self._rows.inc(report.total_rows)
        self._batch_rows.observe(report.total_rows)
        for part in report.predictions:
            self._predictions.inc(float(part.probabilities.sum(dtype="float64")))
            for feature, count in part.num_unknown.items():
                if count:
                    self._unknown.labels(feature).inc(count)

    def rows_lost(self, num_rows: int) -> None:
        """The log of predictions has dropped rows."""
        self._lost_rows.inc(num_rows)

    def bundle_served(self, model: str, version: str, *, before: str | None) -> None:
        """The process now serves a version, in the place of another."""
        if before is not None:
            self._bundle.labels(model, before).set(0)
        self._bundle.labels(model, version).set(1)

    def swap_done(self, outcome: str) -> None:
        """Somebody has asked for a swap."""
        self._swaps.labels(outcome).inc()

    def note_queue(self) -> None:
        """Bring the gauge of waiting rows up to date."""
        self._queue.set(self._queued_rows())

    def text(self) -> bytes:
        """All figures, over all processes, as Prometheus reads them."""
        self.note_queue()
        if MULTIPROCESS_FOLDER not in os.environ:
            return generate_latest(self.registry)
        together = CollectorRegistry()
        MultiProcessCollector(together)  # type: ignore[no-untyped-call]
        return generate_latest(together)
