"""Runs one process that serves: its event loop, its signals, its end.

In: a bundle, options and a listening socket.  Out: the exit code.  SIGTERM and SIGINT drain: readiness turns false,
requests are still answered, and after the last one the process ends with 0.  SIGHUP swaps the bundle, and so does a
link to it that is moved.
"""

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from multiprocessing import parent_process
from pathlib import Path
from typing import Final

import torch
import uvloop

from torchdlrm.errors import TorchDLRMError
from torchdlrm.serving.event_log import json_log, log_event, note_event
from torchdlrm.serving.front.app import build_app
from torchdlrm.serving.front.http_server import HttpServer
from torchdlrm.serving.front.open_inference.grpc import GrpcServer
from torchdlrm.serving.options import Listening, ServeOptions
from torchdlrm.serving.service.bundles import identity_of
from torchdlrm.serving.service.service import Service

_SWITCH_INTERVAL_S: Final = 0.0005


def run_worker(
    bundle: Path,
    options: ServeOptions,
    listener: socket.socket,
    ready: Callable[[Listening], None],
    *,
    is_checked: bool = False,
) -> int:
    """Serve until a signal says to stop; return the exit code.

    `listener` listens for HTTP, and `ready` is called when requests can be answered.  `is_checked` says that another
    process has just checked all of the bundle.

    Raises:
        BundleError: the bundle cannot be served.
        ConfigError: the port of gRPC cannot be had, or the log of predictions cannot be written.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # waits until there is a handler
    # A model whose threads must wait for a core that reads requests takes ten times as long as on fewer threads.
    torch.set_num_threads(options.num_threads or options.num_cores_of_model)
    # How long the loop may have to wait for the interpreter while the model's thread computes in Python.
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    with json_log(options.log_level):
        # The service alone knows the bundle: after a swap nothing else keeps the old one.
        service = Service(bundle, options, _notify_others, is_checked=is_checked)
        # What is loaded stays: the collector need not look at it again, least of all while a client waits.
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 50)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(service, listener, ready))
    return 0


def _notify_others() -> None:
    parent = parent_process()
    if parent is not None and parent.pid is not None:
        os.kill(parent.pid, signal.SIGHUP)


async def _serve(service: Service, listener: socket.socket, ready: Callable[[Listening], None]) -> None:
    loop = asyncio.get_running_loop()
    options, parent = service.options, parent_process()
    host = f"[{options.host}]" if ":" in options.host else options.host
    rpc = None
    if options.grpc_port is not None:
        rpc = GrpcServer(service, f"{host}:{options.grpc_port}", share_port=options.workers > 1)
        await rpc.start()
    await service.start()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    if parent is not None:
        loop.add_reader(parent.sentinel, _parent_died, loop, parent.sentinel, stopping)
    swaps: set[asyncio.Task[None]] = set()

    def swap() -> None:
        task = loop.create_task(_reload(service))
        swaps.add(task)
        task.add_done_callback(swaps.discard)

    loop.add_signal_handler(signal.SIGHUP, swap)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    watching = [loop.create_task(service.watch())]
    if options.follow_s:
        watching.append(loop.create_task(service.follow()))
    http = HttpServer(build_app(service), options)
    await http.start(listener)
    served = service.bundles.current
    address = list(listener.getsockname()[:2])
    note_event("serving", pid=os.getpid(), model=service.name, **identity_of(served.bundle), address=address)
    if not options.api_keys and not ipaddress.ip_address(address[0]).is_loopback:
        msg = "all who can reach this address are answered; with `api_key_file` only those who have a key"
        log_event(logging.WARNING, "no API key", message=msg)
    url, grpc = f"http://{host}:{address[1]}", None if rpc is None else f"{host}:{rpc.port}"
    ready(Listening(url, grpc, service.name, served.version, served.bundle.period))
    await stopping.wait()
    service.is_draining = True
    note_event("draining")
    await asyncio.sleep(options.drain_s)
    endings = [http.stop(options.shutdown_timeout_s)]
    if rpc is not None:
        endings.append(rpc.stop(options.shutdown_timeout_s))
    await asyncio.gather(*endings)
    for task in watching:
        task.cancel()
    service.close()
    note_event("stopped")


async def _reload(service: Service) -> None:
    with contextlib.suppress(TorchDLRMError):  # is in the log
        await service.reload()


def _parent_died(loop: asyncio.AbstractEventLoop, sentinel: int, stopping: asyncio.Event) -> None:
    loop.remove_reader(sentinel)
    stopping.set()
