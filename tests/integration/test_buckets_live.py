"""A live model in a bucket: the bytes of one on a disk, one writer at a time, and whatever host goes on with it."""

import json
import shutil
import time
from itertools import islice
from pathlib import Path

import pytest

from helpers.buckets import bytes_of
from helpers.live_models import CONFIG, SCHEMA, WIDE, files_of
from torchdlrm import LiveModel, LiveSettings, advance, rollback
from torchdlrm.errors import RunError, StorageError
from torchdlrm.live.logs import watched_logs
from torchdlrm.live.record import PeriodRecord
from torchdlrm.storage import objects
from torchdlrm.storage.lease import HeldError, held
from torchdlrm.storage.places import located, url_of
from torchdlrm.storage.stamps import stamp_path


@pytest.fixture
def on_host(monkeypatch, tmp_path):
    """Gives this process the cache of a host, whose name is its argument."""
    return lambda name: monkeypatch.setenv("TORCHDLRM_CACHE", str(tmp_path / name))


def in_bucket(url):
    """What `files_of` finds of a live model on a disk, of one at a URL."""
    found = bytes_of(url)
    found["current"] = found["current"].decode()
    never_the_same = {"times.json", "metrics.jsonl", "environment.json", ".lock"}
    return {name: None if Path(name).name in never_the_same else data for name, data in found.items()}


def test_each_host_goes_on_where_another_ended_with_the_bytes_of_a_disk(bucket, on_host, three_days, logs, tmp_path):
    url, local = f"{bucket}/clicks", shutil.copytree(three_days, tmp_path / "clicks", symlinks=True)
    for day in range(3):
        on_host(str(day))
        advance(url, logs[day], config=CONFIG, schema=SCHEMA, settings=LiveSettings(gate=WIDE))
    expected, found = (
        {name: data or b"" for name, data in files.items() if Path(name).name != ".lock"}
        for files in (files_of(local), in_bucket(url))
    )
    assert found == expected
    on_host("another")
    rollback(url, 2)
    assert LiveModel.open(url).current == 2
    on_host("1")
    assert LiveModel.open(url).current == 2

    # Several machines: the one that has the lease does the steps, the others train with it.
    def training(_config, _dataset, run, **_):
        raise ZeroDivisionError(url_of(run))

    day_4 = f"{url}/days/0004/run"
    with pytest.raises(ZeroDivisionError, match=day_4):
        advance(url, logs[3], train_by=training)
    with LiveModel(located(url)).locked():
        on_host("helper")
        with pytest.raises(ZeroDivisionError, match=day_4):
            advance(url, logs[3], train_by=training, has_helpers=True)
        with pytest.raises(StorageError, match="holds the lease"):
            advance(url, logs[3], train_by=training)
        assert advance(url, logs[0], has_helpers=True).period == 1


def test_a_second_writer_is_told_who_holds_the_lease_and_a_dead_one_loses_it(bucket, on_host, monkeypatch):
    monkeypatch.setenv("TORCHDLRM_LEASE_S", "2")
    url = f"{bucket}/clicks"
    live = LiveModel(located(url))
    with live.locked():
        on_host("another")
        with pytest.raises(StorageError, match=r"process \d+ of \S+ is changing it and holds the lease until") as said:
            LiveModel(located(url)).locked().__enter__()
        assert str(said.value).startswith(f"{url}: process ")
        # This one is held up for longer than the lease lasts.
        held = json.loads(objects.read(f"{url}/.lock"))
        objects.write(f"{url}/.lock", json.dumps(held | {"until": 0}).encode())
        with LiveModel(located(url)).locked(), pytest.raises(StorageError, match="has taken the lease over"):
            live.switch(1)
    assert "current" not in objects.listed(url)
    held = json.loads(objects.read(f"{url}/.lock"))
    assert held["until"] <= time.time()


def test_a_lease_is_waited_for_once_and_one_that_this_host_has_left_is_taken_over_at_once(bucket):
    path = located(f"{bucket}/run/.lock")
    path.parent.mkdir(parents=True)
    said = []

    def hold_on(seconds):
        text = json.dumps({"host": "another", "pid": 7, "until": time.time() + seconds})
        return objects.write(url_of(path), text.encode())

    hold_on(0.1)
    with held(path, RunError("in use"), said.append) as confirm:
        assert "process 7 of another" in said.pop()
        confirm()
        with pytest.raises(RunError, match="in use"), held(path, RunError("in use")):
            pass
    hold_on(0.1)
    with pytest.raises(HeldError, match="process 7 of another"), held(path, RunError("in use"), lambda _: hold_on(60)):
        pass
    stamp_path(path).write_text(hold_on(60))
    with held(path, RunError("in use")):
        pass


def test_logs_are_taken_in_order_once_they_are_complete(bucket, tmp_path, monkeypatch):
    def wait(_):
        raise TimeoutError

    monkeypatch.setattr("torchdlrm.live.logs.time.sleep", wait)
    for name in ("h=01/b.tsv", "h=01/a.tsv", "h=01/_SUCCESS", "h=02/a.tsv", "h=02/empty.tsv", "h=03/a.tsv"):
        content = b"" if "empty" in name or "_" in name else b"1\n"
        objects.write(f"{bucket}/logs/{name}", content)
        (tmp_path / "logs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "logs" / name).write_bytes(content)
    for prefix in (located(f"{bucket}/logs"), tmp_path / "logs"):
        expected = [[prefix / "h=01/a.tsv", prefix / "h=01/b.tsv"], [prefix / "h=02/a.tsv"]]
        found = watched_logs(prefix, [])
        assert list(islice(found, 2)) == expected
        with pytest.raises(TimeoutError):
            next(found)
        (record := PeriodRecord.model_construct(logs=())).__dict__["logs"] = [type("Log", (), {"path": expected[0][0]})]
        assert next(watched_logs(prefix, [record])) == expected[1]


def test_a_draft_that_is_written_while_it_is_read_is_read_again(bucket, monkeypatch):
    objects.write(f"{bucket}/live/live.toml", b"")
    objects.write(f"{bucket}/live/days/0001/draft.json", b"0")
    read, writes = objects.read, iter(range(1, 4))

    def written_meanwhile(url, *args, **options):
        if url.endswith("draft.json") and (number := next(writes, None)):
            objects.write(url, str(number).encode())
        return read(url, *args, **options)

    monkeypatch.setattr(objects, "read", written_meanwhile)
    live = LiveModel.open(f"{bucket}/live")
    assert (live.day(1) / "draft.json").read_bytes() == b"3"
