"""Bundles at URLs: opened, predicted with and served; a server follows a live model in a bucket."""

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import numpy as np
import pytest

from helpers.buckets import bytes_of, far_away
from helpers.live_bundles import rows_of, write_periods
from torchdlrm.bundle.apply import apply_delta
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import WEIGHTS_NAME, BundleManifest
from torchdlrm.errors import BundleError, StorageError
from torchdlrm.exporting.formats import export_as
from torchdlrm.prediction.predictor import Predictor
from torchdlrm.storage import mirror, objects
from torchdlrm.storage.places import located

ROWS = rows_of(20)


@pytest.fixture(scope="module")
def periods(tmp_path_factory):
    """A folder with the bundles of three periods and the deltas between them; not to be changed."""
    folder = tmp_path_factory.mktemp("periods")
    write_periods(folder, num_periods=3)
    return folder


def put(folder, url):
    """Write a folder's files to a bucket, as another host would: none of them is in this host's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            objects.write(f"{url}/{path.relative_to(folder)}", path.read_bytes())


@pytest.fixture
def far(s3, bucket, monkeypatch):
    """The faults of a proxy before the bucket, which this process and its commands now go through."""
    with far_away(s3) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.environment["AWS_ENDPOINT_URL"])
        yield faults


def test_a_bundle_at_a_url_predicts_as_its_copy_on_a_disk_does(bucket, far, periods):
    put(periods / "0001", f"{bucket}/bundle")
    far.requests.clear()
    with ThreadPoolExecutor() as threads:  # as the processes of a server do
        opened = list(threads.map(Predictor.open, [f"{bucket}/bundle"] * 3))
    fetched = [request for request in far.requests if request.startswith("GET") and "list-type" not in request]
    assert len(fetched) == len(bytes_of(f"{bucket}/bundle")), "each file once"
    wanted = Predictor.open(periods / "0001").predict(ROWS)
    assert all(np.array_equal(predictor.predict(ROWS), wanted) for predictor in opened)
    objects.write(f"{bucket}/model.onnx", b"another's")
    with pytest.raises(BundleError, match="is there already"):
        export_as(f"{bucket}/bundle", f"{bucket}/model.onnx", "onnx")


def test_a_damaged_object_is_named(bucket, periods):
    put(periods / "0001", f"{bucket}/bundle")
    weights = bytearray((periods / "0001" / WEIGHTS_NAME).read_bytes())
    weights[100] ^= 1
    objects.write(f"{bucket}/bundle/{WEIGHTS_NAME}", bytes(weights))
    with pytest.raises(BundleError, match=f"{WEIGHTS_NAME}: damaged: the sha256 of block 0"):
        Bundle.open(located(f"{bucket}/bundle"))
    objects.delete(f"{bucket}/bundle/bundle.json")
    with pytest.raises(BundleError, match=r"has no bundle\.json"):
        BundleManifest.read(located(f"{bucket}/bundle"))


def test_a_link_in_a_bucket_leads_to_a_bundle(bucket, periods):
    put(periods / "0002", f"{bucket}/live/bundles/0002")
    link = located(f"{bucket}/live/current")
    objects.write(f"{bucket}/live/current", b"bundles/0002")
    opened = Predictor.open(f"{bucket}/live/current")
    assert opened.bundle.period == 2
    assert opened.bundle.path == located(f"{bucket}/live/bundles/0002")
    assert str(link.readlink()) == "bundles/0002"
    mirror.fetch(link.parent)
    assert link.is_symlink(), "it is no file of the folder"
    for target in (b"../../x", b"/etc", b"current", b"current/x", b"a//b", b""):
        objects.write(f"{bucket}/live/current", target)
        with pytest.raises(StorageError, match=f"{bucket}/live/current: is no link"):
            mirror.fetch(link)


def publish(periods, url, period):
    """As a live model does: the bundle and its delta, then `current`."""
    for name in (f"{period:04}", f"{period:04}.delta"):
        put(periods / name, f"{url}/bundles/{name}")
    objects.write(f"{url}/current", f"bundles/{period:04}".encode())


def until(found, seconds=20):
    """What a function gives once it is true."""
    end_s = time.monotonic() + seconds
    while not (result := found()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return result


def test_a_server_follows_a_live_model_in_a_bucket_by_its_deltas(bucket, far, periods, serve, tmp_path):
    live = f"{bucket}/live"
    objects.write(f"{live}/live.toml", b"")
    publish(periods, live, 1)
    server = serve(live, "--follow-s", 0.1)
    cache = tmp_path / f"cache/{live.replace('://', '/')}"
    with httpx.Client(base_url=server.url) as client:

        def serves(period):
            return client.post("/predict", json=ROWS).json()["period"] == period

        assert serves(1)
        far.requests.clear()
        assert until(lambda: len(far.requests) >= 5)
        assert {request.partition("?")[0].rpartition("/")[2] for request in far.requests} == {"current"}, "alone"
        publish(periods, live, 2)
        assert until(lambda: serves(2))
        assert not (cache / "bundles/0002" / WEIGHTS_NAME).exists(), "the delta alone is fetched"
        far.answer = (400, "ExpiredToken")  # the old model is served, and the log and /metrics say why
        assert until(lambda: 'swaps_total{outcome="failed"} ' in client.get("/metrics").text)
        assert serves(2)
        far.answer = None
        objects.delete(*[f"{live}/bundles/0001/{name}" for name in bytes_of(f"{live}/bundles/0001")])  # by retention
        publish(periods, live, 3)
        assert until(lambda: serves(3))
        assert np.array_equal(
            np.float32(client.post("/predict", json=ROWS).json()["predictions"]),
            Predictor.open(periods / "0003").predict(ROWS),
        )
    assert sorted(path.name for path in (cache / "bundles").iterdir()) == ["0002", "0002.delta", "0003", "0003.delta"]
    code, log = server.stop()
    assert code == 0
    failed = [line["message"] for line in log if line["event"] == "swap failed"]
    assert len(failed) == 1, "once, not each second"
    assert failed[0].startswith(f"{live}/current: cannot be read: the credentials have expired")


def test_a_bundle_that_a_killed_process_had_begun_to_publish_is_finished(bucket, periods, tmp_path):
    for name in ("0001", "0002.delta"):
        put(periods / name, f"{bucket}/{name}")
    made = [f"{bucket}/0001", f"{bucket}/0002.delta", f"{bucket}/0002"]
    apply_delta(*made, progress=False)
    files = [path for path in (periods / "0002").rglob("*") if path.is_file()]
    wanted = {path.relative_to(periods / "0002").as_posix(): path.read_bytes() for path in files}
    assert bytes_of(f"{bucket}/0002") == wanted
    for name in wanted.keys() - {WEIGHTS_NAME}:
        objects.delete(f"{bucket}/0002/{name}")
    path = located(f"{bucket}/0002")
    shutil.rmtree(path)
    path.with_name(".0002.partial").mkdir()
    apply_delta(*made, progress=False)
    assert bytes_of(f"{bucket}/0002") == wanted


def test_a_fetch_that_was_ended_goes_on_with_the_blocks_that_are_not_there_unless_the_object_has_changed(bucket, far):
    url, block, read = f"{bucket}/big", 2 << 20, objects.read
    for content in (os.urandom(3 * block + 5), os.urandom(4 * block)):
        objects.write(url, content)
        far.requests.clear()
        far.ranges.clear()
        with pytest.MonkeyPatch.context() as patch:  # as if it had been killed: the second block does not come
            patch.setattr(objects, "read", lambda *a, **k: read(*a, **k) if a[1] != block else 1 / 0)
            with pytest.raises(ZeroDivisionError):
                mirror.fetch(located(url))
        far.ranges.clear()
        assert mirror.fetch(located(url)).read_bytes() == content
        assert [start for _, start in far.ranges] == [block]
    assert [path.name for path in located(bucket).iterdir()] == ["big"]
