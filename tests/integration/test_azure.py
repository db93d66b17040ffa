"""Azure's blob storage keeps what S3 keeps: Azurite (`npm install -g azurite`), Microsoft's own emulator, says so."""

import base64
import datetime
import hashlib
import hmac
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest

from torchdlrm.files import publish_folder, remove_folder
from torchdlrm.storage import mirror, objects
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.places import located
from torchdlrm.storage.reading import open_to_read

AZURITE = shutil.which("azurite-blob")
# Every Azurite has this account and key.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
VERSION = "2021-08-06"
pytestmark = pytest.mark.skipif(AZURITE is None, reason="needs azurite-blob: npm install -g azurite")


@pytest.fixture
def container(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/{ACCOUNT}"
    command = [AZURITE, "--inMemoryPersistence", "--blobPort", str(port), "--silent", "--skipApiVersionCheck"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            make_container(address, "clicks")
            names = {"ACCOUNT_NAME": ACCOUNT, "ACCOUNT_KEY": KEY, "ENDPOINT": address}
            for name, value in names.items():
                monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
            monkeypatch.setenv("TORCHDLRM_CACHE", str(tmp_path / "cache"))
            yield "az://clicks"
        finally:
            server.kill()


def make_container(address, name):
    date = datetime.datetime.now(datetime.UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    fields = {"x-ms-date": date, "x-ms-version": VERSION, "Content-Length": "0"}
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{VERSION}\n/{ACCOUNT}/{ACCOUNT}/{name}"
    digest = hmac.new(base64.b64decode(KEY), f"{signed}\nrestype:container".encode(), hashlib.sha256).digest()
    fields["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    request = urllib.request.Request(f"{address}/{name}?restype=container", method="PUT", headers=fields)
    for _ in range(200):
        try:
            return urllib.request.urlopen(request).close()
        except (ConnectionError, urllib.error.URLError):
            time.sleep(0.05)  # it is starting
    pytest.fail("Azurite does not answer")


def test_azure_keeps_what_a_bucket_must(container):
    first = objects.write(f"{container}/current", b"1", create=True)
    with pytest.raises(ChangedError):
        objects.write(f"{container}/current", b"2", create=True)
    second = objects.write(f"{container}/current", b"2", replacing=first)
    with pytest.raises(ChangedError):
        objects.write(f"{container}/current", b"3", replacing=first)
    assert objects.read_if_changed(f"{container}/current", second) is None
    assert objects.listed(container)["current"] == objects.stat(f"{container}/current")

    folder, content = located(f"{container}/run"), os.urandom(20 << 20)
    work = folder.with_name(".run.partial")
    work.mkdir(parents=True)
    (work / "weights").write_bytes(content)
    (work / "run.json").write_text("{}")
    publish_folder(work, folder, "run.json")
    with open_to_read(folder / "weights") as file:
        assert file.read() == content
    mirror.move(folder, located(f"{container}/other"), "run.json")
    (located(f"{container}/other") / "weights").unlink()
    assert (mirror.fetch(located(f"{container}/other")) / "weights").read_bytes() == content
    remove_folder(located(f"{container}/other"))
    assert [*objects.listed(container)] == ["current"]
