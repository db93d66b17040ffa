"""`dlrm serve`: a bundle -> predictions over HTTP and gRPC, until somebody says stop."""

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.validators import Number

from torchdlrm.cli.terminal import Json, console, print_json

Count = Annotated[int, Parameter(validator=Number(gte=1))]
Port = Annotated[int, Parameter(validator=Number(gte=0, lte=65535))]
Duration = Annotated[float, Parameter(validator=Number(gte=0))]
LongerThan0 = Annotated[float, Parameter(validator=Number(gt=0))]


def serve(
    bundle: Path,
    *,
    host: str = "127.0.0.1",
    port: Port = 8080,
    grpc_port: Port | None = None,
    workers: Count = 1,
    name: str | None = None,
    api_key_file: Path | None = None,
    allowed_hosts: str = "",
    max_rows_per_request: Count = 4096,
    max_body_bytes: Count = 16 << 20,
    max_batch_rows: Count = 2048,
    max_queue_rows: Count = 16384,
    max_concurrent_requests: Count = 128,
    deadline_ms: LongerThan0 = 1000.0,
    header_timeout_s: LongerThan0 = 10.0,
    body_timeout_s: LongerThan0 = 30.0,
    keep_alive_s: LongerThan0 = 75.0,
    drain_s: Duration = 0.0,
    shutdown_timeout_s: Duration = 30.0,
    log_predictions: Path | None = None,
    verify: Literal["full", "lazy"] = "full",
    num_threads: Count | None = None,
    log_level: Literal["debug", "info", "warning", "error"] = "info",
    as_json: Json = False,
) -> None:
    """Serve a bundle: Open Inference Protocol v2, POST /predict, a page at /, /metrics; SIGTERM drains, SIGHUP swaps.

    Parameters
    ----------
    bundle
        Folder written by `dlrm export`, or a symbolic link to one: move it and send SIGHUP to serve another.
    host
        Address to listen to; 0.0.0.0 is open to the network.
    port
        Port of HTTP; 0 takes a free one.
    grpc_port
        Port of gRPC; without it there is none.
    workers
        Processes; they share the port and the memory of the tables.
    name
        What clients call the model; by default as the bundle does.
    api_key_file
        File of keys, one a line (# begins a comment), of which a request must bring one; else the variable
        DLRM_API_KEY, if it is set.
    allowed_hosts
        Without a key, names by which clients may ask beside this machine's own, with commas between: of a proxy in
        front, for example. *.example.com is all names below, * is any.
    max_rows_per_request
        A request with more rows is refused.
    max_body_bytes
        A request with a longer body is refused.
    max_batch_rows
        Rows that the model is given at once.
    max_queue_rows
        Rows that may wait, in each process; beyond, requests are refused and told when to come again.
    max_concurrent_requests
        Requests under way at once, in each process; beyond, they are refused likewise.
    deadline_ms
        A request that is not answered by then is given up.
    header_timeout_s
        How long a client may take to send the headers of a request.
    body_timeout_s
        How long a client may take to send the body of a request.
    keep_alive_s
        How long a connection may be silent between requests.
    drain_s
        After SIGTERM, how long to go on taking requests with readiness false, for load balancers to notice.
    shutdown_timeout_s
        How long to wait then for requests under way.
    log_predictions
        Folder for Parquet files of all rows and their predictions, which `dlrm preprocess` reads.
    verify
        full checks every byte before serving; lazy each block before its first use.
    num_threads
        Threads of the model in each process; by default half of the cores that it has.
    log_level
        Of the log on standard error: info has a line for every request.
    as_json
        Print one JSON object on standard output when requests can be sent.
    """
    # Until the server has handlers of its own it has begun nothing, and may end as any program does.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # to swap: waits until there is something to swap
    from torchdlrm.serving.api_keys import read_api_keys
    from torchdlrm.serving.options import ServeOptions, threads_of_model

    # Read when the library loads: one row is not worth many threads, and those of several processes would fight.
    os.environ.setdefault("POLARS_MAX_THREADS", str(threads_of_model(workers)))
    from torchdlrm.serving.server import Listening
    from torchdlrm.serving.server import serve as serve_until_stopped

    given = {key: value for key, value in locals().items() if key in ServeOptions.__dataclass_fields__}
    given["allowed_hosts"] = tuple(name.strip() for name in allowed_hosts.split(",") if name.strip())
    options = ServeOptions(**given, api_keys=read_api_keys(api_key_file))

    def started(at: Listening) -> None:
        if console.is_terminal:  # where it is not, whoever reads the log expects JSON alone
            console.print(f"{at.model} {at.version} at {at.url}" + (f", gRPC at {at.grpc}" if at.grpc else ""))
        if as_json:
            print_json({"url": at.url, "grpc": at.grpc, "model": at.model, "version": at.version, "pid": os.getpid()})

    sys.exit(serve_until_stopped(options, started))
