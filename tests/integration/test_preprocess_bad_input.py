"""Whatever is wrong with a log: exit code 2 or a counted bad row, and a message that says where."""

import gzip
import lzma
import os
import shutil
import signal
import subprocess
import sys
import threading

import pyarrow as pa
import pytest

from helpers.command_server import DLRM, shared_server
from torchdlrm.errors import LogError
from torchdlrm.logs.find import find_files
from torchdlrm.preprocessing.preprocess import work_folder

GOOD = "\t".join(["1", *["3"] * 13, *["0000000a"] * 26]) + "\n"


def with_cell(column, cell):
    cells = GOOD.rstrip("\n").split("\t")
    cells[column] = cell
    return "\t".join(cells) + "\n"


def dlrm(*arguments, **options):
    return shared_server().run([DLRM, *arguments], **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "log: the file is empty"),
        (gzip.compress(GOOD.encode() * 5000)[:-30], "log: the gzip stream is damaged or cut off"),
        (gzip.compress(GOOD.encode() * 500) + b"rubbish", "log: the gzip stream is damaged or cut off"),
        (pa.compress(GOOD.encode() * 5000, "zstd", asbytes=True)[:-30], "log: the zstd stream is damaged or cut off"),
        (b"PAR1 no parquet", "log: the Parquet file cannot be read"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "log").write_bytes(content)
    done = dlrm("preprocess", tmp_path / "log", "--out", tmp_path / "dataset")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path):
    from torchdlrm.errors import LogError
    from torchdlrm.features.schema import criteo_schema
    from torchdlrm.preprocessing.preprocess import preprocess
    from torchdlrm.progress import SilentProgress

    log = tmp_path / "log"
    log.write_bytes(GOOD.encode() * 5000)

    class Appends(SilentProgress):
        def start_phase(self, name, *_):
            if name == "read":
                with log.open("ab") as file:
                    file.write(GOOD.encode())

    with pytest.raises(LogError, match="log: the file changed while it was read"):
        preprocess([log], tmp_path / "dataset", criteo_schema(), progress=Appends())


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_told_and_the_job_goes_on_when_there_is_room(dlrm, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(with_cell(14, f"{i:08x}").encode() for i in range(20_000)))
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=7m", "tmpfs", small], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        # The log is 5 MB, so that the check before the work passes; a file that comes later takes the room.
        ballast = small / "ballast"
        ballast.write_bytes(bytes(5_800_000))
        done = dlrm("preprocess", log, "--out", small / "dataset")
        assert done.returncode == 1, done.stderr  # it may be tried again
        assert "MB free, and the job needs up to " in done.stderr
        code = (
            "from torchdlrm.preprocessing import preprocess as module; module.check_disk = lambda *_: None;"
            "from torchdlrm.cli.main import main; main()"
        )
        command = [sys.executable, "-c", code, "preprocess", log, "--out", small / "dataset"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1, done.stderr
        assert "failed: " in done.stderr
        assert "the disk is full; make room and give the same command again" in done.stderr
        assert "Traceback" not in done.stderr
        assert work_folder(small / "dataset").exists()
        ballast.unlink()
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["umount", small], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_is_done_and_says_so(number, tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"".join(with_cell(14, f"{i:08x}").encode() for i in range(150_000)))
    command = [DLRM, "preprocess", log, "--out", tmp_path / "dataset"]
    job = shared_server().start(command, stderr=subprocess.PIPE)
    chunks = work_folder(tmp_path / "dataset") / "chunks"
    looking = threading.Event()
    while not (chunks.is_dir() and any(chunks.iterdir())):
        assert job.poll() is None
        looking.wait(0.002)
    job.send_signal(number)
    _, told = job.communicate(timeout=60)
    assert job.returncode == 130, told
    assert "is kept in" in told
    assert "the same command resumes it" in " ".join(told.split())
    assert "Traceback" not in told
    done = dlrm("preprocess", log, "--out", tmp_path / "dataset")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("xzcat") is None, reason="needs xzcat")
def test_a_packed_file_becomes_a_log_by_the_command_that_is_told(tmp_path):
    path = tmp_path / "a log.xz"
    path.write_bytes(lzma.compress(b"1\t2\n"))
    with pytest.raises(LogError, match="is packed by xz") as caught:
        find_files([path])
    subprocess.run(["sh", "-c", str(caught.value).partition("this makes one: ")[2]], check=True)
    made = tmp_path / "a log.xz.gz"
    assert gzip.decompress(made.read_bytes()) == b"1\t2\n"
    assert find_files([made])[0].packing == "gzip"
