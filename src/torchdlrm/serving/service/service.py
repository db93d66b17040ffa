"""Holds what HTTP and gRPC share: the bundle, the batcher, metrics, logs and limits of one process.

In: rows, over HTTP or gRPC.  Out: probabilities, or why there are none.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path

from torchdlrm.bundle import check_model_name
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.errors import RowError, TorchDLRMError, shown
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.serving.event_log import log_event, note_event
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.batcher import Answer, Batcher, BatchReport, PredictionRequest
from torchdlrm.serving.service.bundles import Bundles, Swap, identity_of
from torchdlrm.serving.service.metrics import ServerMetrics
from torchdlrm.serving.service.refusals import RefusedRequest, bad_request, check_num_rows, not_found
from torchdlrm.serving.service.request_log import RequestLog, check_loggable
from torchdlrm.serving.service.uploads import Uploads

_WATCH_S = 1.0
_MAX_REQUEST_ID_CHARACTERS = 128
_UPLOADS_PER_REQUEST = 8  # bodies that may come slowly, for each request that may be under way


class Service:
    """One process of a server; `start` in its event loop.

    Args:
        bundle: the bundle's folder, or a symbolic link to one, which is followed when it is moved.
        options: of the server.
        notify_others: asks the server's other processes to swap too.
        is_checked: whether another process has just checked all of the bundle.

    Raises:
        BundleError: the bundle cannot be served.
        ConfigError: the log of predictions cannot be written.

    Attributes:
        name: what clients call the model, whichever bundle is served.
        is_draining: whether the server is about to stop, and so is not ready; the worker sets it.
    """

    def __init__(
        self, bundle: Path, options: ServeOptions, notify_others: Callable[[], None], *, is_checked: bool = False
    ) -> None:
        self.options, self.notify_others = options, notify_others
        self.bundles = Bundles(bundle, options, self._swapped, is_checked=is_checked)
        served = self.bundles.current
        self.name = options.name or served.bundle.name
        check_model_name(self.name)
        self.metrics = ServerMetrics(lambda: self.batcher.queued_rows)
        self.batcher = Batcher(options, self._batch_done)
        most = options.max_concurrent_requests
        self.uploads = Uploads(max_bodies=_UPLOADS_PER_REQUEST * most, max_bytes=most * options.max_body_bytes)
        self._request_log: RequestLog | None = None
        if options.log_predictions is not None:
            check_loggable(served.schema)
            self._request_log = RequestLog(options.log_predictions, self.metrics.lost_rows.inc)
        self.is_draining = False
        self._damaged: Predictor | None = None
        self._failure: str | None = None
        self._numbers = itertools.count(1)
        self._id_prefix = f"{os.getpid():x}-{secrets.token_hex(4)}"
        self.metrics.bundle_served(self.name, served.bundle, before=None)

    async def start(self) -> None:
        """Start predicting; call this in the event loop."""
        served = self.bundles.current
        await self.batcher.start(
            lambda: [
                served.predict_undamaged(served.encode_requests([[{}] * num_rows])) for num_rows in (1, 64, 256, 1)
            ]
        )

    def close(self) -> None:
        """Stop, after the last request; what was logged is written."""
        self.batcher.stop()
        self.bundles.close()
        if self._request_log is not None:
            self._request_log.close()

    @property
    def is_ready(self) -> bool:
        """Whether requests should be sent here."""
        return not (self.is_draining or self.is_damaged()) and self.is_live

    def is_damaged(self) -> bool:
        """Tell whether the bundle's files are not what was loaded any more, and log it the first time."""
        served = self.bundles.current
        if served is not self._damaged:
            damage = served.bundle.find_damage()
            if damage is None:
                return False
            self._damaged = served  # of no use until another bundle is loaded
            log_event(logging.ERROR, "damaged", version=served.version, message=str(damage))
        return True

    @property
    def is_live(self) -> bool:
        """Whether the process can still predict; if not, it should be started again."""
        return self.batcher.is_alive

    def request_id(self, *given: bytes | str) -> str:
        """Return the name that a client gave a request, or a new one.

        Args:
            given: the first is taken that has at most 128 characters, all of them printable ASCII: it goes into logs
                and headers.
        """
        for name in given:
            if 0 < len(name) <= _MAX_REQUEST_ID_CHARACTERS and name.isascii():
                text = name if isinstance(name, str) else name.decode("ascii")
                if text.isprintable():
                    return text
        return f"{self._id_prefix}-{next(self._numbers)}"

    def check_model(self, name: str, version: str | None = None) -> Predictor:
        """Return the predictor of the model that a client names.

        Raises:
            RefusedRequest: there is no such model, or it is served in another version.
        """
        served = self.bundles.current
        if name != self.name:
            raise not_found(f"there is no model {shown(name)}; this server has {self.name!r}")
        if version and version != served.version:
            raise not_found(f"model {self.name!r} has no version {shown(version)}; it is served in {served.version!r}")
        return served

    async def predict(self, request: PredictionRequest) -> Answer:
        """Predict the probabilities of rows.

        Raises:
            RefusedRequest: a row is wrong, there is no time or room for the rows, or the bundle is damaged.
        """
        if request.model is self._damaged:
            raise _damaged()
        check_num_rows(len(request.rows), self.options.max_rows_per_request)
        limit_s = self.options.deadline_ms / 1e3
        if request.timeout_us is not None:
            limit_s = min(limit_s, request.timeout_us / 1e6)
        self.metrics.latency["read"].observe(time.perf_counter() - request.started_s)
        try:
            answer = await self.batcher.submit(request, request.started_s + limit_s)
        except RowError as error:
            raise bad_request(str(error)) from error
        except RefusedRequest:
            raise
        except Exception as error:
            # Of a bundle that is damaged any error may come.
            if request.model.bundle.find_damage() is None:
                raise
            self.is_damaged()
            raise _damaged() from error
        self.metrics.latency["queue"].observe(answer.queue_s)
        self.metrics.latency["encode"].observe(answer.encode_s)
        self.metrics.latency["model"].observe(answer.model_s)
        return answer

    def request_done(self, level: int, route: str, status: int, total_s: float, **fields: object) -> None:
        """Count a request that was answered, and log it with these fields."""
        self.metrics.request_done(route, status, total_s)
        log_event(level, "request", **fields, status=int(status), milliseconds=round(1e3 * total_s, 3))

    async def reload(self) -> Mapping[str, object]:
        """Serve what lies at the bundle's path now; return what came of it.

        Raises:
            TorchDLRMError: it cannot be served; the old bundle is, as before.
        """
        swap = await self._swap(self.bundles.reload)
        assert swap is not None, "it was not asked whether something is new"
        return {"outcome": swap.outcome, "model": self.name, **identity_of(self.bundles.current.bundle)}

    async def follow(self) -> None:
        """Look again and again where the bundle's path leads, and serve that; whatever fails is in the log."""
        while True:
            await asyncio.sleep(self.options.follow_s)
            with contextlib.suppress(TorchDLRMError):
                await self._swap(self.bundles.follow)

    async def watch(self) -> None:
        """Update the gauge of waiting rows for scrapes that other processes answer, and look at the bundle's files."""
        while True:
            with contextlib.suppress(OSError):  # of the shared files; a scrape reports it
                self.metrics.note_queue()
            self.is_damaged()
            await asyncio.sleep(_WATCH_S)

    async def _swap(self, attempt: Callable[[], Awaitable[Swap | None]]) -> Swap | None:
        before, started_s = self.bundles.current.version, time.perf_counter()
        try:
            swap = await attempt()
        except TorchDLRMError as error:
            self.metrics.swaps.labels("failed").inc()
            if str(error) != self._failure:  # that a bucket is away, once
                log_event(logging.ERROR, "swap failed", version=before, message=str(error))
            self._failure = str(error)
            raise
        self._failure = None
        if swap is not None:
            if swap.refused is not None:
                self.metrics.swaps.labels("delta refused").inc()
                log_event(logging.ERROR, "delta refused", version=before, message=swap.refused)
            self.metrics.swaps.labels(swap.outcome).inc()
            seconds, now = time.perf_counter() - started_s, self.bundles.current
            about: dict[str, object] = {"seconds": round(seconds, 3)}
            if isinstance(now.bundle, PatchedBundle):
                about |= {"deltas": swap.num_deltas, "patched_rows": now.bundle.weights.num_rows}
                about |= {"patched_values": now.bundle.num_values, "patched_bytes": now.bundle.memory_bytes}
            note_event(f"bundle {swap.outcome}", before=before, **identity_of(now.bundle), **about)
        return swap

    def _swapped(self, before: Predictor, after: Predictor) -> None:
        self._damaged = None
        self.metrics.bundle_served(self.name, after.bundle, before=before.bundle)

    def _batch_done(self, report: BatchReport) -> None:
        self.metrics.batch_done(report)
        if self._request_log is not None:
            self._request_log.add(report)


def _damaged() -> RefusedRequest:
    msg = "the model on this server is damaged, and nothing is predicted until another bundle is loaded"
    return RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, msg)
