"""Connections of this process, to a small app: what they keep of a client, and how long they wait for it."""

import asyncio
import contextlib
import gc
import socket
import struct
import weakref

import pytest
import uvloop

from torchdlrm.serving.front.http_server import HttpServer
from torchdlrm.serving.front.reader import END, RequestReader
from torchdlrm.serving.options import ServeOptions

GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
CONTENT = b"x" * 100_000
NOW = struct.pack("ii", 1, 0)  # close without taking leave


def run(scenario, *, send_bytes=None, **times):
    """Runs a scenario(server, connect, go): the app answers with `CONTENT` once `go` is set, which it is."""

    async def main():
        go, loop = asyncio.Event(), asyncio.get_running_loop()
        go.set()

        async def app(scope, receive, send):
            if scope["method"] == "POST":
                await receive()
            await go.wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": CONTENT})

        listener = socket.create_server(("127.0.0.1", 0))
        server = HttpServer(app, ServeOptions(**times))
        await server.start(listener)
        if send_bytes is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)

        async def connect(receive_bytes=None):
            client = socket.socket()
            if receive_bytes is not None:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
            client.settimeout(0)
            await loop.sock_connect(client, listener.getsockname())
            return client

        try:
            await scenario(server, connect, go)
        finally:
            await server.stop(0)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(asyncio.wait_for(main(), 30))


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


def test_clients_that_leave_before_their_answers_are_forgotten():
    async def scenario(server, connect, go):
        go.clear()
        clients = [await connect() for _ in range(20)]
        for client in clients:
            client.send(GET)
        await until(lambda: len(server.open) == 20 and not server.waiting)
        for client in clients:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
            client.close()
        await until(lambda: not server.open)
        go.set()
        with contextlib.closing(await connect()) as last:
            last.send(GET)
            await asyncio.get_running_loop().sock_recv(last, 1 << 16)
            assert len(server.waiting) == len(server.open) == 1, "the last one"

    run(scenario)


def test_nothing_of_a_connection_waits_for_the_collector():
    async def scenario(server, connect, go):
        gone = []
        gc.disable()
        try:
            for sent in (GET, GET[:-2], b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n[", b"garbage\r\n"):
                go.clear()
                client = await connect()
                client.send(sent)
                await until(lambda: server.open)
                gone.append(weakref.ref(next(iter(server.open))))
                await asyncio.sleep(0.02)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NOW)
                client.close()
                await until(lambda: not server.open)
                go.set()
            await until(lambda: [connection() for connection in gone] == [None] * 4)
        finally:
            gc.enable()

    run(scenario)


@pytest.mark.slow
def test_who_takes_its_answers_slowly_but_one_after_another_is_not_cut_off():
    num_requests = 40

    async def scenario(_server, connect, _go):
        loop, num_bytes, started_s = asyncio.get_running_loop(), 0, asyncio.get_running_loop().time()
        with contextlib.closing(await connect(receive_bytes=4096)) as client:
            client.send(GET * num_requests)
            while num_bytes < len(CONTENT) * num_requests:
                piece = await loop.sock_recv(client, 20_000)
                assert piece, "cut off"
                num_bytes += len(piece)
                await asyncio.sleep(0.005)
        assert loop.time() - started_s > 3, "longer than one answer may take"

    run(scenario, send_bytes=8192, body_timeout_s=2)


def test_who_takes_a_byte_now_and_then_is_cut_off():
    async def scenario(server, connect, _go):
        loop, started_s = asyncio.get_running_loop(), asyncio.get_running_loop().time()
        with contextlib.closing(await connect(receive_bytes=4096)) as client:
            client.send(GET * 60)
            with contextlib.suppress(ConnectionError):
                while await loop.sock_recv(client, 100):
                    await asyncio.sleep(0.05)
            assert 0.6 < loop.time() - started_s < 5
        assert not server.open

    run(scenario, send_bytes=8192, body_timeout_s=0.7)


def test_pieces_of_a_byte_wait_where_they_are_counted_and_none_is_lost():
    """So that reading pauses: a client of many tiny chunks neither fills the memory nor takes the turns of others."""
    reader, chunk = RequestReader(), b"1\r\na\r\n"
    reader.feed(b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + 10 * chunk)
    reader.next_event()
    reader.feed(20_000 * chunk + b"0\r\n\r\n" + GET)
    body = reader.next_event()
    assert reader.num_waiting > 20_000 * len(chunk)
    while (event := reader.next_event()) is not END:
        body += event
    assert body == 20_010 * b"a"
    assert reader.next_event().method == b"GET"


@pytest.mark.parametrize("expected", [b"100-continue", b"100-Continue"])
def test_a_client_that_waits_before_its_body_is_asked_for_it(expected):
    async def scenario(_server, connect, _go):
        with contextlib.closing(await connect()) as client:
            client.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nExpect: %b\r\n\r\n" % expected)
            answer = await asyncio.get_running_loop().sock_recv(client, 1 << 16)
            assert answer == b"HTTP/1.1 100 Continue\r\n\r\n"

    run(scenario)
