"""A job that is killed goes on and ends with the same bytes; whatever it may use of the machine changes none."""

import fcntl
import json
import os
import random
import re
import signal
import subprocess
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.command_server import shared_server
from helpers.raw_logs import checksums
from torchdlrm.data.dataset import Dataset
from torchdlrm.errors import ConfigError, DatasetError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, WeightColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, preprocess, work_folder
from torchdlrm.preprocessing.read import read_chunk
from torchdlrm.progress import SilentProgress

SCHEMA = FeatureSchema(
    name="small",
    columns=(
        LabelColumn(name="label"),
        WeightColumn(name="w"),
        LabelColumn(name="bought"),
        DenseColumn(name="position", kind="int", transform="none", buckets=9),
        DenseColumn(name="price", kind="float", transform="standardize", buckets="log_square", hash=30),
        SparseColumn(name="city", kind="string"),
        SparseColumn(name="item", kind="hex"),
        SparseColumn(
            name="tags",
            kind="int",
            value_separator="|",
            weight_separator=":",
            max_values=3,
            buckets={"quantiles": 5},
            min_count=99,
        ),
        SparseColumn(name="shop", kind="int", hash=50),
        SparseColumn(name="seen", kind="hex", value_separator="|", max_values=3, keep="last", table="item"),
        DenseColumn(name="text", kind="vector", size=3),
    ),
)
OPTIONS = PreprocessOptions(min_count=2, part_rows=280)
NUM_ROUNDS = int(os.environ.get("TORCHDLRM_NUM_KILLS", "2"))  # CONTRIBUTING.md says when to ask for more
PHASES = ("read", "count", "encode", "write")
# Runs the job and tells the phase that begins, so that a test can kill it there.
JOB = """
import sys
import threading
from dataclasses import replace
from pathlib import Path
from torchdlrm.preprocessing.read import read_chunk
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, preprocess
from torchdlrm.progress import SilentProgress
from torchdlrm.features.schema_file import load_schema
class Told(SilentProgress):
    def start_phase(self, name, *_):
        print(name, flush=True)
    def advance(self, amount, **_):
        print(".", flush=True)
preprocess([Path(sys.argv[1])], Path(sys.argv[2]), load_schema(sys.argv[3]),
    PreprocessOptions(min_count=2, part_rows=280), Told(), chunk_bytes=3000, resources=Resources(workers=2))
"""


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = random.Random(5)
    lines = []
    for i in range(2400):
        tags = "|".join(f"{rng.randrange(90)}:{rng.gauss(0, 1):.2f}" for _ in range(rng.randrange(5)))
        city, item = (
            rng.choice(["", "Köln", "Oslo", f"c{rng.randrange(900)}"]),
            rng.choice(["", f"{rng.randrange(700):x}"]),
        )
        seen = "|".join(f"{rng.randrange(900):x}" for _ in range(rng.randrange(6)))
        text = rng.choice(["", "[1, 2, 0.5]", f"{rng.random():.3f},-1,7"])
        lines.append(
            f"{rng.choice('0001')}\t{rng.random():.2f}\t{rng.choice('01')}\t{i}\t{rng.gauss(0, 1e5):.3f}"
            f"\t{city}\t{item}\t{tags}\t{rng.randrange(400)}\t{seen}\t{text}\n"
        )
    path = tmp_path_factory.mktemp("log") / "log.tsv"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def schema_file(log):
    path = log.with_name("schema.toml")
    lines = ['name = "small"', "columns = ["]
    for column in SCHEMA.columns:
        items = column.model_dump(exclude_none=True).items()
        lines.append("  { " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in items) + " },")
    path.write_text("\n".join([*lines, "]", ""]))
    return path


