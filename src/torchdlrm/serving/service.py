"""Holds what HTTP and gRPC share: the bundle, the batcher, metrics, logs and limits of one process.

In: rows, over HTTP or gRPC.  Out: probabilities, or why there are none.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import secrets
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import torch

from torchdlrm.bundle import check_model_name
from torchdlrm.bundle.patched_bundle import PatchedBundle
from torchdlrm.errors import RowError, TorchDLRMError, shown
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.serving.access import ApiKeys
from torchdlrm.serving.batcher import Answer, Batcher, BatchReport, PredictionRequest
from torchdlrm.serving.bodies import Uploads
from torchdlrm.serving.bundles import Bundles, Swap
from torchdlrm.serving.event_log import log_event, note_event
from torchdlrm.serving.metrics import ServerMetrics
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.refusals import RefusedRequest, bad_request, check_num_rows, not_found
from torchdlrm.serving.request_log import RequestLog, check_loggable
from torchdlrm.serving.row_routes import describe

_SWITCH_INTERVAL_S = 0.0005
LARGE_BYTES = 256 << 10
_MAX_REQUEST_ID_CHARACTERS = 128
_UPLOADS_PER_REQUEST = 8  # bodies that may come slowly, for each request that may be under way

Parsed = TypeVar("Parsed")


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
        self.bundles = Bundles(
            bundle,
            model_class=options.model_class,
            allow_changed_model_class=options.allow_changed_model_class,
            verify=options.verify,
            swapped=self._swapped,
            is_checked=is_checked,
        )
        served = self.bundles.current
        self.name = options.name or served.bundle.name
        check_model_name(self.name)
        self.keys = ApiKeys(options.api_keys)
        self.metrics = ServerMetrics(lambda: self.batcher.queued_rows)
        self.batcher = Batcher(
            max_batch_rows=options.max_batch_rows, max_queue_rows=options.max_queue_rows, listener=self._batch_done
        )
        most = options.max_concurrent_requests
        self.uploads = Uploads(max_bodies=_UPLOADS_PER_REQUEST * most, max_bytes=most * options.max_body_bytes)
        self._request_log: RequestLog | None = None
        if options.log_predictions is not None:
            check_loggable(served.schema)
            self._request_log = RequestLog(options.log_predictions, self.metrics.rows_lost)
        self.is_draining = False
        self._damaged: Predictor | None = None
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
            self._damaged = served  # of no use to anybody until another bundle is loaded
            log_event(logging.ERROR, "damaged", version=served.version, message=str(damage))
        return True

    @property
    def is_live(self) -> bool:
        """Whether the process can still predict; if not, it should be started again."""
        return self.batcher.is_alive

    def is_health(self, path: str) -> bool:
        """Tell whether a path asks for health alone, which needs no key and is answered however much there is to do."""
        if path.startswith("/v2/health/"):
            return True
        model = f"/v2/models/{self.name}"
        return path in {f"{model}/ready", f"{model}/versions/{self.bundles.current.version}/ready"}

    def new_request_id(self) -> str:
        """Make a name for a request that came without one."""
        return f"{self._id_prefix}-{next(self._numbers)}"

    def describe(self) -> dict[str, Any]:
        """Make the answer of `GET /schema`."""
        served, max_rows = self.bundles.current, self.options.max_rows_per_request
        about = {"model": self.name, **served.told}
        return describe(about, served.schema, self.bundles.examples, max_rows, served.never_missing)

    def check_model(self, name: str, version: str | None = None) -> Predictor:
        """Return the predictor of the model that a client names.

        Raises:
            RefusedRequest: there is no such model, or it is served in another version.
        """
        served = self.bundles.current
        if name != self.name:
            msg = f"there is no model {shown(name)}; this server has {self.name!r}"
            raise not_found(msg)
        if version and version != served.version:
            msg = f"model {self.name!r} has no version {shown(version)}; it is served in {served.version!r}"
            raise not_found(msg)
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
        self.metrics.stage_done("read", time.perf_counter() - request.started_s)
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
        self.metrics.stage_done("queue", answer.queue_s)
        self.metrics.stage_done("encode", answer.encode_s)
        self.metrics.stage_done("model", answer.model_s)
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
        return {"outcome": swap.outcome, "model": self.name, **self.bundles.current.told}

    async def follow(self) -> None:
        """Serve what the bundle's path leads to, if that is new; whatever fails is in the log."""
        with contextlib.suppress(TorchDLRMError):
            await self._swap(self.bundles.follow)

    async def _swap(self, attempt: Callable[[], Awaitable[Swap | None]]) -> Swap | None:
        before, started_s = self.bundles.current.version, time.perf_counter()
        try:
            swap = await attempt()
        except TorchDLRMError as error:
            self.metrics.swap_done("failed")
            log_event(logging.ERROR, "swap failed", version=before, message=str(error))
            raise
        if swap is not None:
            if swap.refused is not None:
                self.metrics.swap_done("delta refused")
                log_event(logging.ERROR, "delta refused", version=before, message=swap.refused)
            self.metrics.swap_done(swap.outcome)
            seconds, now = time.perf_counter() - started_s, self.bundles.current
            about: dict[str, object] = {"seconds": round(seconds, 3)}
            if isinstance(now.bundle, PatchedBundle):
                about |= {"deltas": swap.num_deltas, "patched_rows": now.bundle.weights.num_rows}
                about |= {"patched_values": now.bundle.num_values, "patched_bytes": now.bundle.memory_bytes}
            note_event(f"bundle {swap.outcome}", before=before, **now.told, **about)
        return swap

    def _swapped(self, before: Predictor, after: Predictor) -> None:
        self._damaged = None
        self.metrics.bundle_served(self.name, after.bundle, before=before.bundle)

    def _batch_done(self, report: BatchReport) -> None:
        self.metrics.batch_done(report)
        if self._request_log is not None:
            self._request_log.add(report)


