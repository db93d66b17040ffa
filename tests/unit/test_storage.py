"""A path stands for a URL: what the bucket has is in the cache, and what is made complete there is in the bucket."""

import os
import time
from pathlib import Path

import pytest

from helpers.buckets import bytes_of, far_away
from torchdlrm.errors import StorageError, UserError
from torchdlrm.files import publish_folder, remove_folder, replacing, write_atomically
from torchdlrm.prediction.scores_out import check_name
from torchdlrm.progress import SilentProgress
from torchdlrm.storage import mirror, objects
from torchdlrm.storage.objects import ChangedError
from torchdlrm.storage.places import located, shown, url_of, with_paths, with_urls
from torchdlrm.storage.reading import RANGE_BYTES, identity_of, open_to_read


def test_a_url_is_a_path_and_back(bucket, tmp_path):
    path = located("s3://clicks/days/1.gz")
    assert path == tmp_path / "cache/s3/clicks/days/1.gz"
    assert located(path) == path == located(Path("s3://clicks/days/1.gz"))
    assert url_of(path.parent) == shown(path.parent) == "s3://clicks/days"
    assert located("file:///data/x") == Path("/data/x")
    assert url_of(tmp_path) is None
    assert located("days/1.gz") == Path("days/1.gz")
    assert with_urls(f"{path}: no") == "s3://clicks/days/1.gz: no"
    assert with_paths("--x=gs://b/c") == f"--x={tmp_path}/cache/gs/b/c"
    for other in (
        "--train.batch_size=4",
        "tcp://scheduler:8786",
        "--cluster=tls://10.0.0.1:8786",
        "http://localhost:8080",
    ):
        assert with_paths(other) == other


@pytest.mark.parametrize(("url", "message"), [("s3a://b/c", "write s3://"), ("s3://b/../c", "no"), ("ftp://b", "ftp")])
def test_urls_that_are_none_are_refused(url, message):
    with pytest.raises(StorageError, match=message):
        located(url)


def test_what_is_complete_is_in_the_bucket(bucket, tmp_path):
    path = located(f"{bucket}/run")
    work = path.with_name(".run.partial")
    work.mkdir(parents=True)
    write_atomically(work / "manifest.json", "{}")
    (work / "parts").mkdir()
    (work / "parts/0").write_bytes(b"0" * 100)
    assert objects.listed(bucket) == {}
    publish_folder(work, path, "manifest.json")
    assert bytes_of(f"{bucket}/run") == {"manifest.json": b"{}", "parts/0": b"0" * 100}
    with replacing(path / "parts/0") as temporary:
        temporary.write_bytes(b"1")
    assert bytes_of(f"{bucket}/run")["parts/0"] == b"1"
    mirror.move(path, located(f"{bucket}/other"), "manifest.json")
    assert bytes_of(f"{bucket}/other") == {"manifest.json": b"{}", "parts/0": b"1"}
    assert objects.listed(f"{bucket}/run") == {}
    remove_folder(located(f"{bucket}/other"))
    assert objects.listed(bucket) == {}
    assert not located(f"{bucket}/other").exists()


class Told(SilentProgress):
    def __init__(self):
        self.phases, self.done = [], 0

    def start_phase(self, name, total, **_):
        self.phases.append((name, total))

    def advance(self, amount, **_):
        self.done += amount


def test_the_cache_follows_the_bucket_and_fetches_nothing_twice(bucket, s3, monkeypatch):
    with far_away(s3) as faults:
        for name, value in faults.environment.items():
            monkeypatch.setenv(name, value)
        for name in ("a/1", "a/2", "b/1"):
            objects.write(f"{bucket}/d/{name}", name.encode())
        folder = located(f"{bucket}/d")
        seen = Told()
        mirror.fetch(folder, ["a/*"], seen)
        assert sorted(path.name for path in folder.rglob("*")) == ["1", "2", "a", "b"]
        mirror.fetch(folder)
        faults.requests.clear()
        mirror.fetch(folder, progress=seen)
        assert (seen.phases, seen.done) == ([("fetch", 6)], 6), "what is here already is no phase"
        assert len(faults.requests) == 1, "to look costs one request"
        objects.write(f"{bucket}/d/a/1", b"new")
        objects.delete(f"{bucket}/d/b/1")
        mirror.fetch(folder)
        assert (folder / "a/1").read_bytes() == b"new"
        assert not (folder / "b").exists()
        (folder / "a/2").write_bytes(b"damaged")
        mirror.fetch(folder)
        assert (folder / "a/2").read_bytes() == b"a/2"


def test_scores_for_no_bucket_or_for_a_folder_are_refused_before_any_is_predicted(bucket):
    check_name(located(f"{bucket}/scores.csv"))
    objects.write(f"{bucket}/scores.csv/part-0", b"1")
    with pytest.raises(UserError, match="is a folder"):
        check_name(located(f"{bucket}/scores.csv"))
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/scores.csv: .* no such bucket"):
        check_name(located("s3://no-such-bucket/scores.csv"))