@pytest.fixture(scope="module")
def uninterrupted(log, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "dataset"
    preprocess([log], out, SCHEMA, OPTIONS, resources=Resources(workers=1))
    return checksums(out)


def start(log, out, schema_file):
    job = schema_file.with_name("job.py")
    job.write_text(JOB)
    return shared_server().start([job, log, out, schema_file], stdout=subprocess.PIPE)


def kill_after(process, lines):
    """Kill -9 when the job has told so many lines; the phase it was in, None when it was done before."""
    phase = None
    for _ in range(lines):
        line = process.stdout.readline()
        if not line:
            break
        phase = line.strip() if line.strip() != "." else phase
    else:
        process.kill()
    process.stdout.close()
    return phase if process.wait() == -signal.SIGKILL else None


@pytest.mark.slow
def test_a_job_killed_once_in_every_phase_ends_with_the_same_bytes(log, schema_file, uninterrupted, tmp_path, seed):
    process = start(log, tmp_path / "dataset", schema_file)
    told = process.communicate()[0].splitlines()
    assert process.returncode == 0
    assert checksums(tmp_path / "dataset") == uninterrupted

    rng = random.Random(seed)
    starts = [told.index(phase) + 1 for phase in PHASES]
    kills = dict.fromkeys(PHASES, 0)
    for attempt in range(NUM_ROUNDS):
        out = tmp_path / f"dataset{attempt}"
        # What an earlier run has done is told again at once, so that later kills fall on later moments.
        for first, end in zip(starts, [*starts[1:], len(told)], strict=True):
            phase = kill_after(start(log, out, schema_file), rng.randrange(first, end))
            assert phase is not None, "the job was killed before it was done"
            kills[phase] += 1
            with pytest.raises(DatasetError):
                Dataset.open(out)
        process = start(log, out, schema_file)
        process.communicate()
        assert process.returncode == 0
        assert checksums(out) == uninterrupted
        assert not work_folder(out).exists()
    assert kills == dict.fromkeys(PHASES, NUM_ROUNDS)


@pytest.mark.parametrize(
    ("resources", "chunk_bytes"),
    [
        pytest.param(Resources(workers=1), 900, marks=pytest.mark.thorough),
        (Resources(workers=3, memory_bytes=400 << 20), None),
        (Resources(workers=2), 7777),
    ],
)
def test_the_bytes_do_not_depend_on_workers_memory_and_chunks(log, uninterrupted, tmp_path, resources, chunk_bytes):
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS, chunk_bytes=chunk_bytes, resources=resources)
    assert checksums(tmp_path / "dataset") == uninterrupted


@pytest.mark.parametrize(("partitions", "values_per_task", "group_bytes"), [(16, 40, 20_000), (4, 300, 1 << 30)])
def test_the_bytes_do_not_depend_on_how_values_are_partitioned(
    log, uninterrupted, tmp_path, monkeypatch, partitions, values_per_task, group_bytes
):
    from torchdlrm.preprocessing import preprocess as module
    from torchdlrm.preprocessing.sizing import JobSizing

    sizing = JobSizing(5000, partitions, group_bytes, values_per_task, 2)
    monkeypatch.setattr(module, "choose_sizing", lambda *_: sizing)
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    assert checksums(tmp_path / "dataset") == uninterrupted


class Interrupted(SilentProgress):
    def __init__(self, phase):
        self.phase = phase

    def start_phase(self, name, *_):
        if name == self.phase:
            raise KeyboardInterrupt


def interrupt(log, out, phase="encode", **settings):
    with pytest.raises(KeyboardInterrupt):
        preprocess([log], out, SCHEMA, OPTIONS, Interrupted(phase), chunk_bytes=3000, **settings)


def test_other_settings_are_named_and_stop_the_job_and_restart_forgets(log, uninterrupted, tmp_path):
    out = tmp_path / "dataset"
    interrupt(log, out)
    with pytest.raises(DatasetError) as caught:
        preprocess([log], out, SCHEMA, PreprocessOptions(min_count=3, part_rows=280, seed=9))
    message = str(caught.value)
    assert "min_count: was 2, is 3" in message
    assert "seed: was 0, is 9" in message
    assert "schema" not in message
    assert "`restart`" in message
    preprocess([log], out, SCHEMA, OPTIONS, restart=True)
    assert checksums(out) == uninterrupted


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("kind", ["link", "content"])
def test_what_no_job_has_left_is_neither_written_to_nor_removed(log, tmp_path, kind, restart):
    place = tmp_path / (".dataset.partial" if kind == "content" else "victim")
    place.mkdir()
    (place / "thesis").write_text("precious")
    if kind == "link":
        (tmp_path / ".dataset.partial").symlink_to(place)
    with pytest.raises(DatasetError, match="is not what an interrupted job leaves there"):
        preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS, restart=restart)
    assert [path.name for path in place.iterdir()] == ["thesis"]


def test_a_log_that_changed_since_is_named(log, tmp_path):
    copy = tmp_path / "log.tsv"
    copy.write_bytes(log.read_bytes())
    interrupt(copy, tmp_path / "dataset")
    copy.write_bytes(log.read_bytes() + log.read_bytes()[:100].split(b"\n")[0] + b"\n")
    with pytest.raises(DatasetError, match="log: was"):
        preprocess([copy], tmp_path / "dataset", SCHEMA, OPTIONS)


