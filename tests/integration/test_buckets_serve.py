"""Bundles at URLs: opened, predicted with and served; a server follows a live model in a bucket."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from helpers.buckets import bytes_of, far_away
from helpers.live_bundles import rows_of, write_periods
from torchdlrm.bundle.bundle import Bundle
from torchdlrm.bundle.manifest import WEIGHTS_NAME, BundleManifest
from torchdlrm.errors import BundleError, StorageError
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


def test_a_damaged_object_is_named(bucket, periods):
    put(periods / "0001", f"{bucket}/bundle")
    weights = bytearray((periods / "0001" / WEIGHTS_NAME).read_bytes())
    weights[100] ^= 1
    objects.write(f"{bucket}/bundle/{WEIGHTS_NAME}", bytes(weights))
    with pytest.raises(StorageError, match=f"{bucket}/bundle/{WEIGHTS_NAME}: damaged: its bytes from 0 on"):
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
