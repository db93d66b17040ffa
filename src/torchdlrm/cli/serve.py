"""`dlrm serve`: a bundle -> predictions over HTTP and gRPC, until stopped."""

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from torchdlrm.cli.options import Json
from torchdlrm.cli.terminal import console, print_json
from torchdlrm.folders import expect, kind_of
from torchdlrm.serving.options import ServeOptions

if TYPE_CHECKING:
    from torchdlrm.serving.options import Listening


def serve(
    bundle: Path,
    *,
    options: ServeOptions = ServeOptions(),  # noqa: B008 - frozen, and what the parser fills
    as_json: Annotated[
        Json, Parameter(help="Print one JSON object on standard output once it takes requests.")
    ] = False,
) -> None:
    """Serve a bundle: Open Inference Protocol v2, POST /predict, a page at /, /metrics; follows a moved link.

    SIGTERM drains, SIGHUP loads the bundle again.

    Args:
        bundle: Folder written by `dlrm export`, a symbolic link to one, or a live model: when the link is moved, what
            it leads to is served, by deltas in memory where they lie next to it.
    """
    found = kind_of(bundle)
    if found is None or found.name not in {"delta", "live model"}:  # a delta where its base lies beside it
        expect("bundle", bundle)
    # Until the server has handlers of its own it has begun nothing, and may end as any program does.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})  # to swap: waits until there is something to swap
    from torchdlrm.serving.server import serve as serve_until_stopped

    def started(at: "Listening") -> None:
        if console.is_terminal:  # elsewhere readers of the log expect JSON alone
            period = "" if at.period is None else f", period {at.period},"
            grpc = f", gRPC at {at.grpc}" if at.grpc else ""
            console.print(f"{at.model} {at.version}{period} at {at.url}{grpc}")
        if as_json:
            print_json({**asdict(at), "pid": os.getpid()})

    sys.exit(serve_until_stopped(bundle, options=options, started=started))
