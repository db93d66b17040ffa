"""The log of predictions: what preprocessing reads back, whole files, a bound, never in the way."""

import time
from dataclasses import dataclass

import numpy as np
import polars as pl
import pytest

from torchdlrm.data.bad_rows import BadRows
from torchdlrm.data.log.files import find_files
from torchdlrm.data.log.parquet import read_row_groups
from torchdlrm.errors import ConfigError
from torchdlrm.schema import DenseColumn, FeatureSchema, LabelColumn, SparseColumn, TimeColumn
from torchdlrm.serve import request_log
from torchdlrm.serve.batch import BatchReport
from torchdlrm.serve.request_log import RequestLog, check_loggable

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

    def read(self, requests):
        return pl.concat(requests)


def report(frame=FRAME):
    probabilities = np.linspace(0, 1, frame.height, dtype=np.float32)
    requests = [frame[:1], frame[1:]]
    counts = [part.height for part in requests]
    return BatchReport(None, requests, ["a", "b"], counts, [Found(probabilities, {})], 0.0, 0.0)


def test_what_was_logged_is_read_as_what_was_asked(tmp_path):
    log = RequestLog(tmp_path, pytest.fail)
    log.add(report(), Model())
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
    read = read_row_groups(find_files([tmp_path / "labelled.parquet"])[0], range(1), SCHEMA)
    assert read.bad_rows == BadRows()
    expected = FRAME.with_columns(city=pl.Series(["Köln", None, None]))  # in a log, an empty text is a missing one
    assert read.frame.select(expected.columns).equals(expected)


def test_files_are_written_when_they_are_full_and_by_version_of_the_schema(tmp_path):
    log = RequestLog(tmp_path, pytest.fail, file_rows=6)
    for schema in (SCHEMA, SCHEMA, SCHEMA, SCHEMA.model_copy()):
        log.add(report(), Model(schema))
    log.close()
    assert sorted(pl.read_parquet(path).height for path in tmp_path.iterdir()) == [3, 3, 6]


def test_a_file_is_written_in_its_time_while_rows_keep_coming(tmp_path):
    log = RequestLog(tmp_path, pytest.fail, file_s=0.3)
    model, deadline_s = Model(), time.monotonic() + 10
    while not list(tmp_path.glob("*.parquet")) and time.monotonic() < deadline_s:
        log.add(report(), model)
        time.sleep(0.001)
    assert time.monotonic() < deadline_s
    log.close()


def test_small_batches_become_columns_together(tmp_path):
    class Counting(Model):
        reads = 0

        def read(self, requests):
            self.reads += 1
            return super().read(requests)

    log, model = RequestLog(tmp_path, pytest.fail), Counting()
    for _ in range(500):
        log.add(report(), model)
    log.close()
    assert model.reads <= 3
    logged = pl.read_parquet(next(tmp_path.iterdir()))
    assert logged["prediction"].to_list() == [0.0, 0.5, 1.0] * 500
    assert logged["request_row"].to_list() == [0, 0, 1] * 500


def test_rows_beyond_the_bound_are_dropped_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(request_log, "MAX_WAITING_ROWS", 7)
    dropped = []
    log = RequestLog(tmp_path, dropped.append)
    for _ in range(3):
        log.add(report(), Model())
    log.close()
    assert dropped == [3]
    assert sum(pl.read_parquet(path).height for path in tmp_path.iterdir()) == 6


def test_a_disk_that_takes_nothing_stops_nothing(tmp_path):
    dropped = []
    folder = tmp_path / "log"
    log = RequestLog(folder, dropped.append)
    folder.rmdir()
    log.add(report(), Model())
    log.close()
    assert dropped == [3]


def test_columns_that_the_log_has_itself_are_refused_at_the_start():
    columns = (*SCHEMA.columns, SparseColumn(name="prediction"))
    with pytest.raises(ConfigError, match="'prediction'"):
        check_loggable(SCHEMA.model_copy(update={"columns": columns}))
