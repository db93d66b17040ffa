"""A server whose bundle's files are written to, removed, or copied again, or that is told to load what is crafted."""

import json
import os
import shutil
import time
from pathlib import Path

import httpx
import pytest

from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import WEIGHTS_NAME, BundleManifest
from torchdlrm.bundle.served_model import ServedModel
from torchdlrm.errors import BundleError
from torchdlrm.model import table_weight
from torchdlrm.prediction.predictor import Predictor

KEY = "correct horse battery staple"
ROW = [{"int_0": 3}]


@pytest.fixture
def live(small_bundle, tmp_path):
    """A folder of one's own that is served."""
    return shutil.copytree(small_bundle, tmp_path / "live")


@pytest.fixture
def client(live, serve):
    server = serve(live, DLRM_API_KEY=KEY)
    with httpx.Client(base_url=server.url, headers={"X-API-Key": KEY}, timeout=30) as client:
        client.server = server
        yield client


def overwrite(path, data):
    """Write into the file that is there, as `cp` does."""
    with path.open("r+b") as file:
        file.write(data)


def until(answer, status, limit_s=20):
    """PlanRequest again until an answer has that status, and give it."""
    started_s = time.monotonic()
    while (found := answer()).status_code != status:
        assert time.monotonic() - started_s < limit_s, found.text
    return found


@pytest.mark.parametrize("name", [WEIGHTS_NAME, "vocabulary/cat_3.index"])
def test_files_that_are_written_to_are_noticed_and_a_copy_is_loaded_again(client, live, small_bundle, name):
    before = client.post("/predict", json=ROW).json()["predictions"]
    overwrite(live / name, bytes(500_000)[: (live / name).stat().st_size // 2])
    told = until(lambda: client.post("/predict", json=ROW), 503)  # without anybody asking whether it is ready
    assert told.json()["error"].startswith("the model on this server is damaged, and nothing is predicted")
    assert client.get("/v2/health/ready").status_code == 503
    assert client.get("/v2/health/live").status_code == 200
    assert client.post("/admin/reload").status_code == 409
    assert client.get("/v2/health/ready").status_code == 503
    overwrite(live / name, (small_bundle / name).read_bytes())
    told = client.post("/admin/reload")
    assert told.json() == {"outcome": "swapped", "model": "small", "version": client.server.version}
    assert client.get("/v2/health/ready").status_code == 200
    assert client.post("/predict", json=ROW).json()["predictions"] == before
    assert client.post("/admin/reload").json()["outcome"] == "unchanged"
    (live / "vocabulary" / "cat_0.index").touch()
    assert client.get("/v2/health/ready").status_code == 503, "readiness itself looks at the files"
    code, log = client.server.stop()
    assert code == 0
    damaged = [line["message"] for line in log if line["event"] == "damaged"]
    assert [file in told for file, told in zip((Path(name).name, "cat_0.index"), damaged, strict=True)] == [True, True]
    assert all("written to while it is in use" in told for told in damaged)


def test_no_answer_is_made_of_what_was_written_over(client, live):
    """Not even before the server's next look: a file that is cut would end the process when a row is looked up."""
    assert client.post("/predict", json=ROW).status_code == 200
    for path in live.rglob("*.index"):
        os.truncate(path, 100)
    os.truncate(live / WEIGHTS_NAME, 100)
    assert client.post("/predict", json=ROW).status_code == 503
    assert client.get("/v2/health/ready").status_code == 503
    schema = client.get("/schema")
    assert (schema.status_code, len(schema.json()["examples"])) == (200, 3), "kept in memory"
    assert client.server.stop()[0] == 0


def test_what_is_written_while_rows_are_predicted_is_no_answer(live, monkeypatch):
    served = Predictor.open(live)
    rows = served.encode_requests([ROW])
    served.predict_undamaged(rows)
    logits = ServedModel.logits

    def meanwhile(model, encoded):
        (live / WEIGHTS_NAME).touch()
        return logits(model, encoded)

    monkeypatch.setattr(ServedModel, "logits", meanwhile)
    with pytest.raises(BundleError, match="written to while it is in use"):
        served.predict_undamaged(rows)


def test_files_that_are_removed_are_served_to_the_end(client, live, small_bundle):
    schema, before = client.get("/schema").json(), client.post("/predict", json=ROW).json()
    assert len(schema["examples"]) == 3
    shutil.rmtree(live)
    assert client.get("/v2/health/ready").status_code == 200
    assert client.post("/predict", json=ROW).json() == before
    assert client.get("/schema").json() == schema, "examples are kept in memory"
    shutil.copytree(small_bundle, live)
    assert client.get("/v2/health/ready").status_code == 200
    assert client.post("/admin/reload").json()["outcome"] == "swapped", "the files of the old one may be given back"


def test_a_crafted_bundle_does_not_take_the_server_down(client, live, small_bundle, tmp_path):
    """Its checksums are right, and a table of it lies before the file: to look a row up there would be a SIGSEGV."""
    before = client.post("/predict", json=ROW).json()
    bundle = Bundle.open(small_bundle)
    start, end = (place - 10**9 for place in bundle.weights.span(table_weight("cat_0")))
    data = (live / WEIGHTS_NAME).read_bytes()
    header_bytes = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + header_bytes])
    header[table_weight("cat_0")]["data_offsets"] = [start - 8 - header_bytes, end - 8 - header_bytes]
    text = json.dumps(header).encode().ljust(header_bytes + 4_096 // 64 * 64)
    crafted = shutil.copytree(small_bundle, tmp_path / "crafted")
    (crafted / WEIGHTS_NAME).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + header_bytes :])
    seal(crafted)
    shutil.rmtree(live)
    live.symlink_to(crafted)
    assert client.post("/admin/reload").status_code == 409
    assert client.post("/predict", json=ROW).json() == before
    assert client.get("/v2/health/ready").status_code == 200


def seal(folder):
    import hashlib

    data = (folder / WEIGHTS_NAME).read_bytes()
    manifest = BundleManifest.read(folder)
    digest = hashlib.sha256(data).hexdigest()
    record = manifest.files[WEIGHTS_NAME].model_copy(update={"size_bytes": len(data), "sha256": digest})
    blocks = [hashlib.sha256(data[at : at + 2**24]).hexdigest() for at in range(0, len(data), 2**24)]
    files = {**manifest.files, WEIGHTS_NAME: record}
    manifest = manifest.model_copy(update={"files": files, "block_sha256": tuple(blocks)}).sealed()
    (folder / "bundle.json").write_text(manifest.to_json(), encoding="utf-8")
