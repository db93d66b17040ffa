"""The preprocessing job on a real Dask cluster of separate processes."""

import json
import random
import signal

import pytest

from helpers.buckets import bytes_of
from helpers.dask_cluster import running_cluster
from helpers.raw_logs import checksums
from torchdlrm.errors import ConfigError, LogError
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn
from torchdlrm.features.schema import FeatureSchema, criteo_schema
from torchdlrm.preprocessing.preprocess import PreprocessOptions, Resources, preprocess
from torchdlrm.progress import SilentProgress
from torchdlrm.storage import objects
from torchdlrm.storage.places import located

OPTIONS = PreprocessOptions(min_count=2, part_rows=400)
SHOP = FeatureSchema(
    name="shop",
    columns=(
        LabelColumn(name="click"),
        DenseColumn(name="text", kind="vector", size=3),
        SparseColumn(name="item", kind="int"),
        SparseColumn(name="seen", kind="int", value_separator="|", max_values=3, keep="last", table="item"),
    ),
)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The address of a scheduler, and its two workers' processes."""
    with running_cluster(tmp_path_factory.mktemp("dask")) as (address, workers, _):
        yield address, workers


@pytest.fixture(scope="module")
def log(tmp_path_factory):
    rng = random.Random(3)
    lines = []
    for _ in range(1500):
        sparse = [rng.choice(["", f"{int(rng.paretovariate(0.7)) % 2**32:08x}"]) for _ in range(26)]
        lines.append("\t".join([rng.choice("01"), *[str(rng.randrange(50)) for _ in range(13)], *sparse]) + "\n")
    path = tmp_path_factory.mktemp("log") / "log.tsv"
    path.write_text("".join(lines))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Dask's own
def test_a_cluster_gives_the_same_bytes_although_a_worker_is_killed(cluster, log, tmp_path):
    address, workers = cluster
    preprocess([log], tmp_path / "here", criteo_schema(), OPTIONS)
    bad = tmp_path / "bad"
    bad.write_text("1\t2\n" + log.read_text())
    with pytest.raises(LogError, match="bad, line 1"):
        preprocess([bad], tmp_path / "no", criteo_schema(), OPTIONS, resources=Resources(cluster=address))

    class Kills(SilentProgress):
        def __init__(self):
            self.left = 3

        def advance(self, *_, **__):
            self.left -= 1
            if self.left == 0:
                workers[0].send_signal(signal.SIGKILL)

    resources = Resources(cluster=address)
    preprocess([log], tmp_path / "there", criteo_schema(), OPTIONS, Kills(), chunk_bytes=20_000, resources=resources)
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert workers[1].poll() is None
    assert checksums(tmp_path / "there") == checksums(tmp_path / "here")
    # Vectors, and lists that share a table.
    rng, shop = random.Random(4), tmp_path / "shop.jsonl"
    rows = [
        {
            "click": rng.randrange(2),
            "text": [rng.gauss(0, 1) for _ in range(3)] if rng.random() < 0.9 else None,
            "item": rng.randrange(40),
            "seen": [rng.randrange(60) for _ in range(rng.randrange(6))],
        }
        for _ in range(300)
    ]
    shop.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, where in (("shop here", Resources()), ("shop there", resources)):
        preprocess([shop], tmp_path / name, SHOP, OPTIONS, chunk_bytes=9_000, resources=where)
    assert checksums(tmp_path / "shop there") == checksums(tmp_path / "shop here")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_scheduler_that_dies_is_told_and_the_job_goes_on_elsewhere(log, tmp_path, monkeypatch):
    """The futures of a client that has lost its scheduler are never done."""
    from torchdlrm.jobs import workers

    monkeypatch.setattr(workers, "CONNECT_TIMEOUT_S", 3)  # and how long the client tries to come back
    with running_cluster(tmp_path, num_workers=1) as (address, _, scheduler):

        class Kills(SilentProgress):
            def advance(self, *_, **__):
                scheduler.send_signal(signal.SIGKILL)

        with pytest.raises(
            ConfigError, match=f"`cluster`: the scheduler at {address} is gone; the same command resumes"
        ):
            preprocess(
                *([log], tmp_path / "out", criteo_schema(), OPTIONS, Kills()),
                chunk_bytes=20_000,
                resources=Resources(cluster=address),
            )
    preprocess([log], tmp_path / "out", criteo_schema(), OPTIONS)
    preprocess([log], tmp_path / "here", criteo_schema(), OPTIONS)
    assert checksums(tmp_path / "out") == checksums(tmp_path / "here")


@pytest.mark.filterwarnings("ignore")
def test_a_cluster_that_does_not_answer_is_named(log, tmp_path, monkeypatch):
    from torchdlrm.jobs import workers

    monkeypatch.setattr(workers, "CONNECT_TIMEOUT_S", 1)
    with pytest.raises(ConfigError, match="`cluster`: no Dask scheduler answers at tcp:"):
        preprocess([log], tmp_path / "no", criteo_schema(), OPTIONS, resources=Resources(cluster="tcp://127.0.0.1:1"))


@pytest.fixture
def apart(bucket, tmp_path):
    """A cluster whose two workers share nothing but a bucket, and their processes."""
    with running_cluster(tmp_path, apart=True) as (address, workers, _):
        yield address, workers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_workers_that_share_nothing_but_a_bucket_give_the_same_bytes(apart, bucket, log, tmp_path):
    """One is killed when the count begins; pieces of it are in the bucket, and at the end no piece is there."""
    address, workers = apart
    preprocess([log], tmp_path / "here", criteo_schema(), OPTIONS)
    seen = set()

    class Kills(SilentProgress):
        def start_phase(self, name, *_, **__):
            seen.update(name.split("/")[2] for name in objects.listed(bucket) if "partial" in name)
            if name == "count":
                workers[0].send_signal(signal.SIGKILL)

    resources = Resources(cluster=address)
    out = located(f"{bucket}/out")
    preprocess([log], out, criteo_schema(), OPTIONS, Kills(), chunk_bytes=300_000, resources=resources)
    assert workers[0].wait(timeout=10) == -signal.SIGKILL
    assert seen == {"chunks", "counts", "ids", "groups", "dataset"}
    here = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    expected = {f"out/{path.relative_to(tmp_path / 'here')}": path.read_bytes() for path in here}
    assert bytes_of(bucket) == expected, "and nothing else is in the bucket"
    assert [path for path in (tmp_path / "cache-1").rglob("*") if path.is_file()] == [], "the worker keeps nothing"
