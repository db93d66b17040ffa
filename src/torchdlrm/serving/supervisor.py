"""Starts several processes that serve on one port, and watches over them.

In: a bundle, options and a listening socket.  Out: the exit code.  The supervisor checks the bundle once, starts the
workers, which inherit the socket and map the same files, and hands signals on to them.  A worker that dies is replaced:
at once, or after a delay that grows while workers die soon after their start.  The service ends by itself only where
none is left and none can start.
"""

import logging
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from types import FrameType

from torchdlrm.errors import TorchDLRMError, UserError
from torchdlrm.progress import watched
from torchdlrm.serving.event_log import json_log, log_event
from torchdlrm.serving.options import Listening, ServeOptions

_MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # as in metrics.py, which must not be loaded before it is set
_STEADY_S = 10.0  # a worker that has served for so long did not die of its start
_MAX_DELAY_S = 30.0
_FAILED_STARTS_PER_WORKER = 2  # in a row, before the service ends


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    reports: Connection  # a `Listening` when it is ready; an exception or its trace when it fails
    ready_s: float | None = None
    failure: TorchDLRMError | str | None = None


class Supervisor:
    """Starts and replaces the workers of a server; `run` in the main thread, which ends with the listener closed."""

    def __init__(self, bundle: Path, options: ServeOptions, listener: socket.socket) -> None:
        self._bundle, self._options, self._listener = bundle, options, listener
        self._workers: list[_Worker] = []
        self._starts_due_s: list[float] = []
        self._num_early_deaths = self._num_failed_starts = 0
        self._is_stopping = False
        self._context = multiprocessing.get_context("spawn")
        self._stop_seen, self._stop_sign = self._context.Pipe(duplex=False)  # closed by a signal, which ends a `_wait`

    def run(self, started: Callable[[Listening], None]) -> int:
        """Serve until a signal says to stop.

        Args:
            started: is called when all workers can answer.

        Returns:
            The exit code: 0 after a signal, 1 when no worker can start or one did not stop as it should.

        Raises:
            UserError: the bundle or an option is wrong, by what a worker says before the server has started.
        """
        from torchdlrm.bundle.bundle import Bundle  # noqa: PLC0415 - loads torch
        from torchdlrm.serving.service.following import Target, first_bundle  # noqa: PLC0415 - likewise

        # Once for all: each process then checks the blocks that it touches.
        with watched(None) as progress:
            Bundle.open(first_bundle(Target.of(self._bundle)).path, verify=self._options.verify, progress=progress)
        folder = tempfile.mkdtemp(prefix="dlrm-metrics-")
        os.environ[_MULTIPROCESS_FOLDER] = folder
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._forward)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        try:
            with json_log(self._options.log_level):
                return self._watch(started)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _watch(self, started: Callable[[Listening], None]) -> int:
        has_started = False
        self._starts_due_s = [0.0] * self._options.workers
        while not self._has_to_stop():
            self._start_what_is_due()
            self._wait()
            for worker in [worker for worker in self._workers if worker.process.exitcode is not None]:
                if self._has_to_stop():
                    break
                self._replace(worker)
                if isinstance(worker.failure, UserError) and not has_started:
                    self._stop(1)
                    raise worker.failure
            ready = [worker for worker in self._workers if worker.ready_s is not None]
            if len(ready) == self._options.workers and not has_started:
                has_started = True
                started(self._listening)
            if not ready and self._num_failed_starts >= _FAILED_STARTS_PER_WORKER * self._options.workers:
                log_event(logging.ERROR, "no worker can start", failed_starts=self._num_failed_starts)
                return self._stop(1)
        return self._stop(0)

    def _has_to_stop(self) -> bool:
        return self._is_stopping  # set by a signal at any time

    def _start_what_is_due(self) -> None:
        now_s = time.monotonic()
        num_due = sum(due_s <= now_s for due_s in self._starts_due_s)
        self._starts_due_s = [due_s for due_s in self._starts_due_s if due_s > now_s]
        for _ in range(num_due):
            ours, theirs = self._context.Pipe(duplex=False)
            process = self._context.Process(target=_work, args=(self._bundle, self._options, self._listener, theirs))
            # A new process has handlers only after it has loaded: until then a signal to swap waits for it.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
            process.start()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
            theirs.close()
            self._workers.append(_Worker(process, ours))

    def _wait(self) -> None:
        """Wait until a worker is ready or has died, another is due, a signal says to stop, or a second is over."""
        open_ = {worker.reports: worker for worker in self._workers if not worker.reports.closed}
        sentinels = [worker.process.sentinel for worker in self._workers]
        timeout_s = min([1.0, *(due_s - time.monotonic() for due_s in self._starts_due_s)])
        for ready in wait([*open_, *sentinels, self._stop_seen], timeout=max(0.0, timeout_s)):
            if isinstance(ready, Connection) and ready is not self._stop_seen:
                self._receive(open_[ready])

    def _receive(self, worker: _Worker) -> None:
        try:
            report = worker.reports.recv()
        except (EOFError, OSError):  # the latter: it was killed within a word
            worker.reports.close()
            return
        if isinstance(report, Listening):
            self._listening = report
            worker.ready_s, self._num_failed_starts = time.monotonic(), 0
        else:
            worker.failure = report

    def _replace(self, worker: _Worker) -> None:
        """Forget a worker that has died, and have another one started."""
        while not worker.reports.closed:
            self._receive(worker)
        served_s = 0.0 if worker.ready_s is None else time.monotonic() - worker.ready_s
        self._num_failed_starts += worker.ready_s is None
        self._num_early_deaths = 0 if served_s >= _STEADY_S else self._num_early_deaths + 1
        delay_s = 0.0 if self._num_early_deaths < 2 else min(2.0 ** (self._num_early_deaths - 2), _MAX_DELAY_S)
        self._starts_due_s.append(time.monotonic() + delay_s)
        self._forget(worker, served_s=round(served_s, 3), replaced_in_s=delay_s)

    def _forget(self, worker: _Worker, **fields: object) -> None:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 - after the folder was named

        self._workers.remove(worker)
        pid, code = worker.process.pid, worker.process.exitcode
        for name in (f"{pid}", f"{pid}-*"):  # as metrics.py names its files, also those made again
            mark_process_dead(name)  # type: ignore[no-untyped-call]
        if code is not None and code < 0:
            fields["signal"] = signal.Signals(-code).name
        else:
            fields["exit_code"] = code
        if worker.failure is not None:
            fields["message"] = str(worker.failure)
        log_event(logging.ERROR, "worker died", pid=pid, **fields)

    def _stop(self, code: int) -> int:
        self._is_stopping = True
        # Before the workers close theirs, so that no client is queued that none of them will accept.
        self._listener.close()
        for worker in self._workers:
            _send(worker, signal.SIGTERM)
        for worker in list(self._workers):
            worker.process.join(self._options.drain_s + self._options.shutdown_timeout_s + 10)
            if worker.process.exitcode is None:
                worker.failure = "did not stop in time, and was killed"
                worker.process.kill()
                worker.process.join()
            if worker.process.exitcode not in {0, -signal.SIGTERM}:  # the latter: before it had a handler
                code = 1
                self._forget(worker)
        return code

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            for worker in self._workers:
                _send(worker, signal.SIGHUP)
        else:
            self._is_stopping = True
            self._stop_sign.close()


def _send(worker: _Worker, number: signal.Signals) -> None:
    if worker.process.exitcode is None and worker.process.pid is not None:
        os.kill(worker.process.pid, number)


def _work(bundle: Path, options: ServeOptions, listener: socket.socket, reports: Connection) -> None:
    """Run a worker in a process of its own."""
    from torchdlrm.serving.worker import run_worker  # noqa: PLC0415 - loads torch

    try:
        code = run_worker(bundle, options, listener, reports.send, is_checked=True)
    except TorchDLRMError as error:
        reports.send(error)
        code = 2
    except Exception:  # noqa: BLE001 - the supervisor writes it to the log, as JSON
        reports.send(traceback.format_exc())
        code = 1
    raise SystemExit(code)
