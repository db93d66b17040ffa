"""The groups of ranks within a host and across hosts, which TorchRec makes for tables that are cut within a host.

It makes them once for the whole process, with torch's default timeout: 10 minutes for NCCL and 30 for gloo.
"""

from datetime import timedelta

from torch import distributed as dist
from torchrec.distributed import comm


def set_timeout_of_host_groups(timeout_s: float) -> None:
    """Give these groups, where there are any, the timeout of the run, in seconds."""
    for group in (comm._INTRA_PG, comm._CROSS_PG):
        if group is not None:
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)


def forget_host_groups() -> None:
    """Let TorchRec make new ones: those of a group that has ended have ended with it."""
    comm._INTRA_PG = comm._CROSS_PG = None