def test_the_cache_is_bounded(bucket, monkeypatch):
    monkeypatch.setenv("TORCHDLRM_CACHE_BYTES", "2500")
    for name in "abc":
        objects.write(f"{bucket}/{name}", name.encode() * 1000)
        mirror.fetch(located(f"{bucket}/{name}"))
    assert [name for name in "abc" if located(f"{bucket}/{name}").exists()] == ["b", "c"]


def test_faults_that_pass_are_waited_for(bucket, s3, monkeypatch):
    content = os.urandom(3 * RANGE_BYTES + 17)
    with far_away(s3, busy=0.2, cut=0.3, seed=5) as faults:
        for name, value in faults.environment.items():
            monkeypatch.setenv(name, value)
        path = located(f"{bucket}/big")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        mirror.push(path)
        with open_to_read(path) as file:
            assert file.read() == content
            file.seek(RANGE_BYTES - 3)
            assert file.read(6) == content[RANGE_BYTES - 3 : RANGE_BYTES + 3]
        path.unlink()
        assert mirror.fetch(path).read_bytes() == content


def test_what_changes_while_it_is_read_is_refused(bucket):
    objects.write(f"{bucket}/log", b"1" * 10)
    path = located(f"{bucket}/log")
    identity = identity_of(path)
    objects.write(f"{bucket}/log", b"2" * 10)
    with open_to_read(path, identity) as file, pytest.raises(ChangedError, match=f"{bucket}/log"):
        file.read()


def test_conditional_writes(bucket):
    first = objects.write(f"{bucket}/current", b"1", create=True)
    with pytest.raises(ChangedError):
        objects.write(f"{bucket}/current", b"2", create=True)
    second = objects.write(f"{bucket}/current", b"2", replacing=first)
    with pytest.raises(ChangedError):
        objects.write(f"{bucket}/current", b"3", replacing=first)
    assert objects.read_if_changed(f"{bucket}/current", second) is None
    assert objects.read_if_changed(f"{bucket}/current", first) == (b"2", second)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((403, "AccessDenied"), "grant reading"),
        ((403, "InvalidAccessKeyId"), "credentials are wrong"),
        ((400, "ExpiredToken"), "have expired"),
        ((403, "RequestTimeTooSkewed"), "clock"),
        ((301, "PermanentRedirect"), "region"),
        ((404, "NoSuchBucket"), "no such bucket"),
        ((503, "SlowDown"), "fewer requests"),
    ],
)
def test_errors_say_what_to_do(bucket, s3, monkeypatch, answer, message):
    monkeypatch.setenv("TORCHDLRM_STORAGE_PATIENCE_S", "0.5")
    with far_away(s3, answer=answer) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.environment["AWS_ENDPOINT_URL"])
        with pytest.raises(StorageError, match=message) as caught:
            objects.read(f"{bucket}/log")
    assert f"{bucket}/log" in str(caught.value)
    assert "tested-secret" not in str(caught.value)
    assert "127.0.0.1" not in str(caught.value)


def test_a_server_that_is_away_is_named(bucket, monkeypatch):
    monkeypatch.setenv("TORCHDLRM_STORAGE_PATIENCE_S", "0.3")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started_s = time.monotonic()
    with pytest.raises(StorageError, match="does not answer"):
        objects.stat(f"{bucket}/log")
    assert time.monotonic() - started_s < 10


def test_patterns_and_prefixes_name_objects_in_order(bucket):
    for name in ("d/10.gz", "d/2.gz", "d/_SUCCESS", "d/.crc", "e/1.gz"):
        objects.write(f"{bucket}/{name}", b"x")
    assert [shown(path) for path in mirror.files_at(located(f"{bucket}/*/*.gz"))] == [
        f"{bucket}/{name}" for name in ("d/10.gz", "d/2.gz", "e/1.gz")
    ]
    assert [path.name for path in mirror.files_at(located(f"{bucket}/d"))] == ["10.gz", "2.gz"]
    with pytest.raises(StorageError, match="no object has such a name"):
        mirror.files_at(located(f"{bucket}/none-*"))


def test_a_link_is_led_elsewhere_unless_another_host_has_done_so(bucket, monkeypatch, tmp_path):
    link = located(f"{bucket}/live/current")
    tag = mirror.lead_link(link, "bundles/0001", mirror.fetch_link(link))
    assert bytes_of(f"{bucket}/live")["current"] == b"bundles/0001"
    assert tag == mirror.fetch_link(link)
    with monkeypatch.context() as other:
        other.setenv("TORCHDLRM_CACHE", str(tmp_path / "other host"))
        there = located(f"{bucket}/live/current")
        mirror.lead_link(there, "bundles/0002", mirror.fetch_link(there))
    with pytest.raises(ChangedError):
        mirror.lead_link(link, "bundles/0003", tag)
    assert str(link.readlink()) == "bundles/0001"
    mirror.fetch_link(link)
    assert str(link.readlink()) == "bundles/0002"
    assert mirror.lead_link(tmp_path / "current", "bundles/0001", None) is None
    assert str((tmp_path / "current").readlink()) == "bundles/0001"
