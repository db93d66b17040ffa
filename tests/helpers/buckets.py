"""A real S3 server on the loopback interface, and a proxy before it that is as far away, slow or faulty as asked.

with s3_server() as server, far_away(server, latency_s=0.02) as faults:
    environment = faults.environment       # for commands; `server.environment` is without faults
    faults.busy = 0.05                     # 5 % of the requests from now on are answered 503
"""

import asyncio
import random
import subprocess
import sys
import threading
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from torchdlrm.storage import objects

BUCKET = "clicks"
_SERVER = """
import logging, sys
logging.getLogger("werkzeug").setLevel(logging.CRITICAL)
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


def environment_of(port, cache=None):
    """What a client of a server on this port needs; `cache` is the host's cache folder."""
    found = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "tested-secret",
        "AWS_REGION": "us-east-1",
    }
    return found if cache is None else found | {"TORCHDLRM_CACHE": str(cache)}


@dataclass
class S3Server:
    """A server of its own process."""

    port: int

    @property
    def environment(self):
        return environment_of(self.port)

    def make_bucket(self, name=BUCKET):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/{name}", method="PUT")
        urllib.request.urlopen(request).close()
        return f"s3://{name}"


@contextmanager
def s3_server():
    command = [sys.executable, "-c", _SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            server = S3Server(int(process.stdout.readline()))
            server.make_bucket()
            yield server
        finally:
            process.kill()


@dataclass
class Faults:
    """What goes wrong with requests from now on, and which came.

    Attributes:
        latency_s: before each answer.
        bytes_per_s: of all answers and all bodies together; None without a limit.
        busy: the share of requests that are answered 503.
        cut: the share of answers that end in the middle.
        answer: (status, code) for all requests, such as (403, "AccessDenied").
        requests: "METHOD path" of each.
        ranges: (path, first byte, from the end where it is negative) of each request for a range.
    """

    port: int = 0
    latency_s: float = 0.0
    bytes_per_s: float | None = None
    busy: float = 0.0
    cut: float = 0.0
    answer: tuple | None = None
    requests: list = field(default_factory=list)
    ranges: list = field(default_factory=list)
    num_bytes: int = 0

    @property
    def environment(self):
        return environment_of(self.port)


class _Proxy:
    def __init__(self, server_port, faults, seed):
        self.server_port, self.faults, self.luck, self.free_at_s = server_port, faults, random.Random(seed), 0.0
        self.ready, self.serving = threading.Event(), set()

    async def run(self):
        listening = await asyncio.start_server(self.serve, "127.0.0.1", 0, limit=1 << 20)
        self.faults.port = listening.sockets[0].getsockname()[1]
        stopped, loop = asyncio.Event(), asyncio.get_running_loop()
        self.stop = lambda: loop.call_soon_threadsafe(stopped.set)
        self.ready.set()
        await stopped.wait()
        listening.close()
        for task in self.serving:
            task.cancel()
        await asyncio.gather(*self.serving, return_exceptions=True)
        await asyncio.sleep(0.01)  # the loop closes sockets when it comes around

    async def serve(self, reader, writer):
        back, task = None, asyncio.current_task()
        self.serving.add(task)
        task.add_done_callback(self.serving.discard)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            self.faults.requests.append(" ".join(lines[0].split(" ")[:2]))
            fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)}
            if "range" in fields:
                first, _, last = fields["range"].removeprefix("bytes=").partition("-")
                self.faults.ranges.append((lines[0].split(" ")[1], int(first) if first else -int(last)))
            if "expect" in fields:
                writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            body = await reader.readexactly(int(fields.get("content-length", 0)))
            await asyncio.sleep(self.faults.latency_s)
            answer = (503, "SlowDown") if self.luck.random() < self.faults.busy else self.faults.answer
            if answer is not None:
                text = f"<Error><Code>{answer[1]}</Code><Message>{answer[1]} it is</Message></Error>"
                start = f"HTTP/1.1 {answer[0]} No\r\nContent-Length: {len(text)}\r\nConnection: close\r\n\r\n"
                writer.write((start + text).encode())
                await writer.drain()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self.server_port)
            kept = [line for line in lines[1:-2] if not line.lower().startswith(("connection:", "expect:"))]
            back.write("\r\n".join([lines[0], *kept, "Connection: close", "", ""]).encode("latin-1"))
            await self.throttled(back, body)
            await self.answer(there, writer)
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            for stream in (writer, back):
                if stream is not None:
                    stream.close()
                    with suppress(ConnectionError, asyncio.CancelledError):
                        await stream.wait_closed()

    async def answer(self, there, writer):
        left = self.luck.randrange(1, 1 << 18) if self.luck.random() < self.faults.cut else None
        while data := await there.read(1 << 18 if left is None else left):
            await self.throttled(writer, data)
            if left is not None and (left := left - len(data)) <= 0:
                return

    async def throttled(self, writer, data):
        loop = asyncio.get_running_loop()
        for at in range(0, len(data), 1 << 16):
            piece = data[at : at + (1 << 16)]
            self.faults.num_bytes += len(piece)
            if self.faults.bytes_per_s:
                self.free_at_s = max(self.free_at_s, loop.time()) + len(piece) / self.faults.bytes_per_s
                await asyncio.sleep(self.free_at_s - loop.time())
            writer.write(piece)
            await writer.drain()


@contextmanager
def far_away(server, *, seed=0, **settings):
    """A proxy in a thread of this process; yields its `Faults`, which may be changed at any time."""
    faults = Faults(**settings)
    proxy = _Proxy(server.port, faults, seed)
    thread = threading.Thread(target=lambda: asyncio.run(proxy.run()), daemon=True)
    thread.start()
    assert proxy.ready.wait(10)
    try:
        yield faults
    finally:
        proxy.stop()
        thread.join(10)


def bytes_of(url):
    """The objects under a URL and their bytes, by key relative to it."""
    return {name: objects.read(f"{url}/{name}") for name in sorted(objects.listed(url))}
