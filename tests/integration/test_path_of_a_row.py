"""The architecture page says through which files a served row goes: one real request is watched, call by call."""

import asyncio
import json
import re
import socket
import sys
import threading
from pathlib import Path

import uvloop

import torchdlrm
from torchdlrm.serving.front.app import build_app
from torchdlrm.serving.front.http_server import HttpServer
from torchdlrm.serving.options import ServeOptions
from torchdlrm.serving.service.service import Service

PACKAGE = Path(torchdlrm.__file__).parent
DOCUMENT = PACKAGE.parents[1] / "docs" / "architecture.md"


def files_of_a_request(bundle):
    """The files of the package in which a function runs from a client's connection to the last byte of its answer."""
    seen, is_watched = {}, False

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if is_watched and event == "call" and path.is_relative_to(PACKAGE):
            seen[path.relative_to(PACKAGE).as_posix()] = None

    async def main():
        nonlocal is_watched
        service = Service(bundle, ServeOptions(), lambda: None)
        await service.start()
        body = json.dumps(service.bundles.examples[0][:1]).encode()
        request = b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(body) + body
        listener = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(build_app(service), service.options)
        await server.start(listener)
        for number in range(3):
            is_watched = number == 2  # what the first ones load and compile is no part of the path
            reader, writer = await asyncio.open_connection(*listener.getsockname())
            writer.write(request)
            head = await reader.readuntil(b"\r\n\r\n")
            answer = json.loads(await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1])))
            assert len(answer["predictions"]) == 1
            writer.close()
        await server.stop(5)
        service.close()

    # In the model's thread too: there a row is predicted where the loop is busy.
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        uvloop.run(main())
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return list(seen)


def test_a_served_row_goes_through_the_files_that_the_page_names(small_bundle):
    section = DOCUMENT.read_text().partition("## The path of a served row\n")[2].partition("\n## ")[0]
    named = re.findall(r"^\| \d+\. \| `([\w/]+\.py)`", section, re.MULTILINE)
    seen = files_of_a_request(small_bundle)
    assert set(named) ^ set(seen) == set(), "the page and the path differ"
    assert f"{len(named)} files" in section
