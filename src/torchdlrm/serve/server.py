"""A server of one process or many: one port, one bundle in memory.

In: options.  Out: the exit code.  With several processes, this one listens, checks the bundle once, starts the others,
which inherit the socket and map the same files, hands signals on to them, and starts one again that has died.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from torchdlrm.errors import ConfigError
from torchdlrm.serve.options import ServeOptions

_MULTIPROCESS_FOLDER = "PROMETHEUS_MULTIPROC_DIR"  # as in metrics.py, which must not be loaded before it is set
_SECONDS_BETWEEN_STARTS = 1.0


@dataclass(frozen=True)
class Listening:
    """Where a server can be asked, and what it serves; `grpc` is None where it has no gRPC."""

    url: str
    grpc: str | None
    model: str
    version: str


def serve(options: ServeOptions, started: Callable[[Listening], None]) -> int:
    """Serve a bundle until SIGTERM or SIGINT.

    Args:
        options: of the server.
        started: is told when all processes can be asked.

    Returns:
        The exit code: 0 after a signal, 1 when a process could not go on.

    Raises:
        ConfigError: the options do not go together, or an address cannot be had.
        BundleError: the bundle cannot be served.
    """
    options.check()
    listener = _listen(options.host, options.port)
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    if options.workers == 1:
        from torchdlrm.serve.worker import Ready, run_worker  # noqa: PLC0415 - loads torch, here and nowhere else

        def tell(ready: Ready) -> None:
            grpc = None if ready.grpc_port is None else f"{host}:{ready.grpc_port}"
            started(Listening(url, grpc, ready.model, ready.version))

        return run_worker(options, listener, tell)
    return _Supervisor(options, listener, url, host).run(started)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        msg = f"--host {host} --port {port}: cannot be listened to: {error.strerror or error}; choose another"
        raise ConfigError(msg) from error
    listener.listen(2048)
    listener.setblocking(False)  # noqa: FBT003 - the name of the call says it
    return listener


class _Supervisor:
    def __init__(self, options: ServeOptions, listener: socket.socket, url: str, host: str) -> None:
        self._options, self._listener, self._url, self._host = options, listener, url, host
        self._processes: dict[SpawnProcess, Connection] = {}
        self._started_s: dict[SpawnProcess, float] = {}
        self._is_stopping = False
        self._context = multiprocessing.get_context("spawn")
        self._grpc_reservation: socket.socket | None = None

    def run(self, started: Callable[[Listening], None]) -> int:
        from torchdlrm.export.bundle import Bundle  # noqa: PLC0415 - loads torch

        # Once for all: each process then checks the blocks that it touches.
        Bundle.open(self._options.bundle.resolve(), verify=self._options.verify)
        folder = tempfile.mkdtemp(prefix="dlrm-metrics-")
        os.environ[_MULTIPROCESS_FOLDER] = folder
        self._reserve_grpc_port()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._hand_on)
        try:
            for _ in range(self._options.workers):
                self._start()
            if not self._tell_when_all_are_ready(started):
                return self._stop(1)
            return self._watch()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _reserve_grpc_port(self) -> None:
        """Find a free port for all processes, where one is asked for, and keep it for them."""
        if self._options.grpc_port is None:
            return
        holder = socket.socket(socket.AF_INET6 if ":" in self._options.host else socket.AF_INET)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        try:
            holder.bind((self._options.host, self._options.grpc_port))
        except OSError as error:
            msg = f"--grpc-port {self._options.grpc_port}: cannot be listened to: {error.strerror}; choose another"
            raise ConfigError(msg) from error
        self._options = replace(self._options, grpc_port=holder.getsockname()[1])
        self._grpc_reservation = holder

    def _start(self) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(self._options, self._listener, theirs))
        # A new process has handlers only after it has loaded: until then a signal to swap waits for it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        theirs.close()
        self._processes[process], self._started_s[process] = ours, time.monotonic()

    def _tell_when_all_are_ready(self, started: Callable[[Listening], None]) -> bool:
        said: tuple[str, str] | None = None
        for process, ours in self._processes.items():
            wait([ours, process.sentinel])
            try:
                said = ours.recv()
            except EOFError:
                return self._is_stopping  # asked to stop before it began
        assert said is not None
        grpc = None if self._options.grpc_port is None else f"{self._host}:{self._options.grpc_port}"
        started(Listening(self._url, grpc, *said))
        return True

    def _watch(self) -> int:
        while not self._is_stopping:
            wait([process.sentinel for process in self._processes], timeout=1.0)
            dead = [process for process in self._processes if process.exitcode is not None]
            for process in [] if self._is_stopping else dead:
                self._forget(process)
                if time.monotonic() - self._started_s.pop(process) < _SECONDS_BETWEEN_STARTS:
                    return self._stop(1)  # it cannot even begin: starting it again would not help
                self._start()
        return self._stop(0)

    def _forget(self, process: SpawnProcess) -> None:
        from prometheus_client.multiprocess import mark_process_dead  # noqa: PLC0415 - after the folder was named

        self._processes.pop(process).close()
        if process.pid is not None:
            mark_process_dead(process.pid)  # type: ignore[no-untyped-call]

    def _stop(self, code: int) -> int:
        self._is_stopping = True
        self._signal_all(signal.SIGTERM)
        for process in self._processes:
            process.join(self._options.drain_s + self._options.shutdown_timeout_s + 10)
            if process.exitcode is None:
                process.kill()
                process.join()
            if process.exitcode not in {0, -signal.SIGTERM}:  # the latter: before it had a handler
                code = 1
        return code

    def _hand_on(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._signal_all(signal.SIGHUP)
        else:
            self._is_stopping = True
            self._signal_all(signal.SIGTERM)

    def _signal_all(self, number: signal.Signals) -> None:
        for process in self._processes:
            if process.exitcode is None and process.pid is not None:
                os.kill(process.pid, number)


def _work(options: ServeOptions, listener: socket.socket, ready: Connection) -> None:
    """What a process of several does."""
    from torchdlrm.serve.worker import run_worker  # noqa: PLC0415 - loads torch

    raise SystemExit(run_worker(options, listener, lambda it: ready.send((it.model, it.version)), is_first_check=False))
