"""The log of predictions: what preprocessing reads back, whole files, a bound, never in the way."""

import ctypes
import os
import time
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from torchdlrm.errors import ConfigError
from torchdlrm.features.bad_rows import BadRows
from torchdlrm.features.columns import DenseColumn, LabelColumn, SparseColumn, TimeColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.logs.find import find_files
from torchdlrm.logs.format import Chunk
from torchdlrm.serving.service import request_log
from torchdlrm.serving.service.batcher import BatchReport, PredictionRequest
from torchdlrm.serving.service.request_log import RequestLog, check_loggable

SCHEMA = FeatureSchema(
    name="own",
    columns=(
        LabelColumn(name="label"),
        TimeColumn(name="at", kind="datetime"),
        DenseColumn(name="price", header_name="Price in EUR"),
        SparseColumn(name="ids", kind="hex", value_separator="|"),
        SparseColumn(name="city"),
        SparseColumn(name="shop", kind="int"),
    ),
)
FRAME = pl.DataFrame(
    {
        "price": [1.5, None, 3.0],
        "ids": [[1, 0xFFFFFFFF], None, [16]],
        "city": ["Köln", "", None],
        "shop": [-(2**63), None, 7],
    },
    schema_overrides={"ids": pl.List(pl.UInt32)},
)


@dataclass
class Found:
    probabilities: np.ndarray
    num_unknown: dict


@dataclass
class Model:
    schema: FeatureSchema = SCHEMA
    version: str = "v1"

    def parse_requests(self, requests):
        return pl.concat(requests)


def told(caplog):
    """The fields of what was logged."""
    return [{"event": record.msg, **record.fields} for record in caplog.records]


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None)
    if libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("may not mount a disk of its own here")
    yield disk
    assert libc.umount(os.fsencode(disk)) == 0


def fill(disk):
    """The file that takes all that is left of a disk."""
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space left"):
        filler.write_bytes(bytes(1 << 20))
    return filler


def rows_on(disk):
    return sum(pl.read_parquet(path).height for path in disk.glob("*.parquet"))


def wait_for(condition, timeout_s=20):
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.005)


BYTES_OF_REPORT = 5 * 100 + 512 * FRAME.height  # as objects


def report(frame=FRAME, model=None):
    probabilities = np.linspace(0, 1, frame.height, dtype=np.float32)
    model = model or Model()
    requests = [
        PredictionRequest(model, part, 50, name, 0.0, lambda: False)
        for name, part in (("a", frame[:1]), ("b", frame[1:]))
    ]
    return BatchReport(requests, [Found(probabilities, {})], time.time_ns() // 1000)


def test_what_was_logged_is_read_as_what_was_asked(tmp_path):
    log = RequestLog(tmp_path, pytest.fail)
    log.add(report())
    log.close()
    path = next(tmp_path.iterdir())
    logged = pl.read_parquet(path)
    assert logged.select("request_id", "request_row", "model_version").rows() == [
        ("a", 0, "v1"),
        ("b", 0, "v1"),
        ("b", 1, "v1"),
    ]
    assert logged["prediction"].to_list() == [0.0, 0.5, 1.0]
    logged.with_columns(label=pl.lit(1)).write_parquet(tmp_path / "labelled.parquet")
    (file,) = find_files([tmp_path / "labelled.parquet"])
    read = file.format.read(file, Chunk(0, 1), SCHEMA)
    assert read.bad_rows == BadRows()
    expected = FRAME.with_columns(city=pl.Series(["Köln", None, None]))  # in a log, an empty text is a missing one
    assert read.frame.select(expected.columns).equals(expected)


def test_files_are_written_when_they_are_full_and_by_version_of_the_schema(tmp_path):
    log = RequestLog(tmp_path, pytest.fail, file_rows=6)
    for schema in (SCHEMA, SCHEMA, SCHEMA, SCHEMA.model_copy()):
        log.add(report(model=Model(schema)))
    log.close()
    assert sorted(pl.read_parquet(path).height for path in tmp_path.iterdir()) == [3, 3, 6]


def test_a_file_is_written_in_its_time_while_rows_keep_coming(tmp_path):
    log = RequestLog(tmp_path, pytest.fail, file_s=0.3)
    model, deadline_s = Model(), time.monotonic() + 10
    while not list(tmp_path.glob("*.parquet")) and time.monotonic() < deadline_s:
        log.add(report(model=model))
        time.sleep(0.001)
    assert time.monotonic() < deadline_s
    log.close()


def test_small_batches_become_columns_together(tmp_path):
    class Counting(Model):
        reads = 0

        def parse_requests(self, requests):
            self.reads += 1
            return super().parse_requests(requests)

    log, model = RequestLog(tmp_path, pytest.fail), Counting()
    for _ in range(500):
        log.add(report(model=model))
    log.close()
    assert 1 <= model.reads <= 3
    logged = pl.concat(map(pl.read_parquet, sorted(tmp_path.iterdir())))
    assert logged["prediction"].to_list() == [0.0, 0.5, 1.0] * 500
    assert logged["request_row"].to_list() == [0, 0, 1] * 500


def test_rows_beyond_the_bound_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_WAITING_BYTES", 2 * BYTES_OF_REPORT)
    monkeypatch.setattr(request_log, "_GATHER_S", 30)  # as objects, until it is closed
    dropped = []
    log = RequestLog(tmp_path, dropped.append)
    for _ in range(3):
        log.add(report())
    log.close()
    assert dropped == [3]
    assert sum(pl.read_parquet(path).height for path in tmp_path.iterdir()) == 6


def test_wide_rows_are_written_before_they_are_too_many_for_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "_FILE_BYTES", 1)
    log = RequestLog(tmp_path, pytest.fail)
    log.add(report())
    wait_for(lambda: rows_on(tmp_path) == 3)
    log.close()


