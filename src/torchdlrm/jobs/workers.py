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
from pathlib import Path
from typing import Any

from torchdlrm.errors import ConfigError, UserError
from torchdlrm.jobs.work_folder import Result, WorkFolder
from torchdlrm.storage.mirror import borrowing
from torchdlrm.storage.places import located, published_url, url_of, with_urls

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

    `tasks_at_a_time` are run, which are fewer where the memory asks for it.  `is_closed` says that no process is left
    to run them: the futures of a Dask client that has lost the scheduler of its `cluster` may be waited for forever.
    `ask_each` calls a function in each process of the cluster.
    """

    executor: Executor
    capacity: int
    tasks_in_memory: int
    tasks_at_a_time: int
    cluster: str | None = None
    is_closed: Callable[[], bool] = lambda: False
    ask_each: Callable[..., Mapping[str, Any]] = lambda *_: {}

    def run(self, tasks: Iterable[Task], work: WorkFolder, at_a_time: int | None = None) -> Iterator[Result]:
        """Run tasks that are not done yet; yields the results of all in their order.

        Args:
            tasks: the tasks; not one is started long before it can run.
            work: takes the results.
            at_a_time: most tasks at a time, where they need much memory.
        """
        limit = min(self.tasks_at_a_time, at_a_time or self.tasks_at_a_time)
        ahead = limit + _TASKS_AHEAD if limit == self.capacity else limit
        waiting: deque[Result | tuple[Task, Future[Result]]] = deque()
        running: dict[Future[Result], Task] = {}
        try:
            for task in tasks:
                done = work.result(task.key)
                if done is not None:
                    waiting.append(done)
                else:
                    while len(running) >= ahead:
                        self._collect(running, work)
                    future = self._submit(task, work)
                    running[future] = task
                    waiting.append((task, future))
                while waiting and (result := _result(waiting[0], work)) is not None:
                    waiting.popleft()
                    yield result
            while waiting:
                while (result := _result(waiting[0], work)) is None:
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
        local = [path for path in paths if published_url(path) is None]
        for worker, unseen in self.ask_each(_unseen, local).items():
            if unseen:
                msg = (
                    f"`cluster`: the worker at {worker} does not see {unseen[0]}; give what is read and `out` as URLs "
                    "of a bucket, or let all workers have these folders, under the same paths"
                )
                raise ConfigError(msg)

    def _submit(self, task: Task, work: WorkFolder) -> Future[Result]:
        if self.cluster is None:
            return self.executor.submit(task.function, *task.arguments)
        sent = io.BytesIO()
        _Sender(sent).dump((task.function, task.arguments, work.pieces))
        return self.executor.submit(_run_sent, sent.getvalue())

    def _collect(self, running: dict[Future[Result], Task], work: WorkFolder) -> None:
        """Wait for tasks and note their results; the first exception among them is raised when they are noted."""
        done: set[Future[Result]] = set()
        while not done:
            if self.is_closed():
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


class _Sender(pickle.Pickler):
    """A path that stands for a URL goes to a worker as that URL: the worker's cache may be another folder."""

    def reducer_override(self, value: Any) -> Any:
        url = url_of(value) if isinstance(value, Path) else None
        return NotImplemented if url is None else (located, (url,))


def _run_sent(sent: bytes) -> Result:
    """Run a task in a process of the cluster, which keeps nothing of the job's files."""
    function, arguments, pieces = pickle.loads(sent)  # noqa: S301 - Dask does the same
    try:
        with borrowing(pieces):
            return function(*arguments)
    except UserError as error:
        error.args = tuple(with_urls(arg) if isinstance(arg, str) else arg for arg in error.args)
        raise


def _unseen(paths: Iterable[Path]) -> list[Path]:
    return [path for path in paths if not path.exists()]


def _result(item: Result | tuple[Task, Future[Result]], work: WorkFolder) -> Result | None:
    return work.result(item[0].key) if isinstance(item, tuple) else item


def _note(
    done: Collection[Future[Result]], running: dict[Future[Result], Task], work: WorkFolder
) -> list[BaseException]:
    """Note the results of tasks that are done; the exceptions among them."""
    errors: list[BaseException] = []
    for future in [future for future in running if future in done]:
        task = running.pop(future)
        error = CancelledError(task.key) if future.cancelled() else future.exception()
        if error is None:
            work.record(task.key, future.result())
        else:
            errors.append(error)
    return errors


@contextmanager
def start_workers(count: int, cluster: str | None) -> Iterator[Workers]:
    """So many threads here, or the threads of a Dask cluster's workers.

    Raises:
        ConfigError: there is no such cluster, or Dask is not installed.
    """
    if cluster is None:
        with ThreadPoolExecutor(count, thread_name_prefix="job") as threads:
            yield Workers(threads, count, count, count)
        return
    try:
        import distributed  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("`cluster`: needs Dask; install it with: pip install 'torchdlrm[cluster]'") from error
    untyped: Any = distributed
    try:
        client = untyped.Client(cluster, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        msg = f"`cluster`: no Dask scheduler answers at {cluster} ({error}); start one with: dask scheduler"
        raise ConfigError(msg) from error
    with client:
        threads_of_workers = list(client.nthreads().values())
        if not threads_of_workers:
            msg = f"`cluster`: the scheduler at {cluster} has no workers; start some with: dask worker"
            raise ConfigError(msg)
        # The executor goes first: it cancels what has not begun.
        with client.get_executor(retries=3, pure=False) as executor:
            count = sum(threads_of_workers)

            def is_closed() -> bool:
                return client.status in {"closing", "closed"}

            yield Workers(executor, count, max(threads_of_workers), count, cluster, is_closed, client.run)
