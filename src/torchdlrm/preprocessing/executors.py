"""Runs the tasks: in threads of this process, or on the workers of a Dask cluster.

In: tasks, each a function and arguments that can be sent to another process.  Out: their results in the order of the
tasks, each noted in the work folder as soon as it is there.

Threads, not processes: nearly all the time is spent in Polars, PyArrow and NumPy, which run side by side in one
process; that process needs the memory of its libraries once, and no task outlives it when it is killed.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torchdlrm.errors import ConfigError
from torchdlrm.preprocessing.options import Resources
from torchdlrm.preprocessing.work_folder import Result, WorkFolder

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
    """

    executor: Executor
    capacity: int
    tasks_in_memory: int
    tasks_at_a_time: int
    cluster: str | None = None
    is_closed: Callable[[], bool] = lambda: False

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
                    future = self.executor.submit(task.function, *task.arguments)
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
def start_workers(resources: Resources) -> Iterator[Workers]:
    """Threads here, or the threads of a Dask cluster's workers.

    Raises:
        ConfigError: there is no such cluster, or Dask is not installed.
    """
    if resources.cluster is None:
        count = resources.num_workers
        with ThreadPoolExecutor(count, thread_name_prefix="preprocess") as threads:
            yield Workers(threads, count, count, count)
        return
    try:
        import distributed  # noqa: PLC0415 - an extra
    except ImportError as error:
        raise ConfigError("`cluster`: needs Dask; install it with: pip install 'torchdlrm[cluster]'") from error
    untyped: Any = distributed
    try:
        client = untyped.Client(resources.cluster, timeout=CONNECT_TIMEOUT_S, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        msg = f"`cluster`: no Dask scheduler answers at {resources.cluster} ({error}); start one with: dask scheduler"
        raise ConfigError(msg) from error
    with client:
        threads_of_workers = list(client.nthreads().values())
        if not threads_of_workers:
            msg = f"`cluster`: the scheduler at {resources.cluster} has no workers; start some with: dask worker"
            raise ConfigError(msg)
        # The executor goes first: it cancels what has not begun.
        with client.get_executor(retries=3, pure=False) as executor:
            count = sum(threads_of_workers)

            def is_closed() -> bool:
                return client.status in {"closing", "closed"}

            yield Workers(executor, count, max(threads_of_workers), count, resources.cluster, is_closed)
