"""A server that is abused: clients of its, good and bad, by HTTP and, frame by frame, by gRPC."""

import contextlib
import os
import select
import socket
import struct
import time

import httpx
import psutil

KEY = "correct horse battery staple"
KEY_BYTES = KEY.encode()
SCALE = int(os.environ.get("TORCHDLRM_ABUSE", "1"))
ROWS = b"[{}]"


class Abused:
    """A server with a key, and clients that know it and do not."""

    def __init__(self, running):
        host, port = running.url.removeprefix("http://").split(":")
        self.address, self.running = (host, int(port)), running
        self.process = psutil.Process(running.process.pid)
        self.good = httpx.Client(base_url=running.url, headers={"X-API-Key": KEY}, timeout=10)

    def connect(self, receive_bytes=None):
        connection = socket.socket()
        if receive_bytes is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        connection.settimeout(10)
        connection.connect(self.address)
        return connection

    def exchange(self, *pieces, is_half_closed=False):
        """What is answered to pieces, each a segment of its own, until the server closes: statuses, and all bytes."""
        with self.connect() as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for number, piece in enumerate(pieces):
                if number:  # the server has read what came before once it has answered somebody who came later
                    assert self.good.get("/v2/health/live").status_code == 200
                connection.sendall(piece)
            if is_half_closed:
                connection.shutdown(socket.SHUT_WR)
            answer = b"".join(iter(lambda: connection.recv(65536), b""))
        return [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]], answer

    def memory_mb(self):
        return self.process.memory_info().rss / 1e6

    def serves_others(self):
        """The best of several times that a client with a key waits: other work of the machine is not the server's."""
        times_s = []
        for path in ("/predict", "/v2/health/ready") * 3:
            started_s = time.monotonic()
            answer = self.good.post(path, content=ROWS) if path == "/predict" else self.good.get(path)
            assert answer.status_code == 200, answer.text
            times_s.append(time.monotonic() - started_s)
        return min(times_s) < 0.5


def until(condition, seconds):
    """Wait for something to become true."""
    started_s = time.monotonic()
    while not condition():
        assert time.monotonic() - started_s < seconds
        time.sleep(0.05)


def send_all_of(connection, data):
    """As much as the other side takes."""
    with contextlib.suppress(BlockingIOError, ConnectionError):
        return connection.send(data)
    return 0


def sent_until_cut(connection, data):
    """How many bytes the other side lets be sent before it cuts the connection, or a very large number."""
    num_bytes = 0
    with contextlib.suppress(ConnectionError):
        while num_bytes < 200e6 * SCALE:
            num_bytes += connection.send(data)
    return num_bytes


class Http2:
    """A client of HTTP/2 that begins calls of gRPC and does not end them, as no library lets one do.

    Args:
        address: of the server.
        answer_bytes: how much of each answer it takes.

    Attributes:
        answers: the headers that ended a call, by stream; the server writes its message in plain letters.
        is_closed: whether the server has closed the connection.
    """

    _DATA, _HEADERS, _SETTINGS, _PING, _WINDOW = 0, 1, 4, 6, 8

    def __init__(self, address, answer_bytes=65535):
        self._socket = socket.create_connection(address, timeout=10)
        self._socket.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(self._SETTINGS, struct.pack(">HI", 4, answer_bytes))
        self._received, self._window, self._windows, self._first_window = b"", 65535, {}, 65535
        self.answers, self.is_closed = {}, False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def call(self, stream, method, key, size):
        """Begin a call whose message will have so many bytes."""

        def field(name, value):
            return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value

        path = b"/inference.GRPCInferenceService/" + method
        headers = b"\x83\x86" + field(b":path", path) + field(b":authority", b"x")
        headers += field(b"content-type", b"application/grpc") + field(b"te", b"trailers") + field(b"x-api-key", key)
        self._windows[stream] = self._first_window
        self._send(self._HEADERS, headers, stream, flags=4)
        self.send(stream, b"\0" + struct.pack(">I", size))

    def send(self, stream, data):
        """How many bytes of the message are sent: as many as the server takes."""
        size = min(len(data), self._window, self._windows[stream], 16384)
        if size > 0 and stream not in self.answers:
            self._send(self._DATA, data[:size], stream)
            self._window -= size
            self._windows[stream] -= size
        return max(size, 0)

    def listen(self, seconds=0.0):
        """Take what the server says, if it says something within that time."""
        while not self.is_closed and select.select([self._socket], [], [], seconds)[0]:
            seconds, piece = 0.0, b""
            with contextlib.suppress(ConnectionError):
                piece = self._socket.recv(1 << 16)
            self.is_closed = not piece
            self._received += piece
            while len(self._received) >= 9 + (size := int.from_bytes(self._received[:3], "big")):
                kind, flags, stream = struct.unpack(">BBI", self._received[3:9])
                self._take(kind, flags, stream, self._received[9 : 9 + size])
                self._received = self._received[9 + size :]

    def _take(self, kind, flags, stream, payload):
        if kind == self._SETTINGS and not flags & 1:
            for name, value in struct.iter_unpack(">HI", payload):
                if name == 4:
                    self._windows = {
                        number: left + value - self._first_window for number, left in self._windows.items()
                    }
                    self._first_window = value
            self._send(self._SETTINGS, flags=1)
        elif kind == self._PING and not flags & 1:
            self._send(self._PING, payload, flags=1)
        elif kind == self._WINDOW and stream:
            self._windows[stream] += int.from_bytes(payload, "big")
        elif kind == self._WINDOW:
            self._window += int.from_bytes(payload, "big")
        elif kind == self._HEADERS:
            self.answers[stream] = payload

    def _send(self, kind, payload=b"", stream=0, flags=0):
        with contextlib.suppress(ConnectionError):
            self._socket.sendall(
                struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload
            )
