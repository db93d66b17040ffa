"""A log that is packed by something else becomes one by the command that the message tells."""

import gzip
import lzma
import shutil
import subprocess

import pytest

from torchdlrm.errors import LogError
from torchdlrm.logs.find import find_files


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
