"""The queue in front of the model: batches by rows, no wait when idle, a bound, deadlines, nobody else's mistakes."""

import asyncio
import contextlib
import gc
import math
import threading
import time
import weakref
from dataclasses import dataclass
from http import HTTPStatus

import numpy as np
import pytest

from torchdlrm.bundle.encoded_rows import EncodedRows
from torchdlrm.errors import RowError
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.batcher import Batcher, PredictionRequest
from torchdlrm.serving.service.refusals import RefusedRequest


@dataclass
class Found:
    probabilities: np.ndarray
    logits: np.ndarray


class Doubling:
    """Predicts twice a row's x; waits while `go` is not set, and cannot read a row whose x is no number."""

    def __init__(self, *, is_verified=False):
        self.is_verified = is_verified
        self.batches, self.threads = [], []
        self.seconds = 0.0
        self.go = threading.Event()
        self.go.set()

    def encode_requests(self, requests):
        try:
            x = [float(row["x"]) for rows in requests for row in rows]
        except ValueError as error:
            raise RowError(str(error)) from error
        return EncodedRows(np.array(x, np.float32)[:, None], np.zeros((0, len(x)), np.int32))

    def predict_undamaged(self, rows):
        self.go.wait(10)
        time.sleep(self.seconds)
        self.batches.append(rows.dense[:, 0].astype(int).tolist())
        self.threads.append(threading.current_thread().name)
        return Found(2 * rows.dense[:, 0], rows.dense[:, 0])


async def begun():
    """When what was asked has reached the batcher, and what could begin has begun."""
    for _ in range(3):
        await asyncio.sleep(0)


def rows(*values):
    return [{"x": value} for value in values]


def run(scenario, *, max_batch_rows=8, max_queue_rows=16, is_verified=False, quick_s=math.inf, listener=None):
    """Runs a scenario(batcher, model, ask) in an event loop."""

    async def main():
        model, reports = Doubling(is_verified=is_verified), []
        options = ServeOptions(max_batch_rows=max_batch_rows, max_queue_rows=max_queue_rows)
        batcher = Batcher(options, listener or reports.append, quick_s=quick_s)
        await batcher.start()

        def ask(*values, model=model, seconds=5.0, is_gone=lambda: False, num_bytes=100):
            now_s = time.perf_counter()
            request = PredictionRequest(model, rows(*values), num_bytes, str(values[0]), now_s, is_gone)
            return asyncio.ensure_future(batcher.submit(request, now_s + seconds))

        async def hold():
            """Keep the model busy with row 0."""
            model.go.clear()
            first = ask(0)
            await begun()
            return first

        try:
            await scenario(batcher, model, ask, hold)
        finally:
            model.go.set()
            batcher.stop()
        return reports

    return asyncio.run(main())


def probabilities(answer):
    return answer.probabilities.tolist()


def test_an_idle_batcher_does_not_wait():
    async def scenario(_batcher, model, ask, _hold):
        assert probabilities(await ask(1)) == [2]
        assert probabilities(await ask(2, 3)) == [4, 6]
        assert model.batches == [[1], [2, 3]]

    run(scenario)


def test_what_queues_while_the_model_is_busy_shares_a_batch_up_to_the_limit_of_rows():
    async def scenario(batcher, model, ask, hold):
        first = await hold()
        waiting = [ask(10 * i, 10 * i + 1, 10 * i + 2) for i in range(1, 5)]
        await begun()
        assert batcher.queued_rows == 12
        model.go.set()
        await first
        assert [probabilities(await answer) for answer in waiting] == [
            [20 * i, 20 * i + 2, 20 * i + 4] for i in range(1, 5)
        ]
        assert [len(batch) for batch in model.batches] == [1, 6, 6]  # a request is not torn apart to fill up 8
        assert batcher.queued_rows == 0

    reports = run(scenario)
    assert [[request.request_id for request in report.requests] for report in reports] == [
        ["0"],
        ["10", "20"],
        ["30", "40"],
    ]


def test_a_request_beyond_the_limit_is_cut_into_several_calls():
    async def scenario(_batcher, model, ask, _hold):
        assert probabilities(await ask(*range(20))) == [2 * i for i in range(20)]
        assert [len(batch) for batch in model.batches] == [8, 8, 4]

    run(scenario, max_queue_rows=20)


def test_a_full_queue_refuses_and_says_when_to_come_again():
    async def scenario(batcher, model, ask, hold):
        first = await hold()
        waiting = [ask(*range(8)), ask(*range(7))]
        await asyncio.sleep(0)
        with pytest.raises(RefusedRequest) as refused:
            await ask(1, 2)
        assert refused.value.status == HTTPStatus.SERVICE_UNAVAILABLE
        assert refused.value.retry_after_s >= 1
        batcher.check_room(1)
        model.go.set()
        assert [len(probabilities(answer)) for answer in await asyncio.gather(first, *waiting)] == [1, 8, 7]
        assert probabilities(await ask(1, 2)) == [2, 4]

    run(scenario)


