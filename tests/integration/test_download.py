"""Downloads from a real HTTP server that drops connections."""

import hashlib
import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from torchdlrm.errors import ConfigError, LogError
from torchdlrm.logs.download import Source, download, parse_days
from torchdlrm.progress import SilentProgress


class Server(ThreadingHTTPServer):
    """Serves `files`; drops each connection after `drop_after` bytes while `drops` are left; notes the requests."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.drops = {}
        self.drop_after = 40_000
        self.ranges = True
        self.tags = {}
        self.requests = []

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server, name = self.server, self.path.lstrip("/")
        wanted = self.headers.get("Range")
        server.requests.append((name, wanted))
        content = server.files.get(name)
        if content is None:
            self.send_error(404)
            return
        tag = f'"{server.tags.get(name, 1)}"'
        start = 0
        if wanted and server.ranges and self.headers.get("If-Range") in (None, tag):
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if server.drops.get(name, 0):
            server.drops[name] -= 1
            self.wfile.write(content[start : start + server.drop_after])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def content(name, size=150_000):
    return hashlib.shake_256(name.encode()).digest(size)


def fetch(server, out, days=None, **options):
    return download(Source(server.base, "day_{day}.gz", 3), out, days, retry_after_s=0.0, **options)


def test_dropped_connections_go_on_where_they_stopped(server, tmp_path):
    server.files = {f"day_{day}.gz": content(str(day)) for day in range(3)}
    server.drops = {"day_0.gz": 2, "day_2.gz": 3}
    heard = []

    class Recorder(SilentProgress):
        def advance(self, amount, **_):
            heard.append(amount)

    files = fetch(server, tmp_path, progress=Recorder())
    assert [file.path.read_bytes() for file in files] == [content(str(day)) for day in range(3)]
    assert [wanted for name, wanted in server.requests if name == "day_0.gz"] == [None, "bytes=40000-", "bytes=80000-"]
    assert sum(heard) == 450_000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["day_0.gz", "day_1.gz", "day_2.gz"]


def test_what_is_there_is_not_fetched_again_and_a_later_run_goes_on(server, tmp_path):
    server.files = {f"day_{day}.gz": content(str(day)) for day in range(3)}
    server.drops = {"day_1.gz": 99}
    server.drop_after = 0
    with pytest.raises(LogError, match="no byte came in 2 attempts"):
        fetch(server, tmp_path, [1], attempts=2)
    server.drop_after, server.drops = 1000, {"day_1.gz": 1}
    fetch(server, tmp_path, [0, 1])
    server.requests.clear()
    fetch(server, tmp_path)
    assert [name for name, _ in server.requests] == ["sha256sums.txt", "day_2.gz"]


def test_halves_of_two_versions_are_never_put_together(server, tmp_path):
    server.files, server.drops = {"day_0.gz": content("old")}, {"day_0.gz": 9}
    server.drop_after = 50_000
    part, tag = tmp_path / "day_0.gz.part", tmp_path / "day_0.gz.part.etag"
    part.write_bytes(content("old")[:50_000])
    tag.write_text('"1"')
    server.files, server.tags, server.drops = {"day_0.gz": content("new")}, {"day_0.gz": 2}, {}
    (file,) = fetch(server, tmp_path, [0])
    assert file.path.read_bytes() == content("new")


def test_a_server_without_ranges_starts_anew(server, tmp_path):
    server.files, server.drops, server.ranges = {"day_0.gz": content("0")}, {"day_0.gz": 1}, False
    (file,) = fetch(server, tmp_path, [0])
    assert file.path.read_bytes() == content("0")


def test_a_part_that_is_whole_already_is_taken(server, tmp_path):
    server.files = {"day_0.gz": content("0")}
    (tmp_path / "day_0.gz.part").write_bytes(content("0"))
    (tmp_path / "day_0.gz.part.etag").write_text('"1"')
    (file,) = fetch(server, tmp_path, [0])
    assert file.path.read_bytes() == content("0")


def test_checksums_are_compared(server, tmp_path):
    wrong = "0" * 64
    server.files = {"day_0.gz": content("0"), "sha256sums.txt": f"{wrong} *day_0.gz\n".encode()}
    with pytest.raises(LogError, match=f"should be {wrong}"):
        fetch(server, tmp_path, [0])
    assert not (tmp_path / "day_0.gz").exists()


def test_the_command_fetches_the_days_from_the_address_that_was_given(server, tmp_path):
    server.files = {f"day_{day}.gz": content(str(day)) for day in (3, 5)}

    def dlrm(*arguments):
        command = [sys.executable, "-c", "from torchdlrm.cli.main import main; main()", "download", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = dlrm("criteo-1tb", "--days", "3,5", "--from", server.base, "--out", str(tmp_path), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["size_bytes"] == 300_000
    done = dlrm("criteo-1tb", "--days", "4", "--from", server.base, "--out", str(tmp_path))
    assert done.returncode == 2
    assert "day_4.gz: the server answers 404" in done.stderr
    for arguments in (
        ["criteo-1tb", "--days", "24"],
        ["criteo-kaggle", "--days", "1"],
        ["criteo-1tb", "--from", "ftp:x"],
    ):
        done = dlrm(*arguments, "--out", str(tmp_path))
        assert done.returncode == 2
        assert arguments[1] in done.stderr


def test_days_are_read_as_ranges():
    assert parse_days("0-2,23, 5", 24) == [0, 1, 2, 5, 23]
    for text in ("", "a", "1-", "3-1", "24"):
        with pytest.raises(ConfigError, match="`days`"):
            parse_days(text, 24)
