"""Runs a server of one process or many: one port, one bundle in memory.

In: options.  Out: the exit code.  With several processes, `supervisor.py` starts them and watches over them.
"""

import os
import socket
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from torchdlrm.errors import ConfigError
from torchdlrm.folders import kind_of
from torchdlrm.serving.front.access import read_api_keys
from torchdlrm.serving.options import Listening, ServeOptions
from torchdlrm.serving.supervisor import Supervisor
from torchdlrm.storage.mirror import LINK_NAME
from torchdlrm.storage.places import located


def serve(
    bundle: str | Path,
    *,
    options: ServeOptions = ServeOptions(),  # noqa: B008 - frozen
    started: Callable[[Listening], None] = lambda _: None,
) -> int:
    """Serve a bundle over HTTP and gRPC until SIGTERM or SIGINT; call it in the main thread.

    The process is the server's until then: it handles SIGTERM, SIGINT and SIGHUP (which swaps the bundle), sets how
    many threads PyTorch and Polars have, how often Python collects garbage and switches threads, and writes all that is
    logged as lines of JSON on standard error.  With several workers, the script that calls it must do so under
    `if __name__ == "__main__":`, because each worker imports it.

    Args:
        bundle: the bundle's folder, a symbolic link to one, or a live model, or the URL of any of these: what the link
            leads to, and the live model publishes, is served from then on.
        options: of the server.
        started: is called once all processes can answer requests.

    Returns:
        The exit code: 0 after a signal, 1 when a process failed.

    Raises:
        ConfigError: the options do not go together, there is no API key where one should be, or an address is taken.
        BundleError: the bundle cannot be served.
    """
    bundle = located(bundle)
    if (kind := kind_of(bundle)) is not None and kind.name == "live model":
        bundle /= LINK_NAME
    options.check()
    options = replace(options, api_keys=options.api_keys or read_api_keys(options.api_key_file))
    # Read when Polars loads: one row is not worth many threads, and those of several processes would fight.
    os.environ.setdefault("POLARS_MAX_THREADS", str(options.num_cores_of_model))
    with ExitStack() as sockets:
        listener = sockets.enter_context(_bound(options.host, "`port`", options.port, socket.SO_REUSEADDR))
        listener.setblocking(False)  # noqa: FBT003 - the name of the call says it
        if options.grpc_port:
            # Before the bundle is read, which takes longer.  Workers share the port, and would share that of another
            # server too: only here is it noticed.
            _bound(options.host, "`grpc_port`", options.grpc_port, socket.SO_REUSEADDR).close()
        if options.workers == 1:
            from torchdlrm.serving.worker import run_worker  # noqa: PLC0415 - loads torch

            return run_worker(bundle, options, listener, started)
        if options.grpc_port is not None:
            # Keeps the port for all workers: 0 is any that is free.
            holder = _bound(options.host, "`grpc_port`", options.grpc_port, socket.SO_REUSEPORT, listens=False)
            options = replace(options, grpc_port=sockets.enter_context(holder).getsockname()[1])
        return Supervisor(bundle, options, listener).run(started)


def _bound(host: str, name: str, port: int, option: int, *, listens: bool = True) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with ExitStack() as on_failure:
            bound = on_failure.enter_context(socket.socket(family))
            bound.setsockopt(socket.SOL_SOCKET, option, 1)
            bound.bind(address)
            if listens:
                bound.listen(2048)
            on_failure.pop_all()
    except OSError as error:
        msg = f"`host` {host} {name} {port}: cannot listen there: {error.strerror or error}; choose another"
        raise ConfigError(msg) from error
    return bound