def test_rows_past_their_deadline_never_reach_the_model():
    async def scenario(batcher, model, ask, hold):
        first = await hold()
        late = ask(5, seconds=0.01)
        with pytest.raises(RefusedRequest) as refused:
            await late
        assert refused.value.status == HTTPStatus.GATEWAY_TIMEOUT
        with pytest.raises(RefusedRequest):
            await ask(6, seconds=-1)
        model.go.set()
        await first
        await ask(7)
        assert model.batches == [[0], [7]]
        assert batcher.queued_rows == 0

    run(scenario)


def test_rows_that_nobody_waits_for_never_reach_the_model():
    async def scenario(batcher, model, ask, hold):
        first = await hold()
        gone, cancelled, kept = ask(5, is_gone=lambda: True), ask(6), ask(7)
        await asyncio.sleep(0)
        cancelled.cancel()
        model.go.set()
        await first
        assert probabilities(await kept) == [14]
        assert model.batches == [[0], [7]]
        assert gone.done()
        assert isinstance(gone.exception(), RefusedRequest)
        assert batcher.queued_rows == 0

    run(scenario)


def test_room_that_clients_who_have_gone_took_is_given_to_others():
    async def scenario(_batcher, model, ask, hold):
        first = await hold()
        gone = ask(*range(16), is_gone=lambda: True)
        await asyncio.sleep(0)
        kept = ask(1)
        model.go.set()
        await asyncio.gather(first, gone, return_exceptions=True)
        assert probabilities(await kept) == [2]

    run(scenario)


def test_a_request_that_fails_spoils_no_other():
    async def scenario(_batcher, model, ask, hold):
        first = await hold()
        good, bad, better = ask(1), ask("one"), ask(3)
        await asyncio.sleep(0)
        model.go.set()
        await first
        assert probabilities(await good) == [2]
        assert probabilities(await better) == [6]
        with pytest.raises(Exception, match=r"."):
            await bad

    run(scenario)


def test_rows_for_different_models_share_no_batch():
    async def scenario(_batcher, model, ask, hold):
        other = Doubling()
        first = await hold()
        waiting = [ask(1), ask(2), ask(3, model=other), ask(4, model=other), ask(5)]
        await asyncio.sleep(0)
        model.go.set()
        await first
        await asyncio.gather(*waiting)
        assert (model.batches, other.batches) == ([[0], [1, 2], [5]], [[3, 4]])

    run(scenario)


def test_few_rows_are_predicted_in_the_loop_and_many_in_the_model_s_thread():
    async def scenario(_batcher, model, ask, _hold):
        await ask(1, 2)
        await ask(*range(20))
        await asyncio.gather(*(ask(i) for i in range(5)))  # what is read together shares a batch here too
        assert model.batches == [[1, 2], list(range(20)), list(range(5))]
        assert model.threads == ["MainThread", "model", "MainThread"]

    run(scenario, max_batch_rows=32, max_queue_rows=32, is_verified=True)


def test_few_rows_that_take_long_do_not_hold_up_the_loop_twice():
    async def scenario(_batcher, model, ask, _hold):
        model.seconds = 0.3
        await ask(1)
        await ask(2)
        model.seconds = 0.0
        await ask(3)
        await ask(4)
        assert model.threads == ["MainThread", "model", "model", "MainThread"]

    run(scenario, is_verified=True, quick_s=0.25)  # a quarter of a second: the machine may have other things to do


def test_few_rows_of_many_bytes_are_not_predicted_in_the_loop():
    async def scenario(_batcher, model, ask, _hold):
        await ask(1, num_bytes=20_000)
        await asyncio.gather(ask(2, num_bytes=10_000), ask(3, num_bytes=10_000))
        await ask(4)
        assert model.batches == [[1], [2, 3], [4]]
        assert model.threads == ["model", "model", "MainThread"]

    run(scenario, is_verified=True)


def test_in_the_loop_too_models_are_kept_apart_and_a_bad_request_spoils_no_other():
    async def scenario(_batcher, model, ask, _hold):
        other = Doubling(is_verified=True)
        good, bad, others = ask(1), ask("one"), ask(3, model=other)
        assert probabilities(await others) == [6]
        assert probabilities(await good) == [2]
        with pytest.raises(ValueError, match="one"):
            await bad
        # Whose fault it is was found out in the model's thread, and not in the loop.
        assert (model.threads, other.threads) == (["model"], ["MainThread"])
        with pytest.raises(ValueError, match="two"):
            await ask("two")

    run(scenario, is_verified=True)


class Cell(float):
    """A cell that can be asked whether it is still there."""


@pytest.mark.parametrize(
    ("what", "is_verified"),
    [("read", True), ("read", False), ("refused", True), ("refused", False), ("too late", False)],
)
def test_rows_are_freed_with_their_answer_and_do_not_wait_for_the_collector(what, is_verified):
    async def scenario(_batcher, model, ask, _hold):
        cell = Cell(2)
        was_there = weakref.ref(cell)
        model.seconds = 0.2 if what == "too late" else 0
        asked = ask(cell, *["no number"] * (what == "refused"), seconds=0.05 if what == "too late" else 5)
        del cell
        with contextlib.suppress(RefusedRequest, RowError):
            await asked
            assert what == "read"
        del asked
        await ask(3)  # the model has done with the one before
        await begun()
        assert was_there() is None

    gc.disable()
    try:
        run(scenario, is_verified=is_verified, listener=lambda _: None)
    finally:
        gc.enable()
