"""Collects many small requests into few large batches: the queue in front of the model.

In: raw rows, each request with a deadline.  Out: their probabilities.  The model runs in a thread of its own, so the
event loop keeps reading and answering; what arrives while the model is busy is gathered and makes up the next batch.
So there is no waiting time to choose: an idle server starts on a row at once, and the busier the model, the more rows
share a batch.  Everything is counted in rows, because a request may have one or thousands.

A batch of few rows, and of few bytes, takes less time than waking a thread, twice.  It is predicted where it is, in the
loop, as long as that is quick; requests that come meanwhile are read together after it, and share the next.
Why: docs/decisions/few-rows-are-predicted-in-the-event-loop.md.

All methods belong to the event loop's thread, except where stated otherwise.
"""

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from torchdlrm.errors import TorchDLRMError
from torchdlrm.prediction.predictor import Predictions, Predictor, Rows
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.refusals import RefusedRequest, bad_request, overloaded, too_late

_SWEEP_INTERVAL_S = 0.01
_IS_GONE = "the client has closed the connection"
_IS_LATE = "the deadline passed; the server has more to do than it can do in time"
# Predicted in the loop: at most these rows that came as at most these bytes, if the last such batch took no longer.
_FEW_ROWS, _FEW_BYTES, _QUICK_S = 16, 16 << 10, 0.003


@dataclass(frozen=True, slots=True)
class PredictionRequest:
    """Rows that a client sent.

    Attributes:
        model: predicts them; rows for different models never share a batch.
        rows: B rows.
        num_bytes: how many they came as, which tells how much work they are.
        request_id: what the log calls the request.
        started_s: when it came, by `time.perf_counter`.
        is_gone: whether the client has closed the connection.
        timeout_us: the client's own deadline, from `started_s`.
        is_reported: whether its rows are ones that the client has, and not such as only explain these.
    """

    model: Predictor
    rows: Rows
    num_bytes: int
    request_id: str
    started_s: float
    is_gone: Callable[[], bool]
    timeout_us: int | None = None
    is_reported: bool = True


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What became of a batch.

    Attributes:
        requests: of one model; they have B rows together.
        predictions: of the rows, part after part.
        time_us: when they were predicted, in microseconds since 1970.
    """

    requests: Sequence[PredictionRequest]
    predictions: Sequence[Predictions]
    time_us: int

    @property
    def model(self) -> Predictor:
        """What predicted."""
        return self.requests[0].model

    @property
    def total_rows(self) -> int:
        """The number of rows, B."""
        return sum(len(request.rows) for request in self.requests)


@dataclass(frozen=True, slots=True)
class Answer:
    """The probabilities and logits of a request's rows, float32 [B], and how long they took."""

    probabilities: NDArray[np.float32]
    logits: NDArray[np.float32]
    queue_s: float
    encode_s: float
    model_s: float


@dataclass(eq=False, slots=True)
class _Waiting:
    request: PredictionRequest
    num_rows: int
    arrived_s: float
    future: asyncio.Future[Answer]
    is_queued: bool = True


@dataclass(frozen=True, slots=True)
class _Batch:
    parts: list[_Waiting]
    started_s: float

    @property
    def model(self) -> Predictor:
        return self.parts[0].request.model

    @property
    def num_rows(self) -> int:
        return sum(part.num_rows for part in self.parts)

    @property
    def is_small(self) -> bool:
        return self.num_rows <= _FEW_ROWS and sum(part.request.num_bytes for part in self.parts) <= _FEW_BYTES