async def off_loop_if_large(parse: Callable[[], Parsed], num_bytes: int) -> Parsed:
    """Parse; in a thread where there are many bytes, so that other requests need not wait."""
    return await asyncio.to_thread(parse) if num_bytes > LARGE_BYTES else parse()


def request_id_of(given: bytes | str) -> str | None:
    """Return the name that the client gave a request; None where it is empty, too long, or not of printable ASCII.

    It comes in the header or metadata `x-request-id` or in the field `id` of a message, and goes into logs and headers.
    """
    if not 0 < len(given) <= _MAX_REQUEST_ID_CHARACTERS or not given.isascii():
        return None
    text = given if isinstance(given, str) else given.decode("ascii")
    return text if text.isprintable() else None


def _damaged() -> RefusedRequest:
    msg = "the model on this server is damaged, and nothing is predicted until another bundle is loaded"
    return RefusedRequest(HTTPStatus.SERVICE_UNAVAILABLE, msg)


def configure_threads(options: ServeOptions) -> None:
    """Share the cores between the processes of a server, and those of each between its model and everything else.

    A model whose threads must wait for a core that reads requests takes ten times as long as on fewer threads.
    """
    torch.set_num_threads(options.num_threads or options.num_cores_of_model)
    # How long the loop may have to wait for the interpreter while the model's thread computes in Python.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)


async def follow(service: Service) -> None:
    """Look again and again where the bundle's path leads."""
    while True:
        await asyncio.sleep(service.options.follow_s)
        await service.follow()


async def watch(service: Service, interval_s: float = 1.0) -> None:
    """Update the gauge of waiting rows for scrapes that other processes answer, and look at the bundle's files."""
    while True:
        with contextlib.suppress(OSError):  # of the shared files; a scrape reports it
            service.metrics.note_queue()
        service.is_damaged()
        await asyncio.sleep(interval_s)
