"""Run a function in one process or in many, through torch's elastic launcher."""

import uuid
from collections.abc import Callable
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torchdlrm.errors import TrainingError
from torchdlrm.train.process_group import hush_engines


def launch(entrypoint: Callable[..., Any], *args: object, nproc_per_node: int) -> Any:
    """Call `entrypoint(*args)` in `nproc_per_node` new processes on this host, or right here when that is 1.

    Args:
        entrypoint: a function of a module; the processes import it. Its result must be picklable.
        args: picklable arguments.
        nproc_per_node: number of processes.

    Returns:
        What the entrypoint returned on rank 0.

    Raises:
        TrainingError: a process failed; the message names the rank and why.
    """
    if nproc_per_node == 1:
        return entrypoint(*args)
    hush_engines()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=nproc_per_node,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        results = elastic_launch(config, entrypoint)(*args)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        msg = f"process {rank} of {nproc_per_node} failed: {failure.message}"
        raise TrainingError(msg) from error
    return results[0]
