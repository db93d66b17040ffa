"""A log and a dataset in a bucket: the bytes are those of a disk, whatever happens to the requests and the process."""

import gzip
import os
import signal
import subprocess
import time

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from pyarrow import orc

from helpers.buckets import bytes_of, far_away
from helpers.command_server import DLRM, shared_server
from torchdlrm.errors import DatasetError, LogError, StorageError
from torchdlrm.features.schema import criteo_schema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.lines import read_chunks
from torchdlrm.logs.proposal.propose import propose_schema
from torchdlrm.prediction.rows_in import RowsIn
from torchdlrm.preprocessing.preprocess import PreprocessOptions, preprocess, work_folder
from torchdlrm.progress import SilentProgress
from torchdlrm.storage import objects
from torchdlrm.storage.places import located
from torchdlrm.storage.reading import RANGE_BYTES, open_to_read

OPTIONS = PreprocessOptions(min_count=2)


@pytest.fixture
def log(bucket, small_log):
    """The small log in the bucket."""
    objects.write(f"{bucket}/log.tsv", small_log)
    return f"{bucket}/log.tsv"


@pytest.fixture
def expected(small_dataset):
    """The bytes of the dataset of the small log on a disk, by name."""
    return {str(path.relative_to(small_dataset.path)): path.read_bytes() for path in files_in(small_dataset.path)}


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def without_name(content):
    """Of a dataset's bytes, those that do not hold what the log's file is called."""
    return {name: data for name, data in content.items() if name != "dataset.json"}


def test_a_dataset_of_a_bucket_has_the_bytes_of_one_on_a_disk(bucket, log, expected, tmp_path, small_log):
    dataset = preprocess(log, f"{bucket}/dataset", criteo_schema(), OPTIONS)
    made = bytes_of(f"{bucket}/dataset")
    assert without_name(made) == without_name(expected)
    assert made["dataset.json"] == expected["dataset.json"].replace(b"small.tsv", b"log.tsv")
    assert dataset.path == located(f"{bucket}/dataset")
    assert not work_folder(dataset.path).exists()
    assert not located(log).exists(), "nothing of a log is copied to the disk"
    again = preprocess(log, f"{bucket}/dataset", criteo_schema(), OPTIONS, chunk_bytes=5)
    assert again.manifest == dataset.manifest
    with pytest.raises(DatasetError, match="min_count"):
        preprocess(log, f"{bucket}/dataset", criteo_schema(), PreprocessOptions(min_count=3))
    objects.write(f"{bucket}/dataset/stray", b"")
    replaced = preprocess(log, f"{bucket}/dataset", "criteo", PreprocessOptions(min_count=3), overwrite=True)
    assert "stray" not in bytes_of(f"{bucket}/dataset")
    later = preprocess(log, tmp_path / "later", "criteo", PreprocessOptions(vocabulary=f"{bucket}/dataset"))
    assert later.num_embeddings == replaced.num_embeddings
    with pytest.raises(DatasetError, match="exists and is no dataset"):
        preprocess(log, bucket, criteo_schema(), OPTIONS)
    objects.write(f"{bucket}/log.tsv", small_log.read_bytes() + b"\n")
    with pytest.raises(DatasetError, match="of another log"):
        preprocess(log, f"{bucket}/dataset", criteo_schema(), PreprocessOptions(min_count=3))


def write_logs(folder, small_log):
    """The small log in all formats; the names of the files that `find_files` is given."""
    text = small_log.read_bytes()
    names = [column.name for column in criteo_schema().columns]
    table = pl.read_csv(small_log, separator="\t", has_header=False, new_columns=names)
    (folder / "log.tsv").write_bytes(text)
    (folder / "log.gz").write_bytes(gzip.compress(text, 1))
    with pa.CompressedOutputStream(str(folder / "log.zst"), "zstd") as packed:
        packed.write(text)
    table.write_ndjson(folder / "log.jsonl")
    table.write_parquet(folder / "log.parquet", row_group_size=1000)
    orc.write_table(table.to_arrow(compat_level=pl.CompatLevel.oldest()), folder / "log.orc", stripe_size=1 << 18)
    rng = np.random.default_rng(1)
    for kind, width in (("labels", 1), ("dense", 13), ("sparse", 26)):
        np.save(folder / f"day_0_{kind}.npy", rng.integers(0, 2, (700, width), np.int32))
    return ["log.tsv", "log.gz", "log.zst", "log.jsonl", "log.parquet", "log.orc", "day_0_sparse.npy"]


def rows_of(path):
    """All rows of a log, by the way that preprocessing reads it, and by that of predictions."""
    (file,) = find_files([path])
    layout = file.format.layout(file, criteo_schema())
    if file.packing is None:
        parsed = [file.format.read(file, chunk, layout) for chunk in file.format.chunks(file, layout, 200_000)]
        assert len(parsed) > 1 or file.day is not None
    else:
        parsed = [file.format.parse(lines, layout) for lines in read_chunks(file, layout, 200_000)]
    predicted = list(RowsIn([path], criteo_schema()))
    return pl.concat(chunk.frame for chunk in parsed), pl.concat(chunk.frame for chunk in predicted)


