"""Defines the options of a server: those of `dlrm serve`, and what `serve` takes in Python."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from cyclopts.validators import Number

from torchdlrm.bundle import check_model_name
from torchdlrm.errors import ConfigError


def _split_names(_: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    return tuple(name.strip() for token in tokens for name in token.value.split(",") if name.strip())


Count = Annotated[int, Parameter(validator=Number(gte=1))]
Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]
Duration = Annotated[float, Parameter(validator=Number(gte=0))]
LongerThan0 = Annotated[float, Parameter(validator=Number(gt=0))]
Names = Annotated[
    tuple[str, ...], Parameter(converter=_split_names, n_tokens=1, negative="", metavar="NAME,NAME", show_default=False)
]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Where a bundle is served, and within which limits.

    Attributes:
        host: Address to listen on; 0.0.0.0 is open to the network.
        port: Port of HTTP; 0 takes a free one.
        grpc_port: Port of gRPC; without it there is none.
        workers: Processes; they share the port and the memory of the tables.
        name: What clients call the model; by default as the bundle does.
        model_class: The model class that the bundle was made with, FILE.py:NAME or MODULE:NAME; only where it is not
            the DLRM.
        allow_changed_model_class: Serve by the model class though its file has changed since.
        api_key_file: File of keys, one a line (# begins a comment), of which a request must bring one; else the
            variable DLRM_API_KEY, if it is set.
        api_keys: The keys themselves, in place of a file.
        allowed_hosts: Without a key, names that clients may use for this server besides its own, with commas between:
            of a proxy in front, for example. *.example.com is all names below, * is any.
        max_rows_per_request: A request with more rows is refused.
        max_body_bytes: A request with a longer body is refused.
        max_batch_rows: Rows that the model is given at once.
        max_queue_rows: Rows that may wait, in each process; further requests are refused, with the time to try again.
        max_concurrent_requests: Requests that are answered at the same time, in each process; beyond, they are refused
            likewise.
        deadline_ms: A request that is not answered by then is given up.
        header_timeout_s: How long a client may take to send the headers of a request.
        body_timeout_s: How long a client may take to send the body of a request, or to read an answer.
        keep_alive_s: How long a connection may be silent between requests.
        drain_s: After SIGTERM, how long to keep taking requests with readiness false, for load balancers to notice.
        shutdown_timeout_s: How long to wait then for requests that are not answered yet.
        log_predictions: Folder for Parquet files of all rows and their predictions, which `dlrm preprocess` reads.
        verify: full checks every byte before serving; lazy each block before its first use.
        follow_s: How often to look whether the bundle's symbolic link leads elsewhere, to serve that then; 0 for never:
            only SIGHUP and POST /admin/reload swap.
        num_threads: Threads of the model in each process; by default half of the cores that it has.
        log_level: Level of the log on standard error: info has a line for every request.
    """

    host: str = "127.0.0.1"
    port: Port = 8080
    grpc_port: Port | None = None
    workers: Count = 1
    name: str | None = None
    model_class: str | None = None
    allow_changed_model_class: Annotated[bool, Parameter(negative="")] = False
    api_key_file: Path | None = None
    api_keys: Annotated[tuple[str, ...], Parameter(parse=False)] = ()
    allowed_hosts: Names = ()
    max_rows_per_request: Count = 4096
    max_body_bytes: Count = 16 << 20
    max_batch_rows: Count = 2048
    max_queue_rows: Count = 16384
    max_concurrent_requests: Count = 128
    deadline_ms: LongerThan0 = 1000.0
    header_timeout_s: LongerThan0 = 10.0
    body_timeout_s: LongerThan0 = 30.0
    keep_alive_s: LongerThan0 = 75.0
    drain_s: Duration = 0.0
    shutdown_timeout_s: Duration = 30.0
    log_predictions: Path | None = None
    verify: Literal["full", "lazy"] = "full"
    follow_s: Duration = 1.0
    num_threads: Count | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"

    def check(self) -> None:
        """Check that the options go together.

        Raises:
            ConfigError: a limit leaves no room for what another one allows, or the name is none.
        """
        if self.name is not None:
            check_model_name(self.name)
        if self.max_queue_rows < self.max_rows_per_request:
            raise ConfigError(
                f"`max_queue_rows` {self.max_queue_rows}: a request may have {self.max_rows_per_request} rows "
                "(`max_rows_per_request`), which would never fit the queue; raise the one or lower the other"
            )

    @property
    def num_cores_of_model(self) -> int:
        """Half of the cores that each process has; the other half reads and writes requests."""
        return max(1, len(os.sched_getaffinity(0)) // self.workers // 2)


@dataclass(frozen=True)
class Listening:
    """The address of a server, and what it serves; `grpc` is None without gRPC, `period` where it is not known."""

    url: str
    grpc: str | None
    model: str
    version: str
    period: int | None