def test_memory_workers_and_allowed_bad_rows_may_change_when_a_job_goes_on(log, uninterrupted, tmp_path):
    interrupt(log, tmp_path / "dataset")
    options = PreprocessOptions(min_count=2, part_rows=280, max_bad_rows=7)
    told = []

    class Recorder(SilentProgress):
        def start_phase(self, name, *_):
            told.append(name)

    chunks = work_folder(tmp_path / "dataset") / "chunks"
    before = {path.name: path.stat().st_mtime_ns for path in chunks.iterdir()}
    resources = Resources(workers=1, memory_bytes=1 << 30)
    with pytest.raises(KeyboardInterrupt):
        preprocess([log], tmp_path / "dataset", SCHEMA, options, Interrupted("encode"), resources=resources)
    assert {path.name: path.stat().st_mtime_ns for path in chunks.iterdir()} == before, "nothing was read again"
    preprocess([log], tmp_path / "dataset", SCHEMA, options, Recorder(), resources=resources)
    assert told == list(PHASES)
    assert checksums(tmp_path / "dataset") == uninterrupted


def test_a_job_that_goes_on_with_less_memory_runs_fewer_tasks_at_a_time(log, uninterrupted, tmp_path, monkeypatch):
    from torchdlrm.preprocessing import job as module

    running, most, lock = [], [], threading.Lock()

    def read(*arguments):
        with lock:
            running.append(1)
            most.append(len(running))
        try:
            return read_chunk(*arguments)
        finally:
            with lock:
                running.pop()

    monkeypatch.setattr(module, "read_chunk", read)
    resources = Resources(memory_bytes=4 << 30, workers=4)
    interrupt(log, tmp_path / "dataset", "read", resources=resources)
    resources = Resources(memory_bytes=300 << 20, workers=4)
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS, resources=resources)
    assert max(most) == 1
    assert checksums(tmp_path / "dataset") == uninterrupted


def test_a_damaged_last_line_of_the_journal_is_forgotten(log, uninterrupted, tmp_path):
    interrupt(log, tmp_path / "dataset")
    journal = work_folder(tmp_path / "dataset") / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    assert checksums(tmp_path / "dataset") == uninterrupted


def test_what_tasks_of_an_older_version_left_is_not_resumed(log, tmp_path):
    interrupt(log, tmp_path / "dataset")
    job = work_folder(tmp_path / "dataset") / "job.json"
    job.write_text(re.sub(r'"work_folder": \d+, ', "", job.read_text()))
    with pytest.raises(DatasetError, match=r"work_folder: was None, is .*\n.* or start again with `restart`"):
        preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)


def test_two_jobs_at_a_time_in_one_folder_are_refused(log, tmp_path):
    interrupt(log, tmp_path / "dataset")
    lock = os.open(work_folder(tmp_path / "dataset") / "lock", os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    with pytest.raises(DatasetError, match="another job is at work"):
        preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    os.close(lock)


def test_a_job_killed_while_it_tidied_up_is_done(log, uninterrupted, tmp_path):
    interrupt(log, tmp_path / "dataset", "write")
    partial = work_folder(tmp_path / "dataset")
    kept = (partial / "job.json").read_text()
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    partial.mkdir()
    (partial / "job.json").write_text(kept)
    preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    assert not partial.exists()
    assert checksums(tmp_path / "dataset") == uninterrupted
    with pytest.raises(DatasetError, match="exists, and is of another log, schema or options"):
        preprocess([log], tmp_path / "dataset", SCHEMA, replace(OPTIONS, seed=99))


def test_too_little_memory_is_refused_with_the_least_that_is_enough(log, tmp_path):
    with pytest.raises(ConfigError, match=r"`memory_bytes`: 100 MB is too little: .* take [\d.]+ MB"):
        preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS, resources=Resources(memory_bytes=100_000_000))


def test_a_disk_without_room_is_told_before_the_work_starts(log, tmp_path, monkeypatch):
    from torchdlrm.preprocessing import sizing

    monkeypatch.setattr(sizing.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DatasetError, match=r"the disk has \S+ kB free, and the job needs up to"):
        preprocess([log], tmp_path / "dataset", SCHEMA, OPTIONS)
    assert not (tmp_path / "dataset").exists()