class Batcher:
    """Gathers rows for a model, which is in one thread at a time; `start` makes it run.

    Args:
        options: how many rows the model gets at once (a request that has more is cut into several calls), and how many
            may wait.
        listener: is called with a report of each batch, in the thread that predicted it, but for rows that explain.
        quick_s: a batch is predicted in the loop only if the last one as small took no longer.
    """

    def __init__(
        self,
        options: ServeOptions,
        listener: Callable[[BatchReport], None],
        *,
        quick_s: float = _QUICK_S,
    ) -> None:
        self._options, self._listener, self._quick_s = options, listener, quick_s
        self._waiting: deque[_Waiting] = deque()
        self._batches: queue.SimpleQueue[_Batch | None] = queue.SimpleQueue()
        self._is_busy = self._is_beginning = False
        self._last_small_s = 0.0
        self._swept_s = 0.0
        self._rows_per_s = 0.0
        self.queued_rows = 0
        self._warm_up: Callable[[], object] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self, warm_up: Callable[[], object] = lambda: None) -> None:
        """Start the model's thread; call this in the event loop that will submit.

        Args:
            warm_up: is called here and in that thread first of all: libraries make buffers and threads of their own
                for each thread that calls them, and the first request should not wait for that.
        """
        self._loop = asyncio.get_running_loop()
        warm_up()
        self._warm_up = warm_up
        is_warm = asyncio.Event()
        self._thread = threading.Thread(target=self._work, args=(is_warm,), name="model", daemon=True)
        self._thread.start()
        await is_warm.wait()

    def stop(self) -> None:
        """Let the model's thread end after what it has been given."""
        self._batches.put(None)

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread is running."""
        return self._thread is not None and self._thread.is_alive()

    def check_room(self, num_rows: int = 1) -> None:
        """See whether rows would be taken, before work goes into reading them.

        Raises:
            RefusedRequest: the queue is full.
        """
        if self.queued_rows + num_rows <= self._options.max_queue_rows:
            return
        now_s = time.perf_counter()
        if now_s - self._swept_s >= _SWEEP_INTERVAL_S:
            self._swept_s = now_s
            for waiting in self._waiting:
                if waiting.is_queued and waiting.request.is_gone():
                    self._leave_queue(waiting)
                    _refuse(waiting, bad_request(_IS_GONE))
        if self.queued_rows + num_rows > self._options.max_queue_rows:
            wait_s = self.queued_rows / self._rows_per_s if self._rows_per_s else 1.0
            most = self._options.max_queue_rows
            msg = f"{self.queued_rows:,} rows are waiting and at most {most:,} may; ask again later"
            raise overloaded(msg, max(1, round(wait_s)))

    async def submit(self, request: PredictionRequest, deadline_s: float) -> Answer:
        """Wait for the probabilities of some rows, which are of no use after `deadline_s` by `time.perf_counter`.

        Raises:
            RefusedRequest: the queue is full, or the deadline has passed.
            UserError: a row is wrong.
        """
        assert self._loop is not None, "start() comes first"
        now_s = time.perf_counter()
        num_rows = len(request.rows)
        if not num_rows:
            nothing = np.empty(0, np.float32)
            return Answer(nothing, nothing, queue_s=0.0, encode_s=0.0, model_s=0.0)
        if now_s >= deadline_s:
            raise too_late("the deadline passed before the rows were read; nothing was computed")
        self.check_room(num_rows)
        future: asyncio.Future[Answer] = self._loop.create_future()
        waiting = _Waiting(request, num_rows, now_s, future)
        future.add_done_callback(partial(self._leave_queue, waiting))
        timer = self._loop.call_later(deadline_s - now_s, _refuse, waiting, too_late(_IS_LATE))
        self._waiting.append(waiting)
        self.queued_rows += waiting.num_rows
        self._begin_soon()
        try:
            return await future
        finally:
            timer.cancel()
            del future, waiting, request  # an error that is raised here knows this frame, and the future the error

    def _leave_queue(self, waiting: _Waiting, _: object = None) -> None:
        if waiting.is_queued:
            waiting.is_queued = False
            self.queued_rows -= waiting.num_rows

    def _begin_soon(self) -> None:
        """Start a batch when the loop has read all that has arrived."""
        if not (self._is_busy or self._is_beginning):
            assert self._loop is not None
            self._is_beginning = True
            self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        self._is_beginning = False
        if self._is_busy or (batch := self._next_batch()) is None:
            return
        results: list[Answer | Exception] | None = None
        started_s = time.perf_counter()
        if batch.is_small and self._last_small_s <= self._quick_s and batch.model.is_verified:
            results = self._answer_together(batch)
        if results is None:
            self._is_busy = True
            self._batches.put(batch)
            return
        self._deliver(batch, results, time.perf_counter() - started_s)
        if self._waiting:  # for another model
            self._begin_soon()

    def _next_batch(self) -> _Batch | None:
        """Take what is waiting, up to the limit; requests whose clients have gone are dropped here."""
        parts: list[_Waiting] = []
        num_rows = 0
        while self._waiting:
            first = self._waiting[0]
            if first.future.done() or first.request.is_gone():
                self._waiting.popleft()
                self._leave_queue(first)
                _refuse(first, bad_request(_IS_GONE))
                continue
            is_too_much = num_rows + first.num_rows > self._options.max_batch_rows
            if parts and (is_too_much or not _may_share(first.request, parts[0].request)):
                break
            self._waiting.popleft()
            self._leave_queue(first)
            parts.append(first)
            num_rows += first.num_rows
        return _Batch(parts, time.perf_counter()) if parts else None

    def _finish(self, batch: _Batch, results: list[Answer | Exception], batch_s: float) -> None:
        """Take the results of the model's thread; called in the event loop."""
        self._is_busy = False
        if self.queued_rows > _FEW_ROWS:
            self._begin()  # first of all: the model should not wait for the answers to be written
        self._deliver(batch, results, batch_s)
        if self._waiting:
            self._begin_soon()

    def _deliver(self, batch: _Batch, results: list[Answer | Exception], batch_s: float) -> None:
        if batch.is_small:
            self._last_small_s = batch_s
        speed = batch.num_rows / max(batch_s, 1e-6)
        self._rows_per_s = speed if not self._rows_per_s else 0.9 * self._rows_per_s + 0.1 * speed
        for part, result in zip(batch.parts, results, strict=True):
            if part.future.done():
                continue
            if isinstance(result, Exception):
                part.future.set_exception(result)
            else:
                part.future.set_result(result)

    def _work(self, is_warm: asyncio.Event) -> None:
        """Run batches until there are no more; this is the model's thread."""
        assert self._loop is not None
        assert self._warm_up is not None
        try:
            self._warm_up()
        finally:
            self._warm_up = None  # it may know a bundle, which must not outlive its last request
            self._loop.call_soon_threadsafe(is_warm.set)
        while (batch := self._batches.get()) is not None:
            started_s = time.perf_counter()
            results = self._answer(batch)
            try:
                self._loop.call_soon_threadsafe(self._finish, batch, results, time.perf_counter() - started_s)
            except RuntimeError:
                return  # the loop is closed: no client waits any more
            del batch, results  # while the thread waits, nothing keeps a bundle that was swapped away

    def _answer_together(self, batch: _Batch) -> list[Answer | Exception] | None:
        """Predict a batch; None where one of several requests fails: to find it takes too long in the event loop."""
        try:
            return list(self._predict(batch))
        except Exception as error:  # noqa: BLE001 - whatever it is, the server continues, and the client gets an answer
            return [_without_trace(error)] if len(batch.parts) == 1 else None

    def _answer(self, batch: _Batch) -> list[Answer | Exception]:
        if (results := self._answer_together(batch)) is not None:
            return results
        # One of the requests may be to blame: each by itself, so that the others are answered.
        return [self._answer(_Batch([part], batch.started_s))[0] for part in batch.parts]

    def _predict(self, batch: _Batch) -> Iterator[Answer]:
        started_s = time.perf_counter()
        requests = [part.request for part in batch.parts]
        rows = batch.model.encode_requests([request.rows for request in requests])
        encode_s = time.perf_counter() - started_s
        step = self._options.max_batch_rows
        pieces = (rows.part(at, min(at + step, rows.num_rows)) for at in range(0, rows.num_rows, step))
        predictions = [batch.model.predict_undamaged(piece) for piece in pieces]
        model_s = time.perf_counter() - started_s - encode_s
        if requests[0].is_reported:
            self._listener(BatchReport(requests, predictions, time.time_ns() // 1000))
        probabilities = np.concatenate([piece.probabilities for piece in predictions])
        logits = np.concatenate([piece.logits for piece in predictions])
        end = 0
        for part in batch.parts:
            own, end = slice(end, end + part.num_rows), end + part.num_rows
            yield Answer(probabilities[own], logits[own], batch.started_s - part.arrived_s, encode_s, model_s)


def _may_share(one: PredictionRequest, other: PredictionRequest) -> bool:
    return one.model is other.model and one.is_reported == other.is_reported


def _without_trace(error: Exception) -> Exception:
    """Remove the frames from an error and its causes: they refer to the batch, which refers to the error again.

    Only the collector would free such a circle, rows of many megabytes with it, and it looks at how many objects there
    are, not at their sizes.  Other errors keep their frames, for the log.
    """
    if isinstance(error, TorchDLRMError):
        error.__cause__ = error.__context__ = error.__traceback__ = None
    return error


def _refuse(waiting: _Waiting, reason: RefusedRequest) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(reason)