def test_a_full_disk_costs_only_what_does_not_fit_into_memory(caplog, small_disk, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_WAITING_BYTES", 2 * BYTES_OF_REPORT)
    monkeypatch.setattr(request_log, "_GATHER_S", 2)  # as objects, until all have been added
    monkeypatch.setattr(request_log, "_FIRST_RETRY_S", 0.01)
    dropped = []
    log = RequestLog(small_disk, dropped.append, file_rows=3)
    filler = fill(small_disk)
    for _ in range(4):
        log.add(report())
    assert dropped == [3, 3]
    wait_for(lambda: "No space left" in str(told(caplog)))
    assert rows_on(small_disk) == 0
    filler.unlink()
    wait_for(lambda: rows_on(small_disk) == 6)
    log.add(report())
    log.close()
    assert rows_on(small_disk) == 9
    assert dropped == [3, 3]
    assert {path.suffix for path in small_disk.iterdir()} == {".parquet"}
    lines = told(caplog)
    assert [line["event"] for line in lines] == [*["predictions not logged"] * 2, "predictions logged again"]
    assert sum(line["dropped_rows"] for line in lines) == 6
    assert {line["folder"] for line in lines} == {str(small_disk)}


def test_a_full_disk_does_not_keep_the_log_from_closing(caplog, small_disk):
    dropped = []
    log = RequestLog(small_disk, dropped.append, file_rows=3)
    fill(small_disk)
    log.add(report())
    wait_for(lambda: "No space left" in str(told(caplog)))
    log.add(report())
    log.close()
    assert sum(dropped) == 6
    assert sum(line["dropped_rows"] for line in told(caplog)) == 6


def test_a_folder_that_was_removed_is_made_again(tmp_path):
    folder = tmp_path / "log"
    log = RequestLog(folder, pytest.fail)
    folder.rmdir()
    log.add(report())
    log.close()
    assert rows_on(folder) == 3


def test_rows_that_cannot_be_written_are_dropped_and_the_next_are_written(caplog, tmp_path, monkeypatch):
    """Whatever Polars raises: here, columns of another type than the schema says, and a column that is there twice."""
    monkeypatch.setattr(request_log, "_SECONDS_BETWEEN_LINES", 0)
    dropped = []
    log = RequestLog(tmp_path, dropped.append, file_rows=6)
    no_hex = FRAME.with_columns(ids=pl.Series([["x"], None, []], dtype=pl.List(pl.String)))
    twice = SCHEMA.model_copy(update={"columns": (*SCHEMA.columns, DenseColumn(name="prediction"))})
    other_type = FRAME.with_columns(price=pl.Series(["a", "b", "c"]))
    for frames, schema in [
        ([no_hex, FRAME, FRAME], SCHEMA),
        ([FRAME.with_columns(prediction=1.0)], twice),
        ([FRAME, other_type, FRAME, FRAME], SCHEMA),
    ]:
        for frame in frames:
            log.add(report(frame, Model(schema)))
    log.close()
    assert rows_on(tmp_path) + sum(dropped) == 24
    assert sum(dropped) == 12
    lines = told(caplog)
    assert sum(line["dropped_rows"] for line in lines) == 12
    assert all(line["event"] == "predictions not logged" for line in lines)


def test_columns_that_the_log_has_itself_are_refused_at_the_start():
    columns = (*SCHEMA.columns, SparseColumn(name="prediction"))
    with pytest.raises(ConfigError, match="'prediction'"):
        check_loggable(SCHEMA.model_copy(update={"columns": columns}))
