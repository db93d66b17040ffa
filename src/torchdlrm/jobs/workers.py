"""Runs the tasks: in threads of this process, or on the workers of a Dask cluster.

In: tasks, each a function and arguments that can be sent to another process.  Out: their results in the order of the
tasks, each noted in the work folder as soon as it is there.

Threads, not processes: nearly all the time is spent in Polars, PyArrow and NumPy, which run side by side in one
process; that process needs the memory of its libraries once, and no task outlives it when it is killed.
"""

import io
import pickle
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Semaphore
from typing import Any

from torchdlrm.errors import ConfigError, UserError
from torchdlrm.files import remove_folder
from torchdlrm.jobs.work_folder import Result, WorkFolder
from torchdlrm.storage.places import located, published_url, url_of, with_urls
from torchdlrm.storage.reading import place

# This number of tasks beyond those that run is handed over, so that no worker waits for the next.
_TASKS_AHEAD = 2
CONNECT_TIMEOUT_S = 10
_LOOK_EVERY_S = 2


@dataclass(frozen=True)
class Task:
    """A pure function of its arguments that leaves a file and returns a result; `key` names it in the journal."""

    key: str
    function: Callable[..., Result]
    arguments: tuple[Any, ...]


@dataclass
class Workers:
    """An executor, how many tasks it can run at a time, and how many of these share the memory that was given.

    `tasks_at_a_time` are run, which are fewer where the memory asks for it.  The futures of a Dask `client` that has
    lost the scheduler of its `cluster` may be waited for forever.
    """

    executor: Executor
    capacity: int
    tasks_in_memory: int
    tasks_at_a_time: int
    cluster: str | None = None
    client: Any = None

    def run(self, tasks: Iterable[Task], work: WorkFolder, at_a_time: int | None = None) -> Iterator[Result]:
        """Run tasks that are not done yet, none long before it can run; yields the results of all in their order.

        `work` takes the results; where tasks need much memory, there are at most so many `at_a_time`.
        """
        limit = min(self.tasks_at_a_time, at_a_time or self.tasks_at_a_time)
        ahead = limit + _TASKS_AHEAD if limit == self.capacity else limit
        waiting: deque[str] = deque()
        running: dict[Future[Any], Task] = {}
        try:
            for task in tasks:
                waiting.append(task.key)
                if work.result(task.key) is None:
                    while len(running) >= ahead:
                        self._collect(running, work)
                    running[self._submit(task)] = task
                while waiting and (result := work.result(waiting[0])) is not None:
                    waiting.popleft()
                    yield result
            while waiting:
                while (result := work.result(waiting[0])) is None:
                    self._collect(running, work)
                waiting.popleft()
                yield result
        finally:
            for future in running:
                future.cancel()
            # What runs on is let finish: it is minutes of work at most, and its result is not lost.
            wait([future for future in running if not future.cancelled()])
            _note({future for future in running if future.done()}, running, work)

    def require_to_see(self, paths: Iterable[Path]) -> None:
        """See that each process of the cluster has the files and folders that are at no URL; else ConfigError."""
        for worker, unseen in self.ask_each(_unseen, [*paths]).items():
            if unseen:
                raise ConfigError(
                    f"`cluster`: the worker at {worker} does not see {unseen[0]}; give what is read and `out` as URLs "
                    "of a bucket, or let all workers have these folders, under the same paths"
                )

    def ask_each(self, function: Callable[..., Any], *arguments: Any) -> Mapping[str, Any]:
        """What a function returns in each process of the cluster."""
        return {} if self.client is None else self.client.run(_run_sent, _sent(function, arguments), on_error="ignore")

    def forget(self, work: WorkFolder) -> None:
        """Remove what tasks, all of which are done, have left in a bucket and in the caches of their hosts."""
        if work.pieces != work.path:
            self.ask_each(remove_folder, work.pieces)

    def _submit(self, task: Task) -> Future[Any]:
        if self.client is None:
            return self.executor.submit(_run_in_place, task)
        return self.executor.submit(_run_sent, _sent(task.function, task.arguments))

    def _collect(self, running: dict[Future[Any], Task], work: WorkFolder) -> None:
        """Wait for tasks and note their results; the first exception among them is raised when they are noted."""
        done: set[Future[Any]] = set()
        while not done:
            if self.client is not None and self.client.status in {"closing", "closed"}:
                raise self._lost()
            done = wait(running, _LOOK_EVERY_S, return_when=FIRST_COMPLETED).done
        errors = _note(done, running, work)
        if errors:
            error = min(errors, key=lambda found: isinstance(found, CancelledError))
            raise self._lost() if isinstance(error, CancelledError) else error

    def _lost(self) -> ConfigError:
        return ConfigError(
            f"`cluster`: the scheduler at {self.cluster} is gone; the same command resumes the job, also on "
            "another cluster, or here without `cluster`"
        )


def _run_in_place(task: Task) -> Result:
    with place.get():
        return task.function(*task.arguments)


class _Sender(pickle.Pickler):
    """A path that stands for a URL goes to a worker as that URL: the worker's cache may be another folder."""

    def reducer_override(self, value: Any) -> Any:
        url = url_of(value) if isinstance(value, Path) else None
        return NotImplemented if url is None else (located, (url,))


def _sent(function: Callable[..., Any], arguments: tuple[Any, ...]) -> bytes:
    sent = io.BytesIO()
    _Sender(sent).dump((function, arguments))
    return sent.getvalue()


def _run_sent(sent: bytes) -> Any:
    """Call a function in a process of the cluster; what is wrong with a log is so wherever a task runs."""
    function, arguments = pickle.loads(sent)  # noqa: S301 - Dask does the same
    try:
        return function(*arguments)
    except UserError as error:
        return type(error)(with_urls(str(error)))


def _unseen(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if published_url(path) is None and not path.exists()]


def _note(done: Collection[Future[Any]], running: dict[Future[Any], Task], work: WorkFolder) -> list[BaseException]:
    """Note the results of tasks that are done; the exceptions among them."""
    errors: list[BaseException] = []
    for future in [future for future in running if future in done]:
        task = running.pop(future)
        found = CancelledError(task.key) if future.cancelled() else future.exception() or future.result()
        if isinstance(found, BaseException):
            errors.append(found)
        else:
            work.record(task.key, found)
    return errors


@contextmanager
def start_workers(count: int, cluster: str | None) -> Iterator[Workers]:
    """So many threads here, or the threads of a Dask cluster's workers.

    Raises:
        ConfigError: there is no such cluster, or Dask is not installed.
    """
    if cluster is None:
        # Threads beyond those that compute wait for what they read of a bucket, or for a place.
        with ThreadPoolExecutor(count + _TASKS_AHEAD, "job", place.set, (Semaphore(count),)) as threads:
            yield Workers(threads, count, count, count)
        return
    try:
        distributed: Any = import_module("distributed")  # an extra
    except ImportError as error:
        raise ConfigError("`cluster`: needs Dask; install it with: pip install 'torchdlrm[cluster]'") from error
    try:
        client = distributed.Client(cluster, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        msg = f"`cluster`: no Dask scheduler answers at {cluster} ({error}); start one with: dask scheduler"
        raise ConfigError(msg) from error
    with client:
        threads_of_workers = list(client.nthreads().values())
        if not threads_of_workers:
            raise ConfigError(f"`cluster`: the scheduler at {cluster} has no workers; start some with: dask worker")
        # The executor goes first: it cancels what has not begun.
        with client.get_executor(retries=3, pure=False) as executor:
            count = sum(threads_of_workers)
            yield Workers(executor, count, max(threads_of_workers), count, cluster, client)