def test_all_formats_are_read_from_a_bucket(bucket, tmp_path, small_log):
    (tmp_path / "logs").mkdir()
    names = write_logs(tmp_path / "logs", small_log)
    for path in (tmp_path / "logs").iterdir():
        objects.write(f"{bucket}/{path.name}", path)
    for name in names:
        there, here = rows_of(located(f"{bucket}/{name}")), rows_of(tmp_path / "logs" / name)
        assert all(mine.equals(other) for mine, other in zip(there, here, strict=True)), name
    for name in ("log.tsv", "log.parquet"):
        text = propose_schema(located(f"{bucket}/{name}")).text
        assert text.split("\n")[3:] == propose_schema(tmp_path / "logs" / name).text.split("\n")[3:]
    assert not files_in(tmp_path / "cache"), "nothing of a log is copied to the disk"


def test_prefixes_and_patterns_name_files(bucket, small_log):
    for name in ("day=1/a.tsv", "day=1/b.tsv", "day=1/_SUCCESS", "day=2/a.tsv"):
        objects.write(f"{bucket}/{name}", small_log)

    def found(url):
        return [str(file.path.relative_to(located(bucket))) for file in find_files([located(f"{bucket}/{url}")])]

    assert found("day=1/") == ["day=1/a.tsv", "day=1/b.tsv"]
    assert found("day=*/a.tsv") == ["day=1/a.tsv", "day=2/a.tsv"]
    for url, message in (("day=3/*", "no object has such a name"), ("day=3/a.tsv", "there is no such file")):
        with pytest.raises((LogError, StorageError), match=message):
            found(url)
    with pytest.raises(StorageError, match=r"s3://no-such-bucket/log: .* no such bucket"):
        find_files([located("s3://no-such-bucket/log")])


def test_a_log_that_changes_while_it_is_read_is_refused(log, small_log):
    (file,) = find_files([located(log)])
    layout = file.format.layout(file, criteo_schema())
    (chunk,) = file.format.chunks(file, layout, 10_000_000)
    objects.write(log, small_log.read_bytes()[::-1])
    with pytest.raises(LogError, match="changed while it was read"):
        file.format.read(file, chunk, layout)
    objects.delete(log)
    with pytest.raises(LogError, match="is not there any more"):
        file.format.read(file, chunk, layout)


def test_a_look_at_a_place_costs_little_and_a_large_read_few_requests(bucket, s3, monkeypatch):
    objects.write(f"{bucket}/big", bytes(3 * RANGE_BYTES))
    with far_away(s3) as faults:
        for name, value in faults.environment.items():
            monkeypatch.setenv(name, value)
        with open_to_read(located(f"{bucket}/big")) as raw:
            raw.seek(RANGE_BYTES)
            assert len(raw.read(50_000)) == 50_000
            assert faults.num_bytes < 100_000
            faults.requests.clear()
            raw.seek(0)
            assert len(raw.read(3 * RANGE_BYTES)) == 3 * RANGE_BYTES
        assert len(faults.requests) == 3, "8 MiB each"


def test_a_killed_command_goes_on_whatever_becomes_of_its_requests(bucket, log, s3, expected, small_log, monkeypatch):
    with far_away(s3, busy=0.05, cut=0.05, seed=3) as faults:
        for name, value in faults.environment.items():
            monkeypatch.setenv(name, value)
        out = f"{bucket}/killed"
        command = [DLRM, "preprocess", log, "--out", out, "--min-count", "2"]
        process = shared_server().start(command, env=os.environ, stderr=subprocess.PIPE)
        while process.poll() is None and not any(request.startswith("PUT") for request in faults.requests):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert "dataset.json" not in bytes_of(out)
        done = shared_server().run(command, env=os.environ, timeout_s=60)
        assert done.returncode == 0, done.stderr
        assert without_name(bytes_of(out)) == without_name(expected)
    assert f"next: dlrm inspect {out}" in done.stderr


@pytest.mark.parametrize(
    ("answer", "message"),
    [((403, "ExpiredToken"), "the credentials have expired; get new ones"), ((404, "NoSuchBucket"), "no such bucket")],
)
def test_what_ends_a_job_is_said_and_it_goes_on_afterwards(bucket, log, s3, expected, monkeypatch, answer, message):
    """Credentials expire, or the bucket vanishes, when all is read and the parts are to be written."""
    with far_away(s3) as faults:
        for name, value in faults.environment.items():
            monkeypatch.setenv(name, value)

        class Ending(SilentProgress):
            def start_phase(self, name, *_):
                faults.answer = answer if name == "write" else faults.answer

        with pytest.raises(StorageError, match=f"{bucket}/out: cannot be .*: .*{message}"):
            preprocess(log, f"{bucket}/out", criteo_schema(), OPTIONS, Ending())
        faults.answer = None
        assert bytes_of(f"{bucket}/out") == {}
        preprocess(log, f"{bucket}/out", criteo_schema(), OPTIONS)
        assert without_name(bytes_of(f"{bucket}/out")) == without_name(expected)
