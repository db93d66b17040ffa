"""A Dask cluster of separate processes on this machine."""

import os
import re
import subprocess
from contextlib import contextmanager

from distributed.cli import dask_scheduler, dask_worker

from helpers.command_server import shared_server

WORKER = [dask_worker.__file__, "--nthreads", "1", "--no-nanny", "--no-dashboard"]


@contextmanager
def running_cluster(folder, num_workers=2, *, apart=False):
    """The address of a scheduler, its workers' processes and its own; `apart`, no worker sees another's cache."""
    environment = {**os.environ, "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "5"}
    command = [dask_scheduler.__file__, "--port", "0", "--no-dashboard", "--host", "127.0.0.1"]
    options = {"cwd": folder, "env": environment, "stderr": subprocess.PIPE}
    scheduler = shared_server().start(command, **options)
    address = next(found[0] for line in scheduler.stderr if (found := re.search(r"tcp://[\d.]+:\d+", line)))
    quiet = {**options, "stderr": subprocess.DEVNULL}
    workers = []
    for number in range(num_workers):
        if apart:
            quiet["env"] = {**os.environ, "TORCHDLRM_CACHE": str(folder / f"cache-{number}")}
        workers.append(shared_server().start([*WORKER, address], **quiet))
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        client.wait_for_workers(num_workers, timeout=60)
    try:
        yield address, workers, scheduler
    finally:
        for process in (*workers, scheduler):
            process.terminate()
            process.wait(timeout=30)
        scheduler.stderr.close()
