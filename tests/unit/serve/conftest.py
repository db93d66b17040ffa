"""The page's files on a server of their own: no model, no bundle."""

import socket
import threading
from typing import NamedTuple

import pytest
import uvicorn
from fastapi import FastAPI

from torchdlrm.serve.page_routes import page_router


class PageServer(NamedTuple):
    app: FastAPI
    url: str


@pytest.fixture(scope="module")
def page_server():
    app = FastAPI()
    app.include_router(page_router())
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield PageServer(app, f"http://127.0.0.1:{listener.getsockname()[1]}")
    server.should_exit = True
    thread.join(timeout=10)
    assert not thread.is_alive()
