"""Everything about a server that can be chosen; `dlrm serve` has an option for each."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torchdlrm.bundle.model_name import check_model_name
from torchdlrm.errors import ConfigError

LogLevel = Literal["debug", "info", "warning", "error"]


def threads_of_model(workers: int) -> int:
    """Half of the cores that each of so many processes has; the other half reads and writes requests."""
    return max(1, len(os.sched_getaffinity(0)) // workers // 2)


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What a server serves, where, and within which limits.

    Attributes:
        bundle: folder of the bundle, or a symbolic link to it, which may be moved for a swap.
        host, port: where HTTP is listened to; port 0 takes a free one.
        grpc_port: where gRPC is listened to; None: nowhere.
        workers: processes.
        name: what clients call the model; None: as the bundle does.
        api_keys: one of them must come with a request, if there are any.
        allowed_hosts: names by which a server without a key may be asked beside its own; `*.example.com` and `*` too.
        max_rows_per_request: a request with more is refused.
        max_body_bytes: a body with more is refused.
        max_batch_rows: what the model gets at once.
        max_queue_rows: what may wait for the model, in each process.
        max_concurrent_requests: what may be under way at once, in each process.
        deadline_ms: a request that is not answered by then is given up.
        header_timeout_s, body_timeout_s, keep_alive_s: how long a client may take to send headers, to send a body or
            take an answer, and may keep a silent connection.
        drain_s: how long the server goes on taking requests after SIGTERM, with readiness false.
        shutdown_timeout_s: how long it then waits for requests under way.
        log_predictions: folder for Parquet files of requests and predictions; None: none are kept.
        verify: whether all of the bundle is checked before it is served, or each block before its first use.
        num_threads: of the model, in each process.
        log_level: what is logged; `info` has a line for every request.
    """

    bundle: Path
    host: str = "127.0.0.1"
    port: int = 8080
    grpc_port: int | None = None
    workers: int = 1
    name: str | None = None
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_rows_per_request: int = 4096
    max_body_bytes: int = 16 << 20
    max_batch_rows: int = 2048
    max_queue_rows: int = 16384
    max_concurrent_requests: int = 128
    deadline_ms: float = 1000.0
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    keep_alive_s: float = 75.0
    drain_s: float = 0.0
    shutdown_timeout_s: float = 30.0
    log_predictions: Path | None = None
    verify: Literal["full", "lazy"] = "full"
    num_threads: int | None = None
    log_level: LogLevel = "info"

    def check(self) -> None:
        """See that the options go together.

        Raises:
            ConfigError: a limit leaves no room for what another one allows, or the name is none.
        """
        if self.name is not None:
            check_model_name(self.name)
        if self.max_queue_rows < self.max_rows_per_request:
            msg = (
                f"--max-queue-rows {self.max_queue_rows}: a request may have {self.max_rows_per_request} rows "
                "(--max-rows-per-request), which would never fit the queue; raise the one or lower the other"
            )
            raise ConfigError(msg)
