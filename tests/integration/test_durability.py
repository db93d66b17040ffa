"""What a published folder names is on the disk itself before the folder has its name: a power cut leaves no ruin.

Every fsync and rename of this process is noted.  A file or folder counts as synced while it is as it was then, by its
size and time, so that what is written afterwards is found, too.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from helpers.live_models import CONFIG, SCHEMA, write_day
from torchdlrm import (
    ExportOptions,
    GateSettings,
    LiveModel,
    LiveSettings,
    PreprocessOptions,
    advance,
    apply_delta,
    export,
    preprocess,
    train,
)
from torchdlrm.cli.main import app
from torchdlrm.features.schema import SparseColumn

WIDE = GateSettings(calibration=(0.01, 100.0), max_logloss_increase=5.0)
OF_STEPS = {"score": "scores.parquet", "preprocess": "dataset", "learn": "run", "export": ".candidate"}
LOCKS = {".lock"}


class Disk:
    """What has been synced and renamed, in this order."""

    def __init__(self, monkeypatch):
        self.events, self.listeners = 0, []
        self.syncs, self.renames = {}, {}
        monkeypatch.setattr(os, "fsync", self._noting_sync(os.fsync))
        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, self._noting(getattr(os, name)))

    def _noting_sync(self, fsync):
        def noted(handle):
            fsync(handle)
            self.events += 1
            now = os.fstat(handle)
            self.syncs.setdefault((now.st_dev, now.st_ino), []).append((self.events, now.st_size, now.st_mtime_ns))

        return noted

    def _noting(self, rename):
        def noted(source, target, **places):
            for listener in self.listeners:
                listener(Path(source), Path(target))
            rename(source, target, **places)
            self.events += 1
            self.renames[Path(target)] = self.events

        return noted

    def synced(self, path):
        """When a file or folder was first synced as it is now; None: it was not, or has changed since."""
        now = path.stat()
        times = self.syncs.get((now.st_dev, now.st_ino), [])
        return next((at for at, size, time in times if (size, time) == (now.st_size, now.st_mtime_ns)), None)

    def is_synced_since(self, event, path):
        now = path.stat()
        return any(at > event for at, *_ in self.syncs.get((now.st_dev, now.st_ino), []))

    def require_inside(self, path):
        """All that is in a folder is synced, and so are its names; returns when the last was."""
        inside = [path, *path.rglob("*")] if path.is_dir() else [path]
        times = {child: self.synced(child) for child in inside if child.name not in LOCKS}
        missing = sorted(str(child) for child, at in times.items() if at is None)
        assert not missing, f"not on the disk: {missing}"
        return max(times.values())

    def require_published(self, path, manifest):
        """Files, then the manifest, then the folder, then its name, then the folder of the name."""
        self.require_inside(path)
        named = self.renames[path]
        others = [child for child in path.rglob("*") if child != path / manifest]
        assert others
        assert max(map(self.synced, others)) < self.synced(path / manifest) < self.synced(path) < named
        assert self.is_synced_since(named, path.parent)


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def write_npy(folder):
    folder.mkdir()
    rng = np.random.default_rng(0)
    for day in range(2):
        np.save(folder / f"day_{day}_labels.npy", rng.integers(0, 2, (50, 1), np.int32))
        np.save(folder / f"day_{day}_dense.npy", rng.normal(size=(50, 13)).astype(np.float32))
        np.save(folder / f"day_{day}_sparse.npy", rng.integers(2, 40, (50, 26), np.int32))


def test_every_published_folder_is_on_the_disk_before_it_has_its_name(tmp_path, disk):
    monday = preprocess([write_day(tmp_path, 0)], tmp_path / "monday", SCHEMA, PreprocessOptions(admit_over=2))
    train(CONFIG, monday, tmp_path / "run-1")
    base = export(tmp_path / "run-1", tmp_path / "bundle-1", options=ExportOptions(name="days")).bundle
    known = PreprocessOptions(vocabulary=monday.path, extend_vocabulary=True, expire_after=1, admit_over=2)
    tuesday = preprocess([write_day(tmp_path, 3)], tmp_path / "tuesday", SCHEMA, known)
    train(CONFIG, tuesday, tmp_path / "run-2", from_run=tmp_path / "run-1")
    export(tmp_path / "run-2", tmp_path / "delta", delta_to=base.path)
    apply_delta(base.path, tmp_path / "delta", tmp_path / "bundle-2")
    preprocess([write_day(tmp_path, 4)], tmp_path / "known", SCHEMA, PreprocessOptions(vocabulary=tuesday.path))
    write_npy(tmp_path / "npy")
    app(["import", str(tmp_path / "npy"), "--out", str(tmp_path / "imported"), "--format", "npy"])
    for name in ("monday", "tuesday", "known", "imported"):
        disk.require_published(tmp_path / name, "dataset.json")
    assert {path.name for path in tuesday.path.iterdir()} > {"vocabulary", "reset", "candidates"}
    for name in ("bundle-1", "bundle-2"):
        disk.require_published(tmp_path / name, "bundle.json")
    disk.require_published(tmp_path / "delta", "delta.json")
    for checkpoint in (path for name in ("run-1", "run-2") for path in tmp_path.glob(f"{name}/checkpoints/*")):
        disk.require_published(checkpoint, "checkpoint.json")


def test_a_draft_and_a_record_say_only_what_is_on_the_disk(tmp_path, disk):
    live = LiveModel(tmp_path / "clicks")
    drafts = []

    def check_draft(source, target):
        if target.name == "draft.json":
            done = json.loads(source.read_text())["done"]
            for path in (target.parent / OF_STEPS[step] for step in done if step in OF_STEPS):
                if path.exists():  # a published candidate has gone
                    assert disk.is_synced_since(disk.require_inside(path), target.parent)
            drafts.append(done)
        if target.name == "period.json":
            disk.require_inside(live.bundle(int(target.parent.name)))
            disk.require_inside(live.path / "bundles")
            assert disk.is_synced_since(disk.renames[live.path / "current"], live.path)

    disk.listeners.append(check_draft)
    large = (*SCHEMA.columns[:-1], SparseColumn(name="page", kind="string", hash=20_000))  # a delta is far smaller
    schema = SCHEMA.model_copy(update={"columns": large})
    settings = LiveSettings(gate=WIDE, expire_after=1, admit_over=2)
    for day in range(2):
        advance(live.path, write_day(tmp_path, day), config=CONFIG, schema=schema, settings=settings)
        disk.require_published(live.bundle(day + 1), "bundle.json")
        for path in live.day(day + 1).iterdir():
            disk.require_inside(path)
    assert ["score", "preprocess", "learn", "export", "check", "publish"] in drafts
    assert live.delta(2).is_dir()
    disk.require_published(live.delta(2), "delta.json")
