"""A log of rows and predictions, in Parquet that `dlrm preprocess` reads as it reads any log.

In: batches, as the model was given them.  Out: files in a folder, each whole from the moment it has its name:

    features as the schema calls them in a log    hex values as 8 digits, lists as lists
    the column of time, if the schema has one      when the rows were predicted
    request_id, request_row                        which row of which request: what a label is joined by
    requested_at, prediction, model_version

The label is not there: nobody knows it yet.  docs/serving.md says how it is joined.  Rows wait in memory until there
are enough for a file, and no more than a fixed number: beyond, they are dropped and counted.  They are made columns in
the log's own thread, because the model may not need them as such, and those of many batches together, because the cost
is that of the columns.
"""

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from torchdlrm.data.atomic import replacing
from torchdlrm.data.vocabulary import hex_digits
from torchdlrm.errors import ConfigError
from torchdlrm.schema import FeatureSchema, SparseColumn, TimeColumn
from torchdlrm.serve.batch import BatchReport, Rows

OWN_COLUMNS = ("request_id", "request_row", "requested_at", "prediction", "model_version")
MAX_WAITING_ROWS = 1 << 17
FILE_ROWS = 1 << 16
FILE_SECONDS = 60.0
_GATHER_S, _GATHER_ROWS = 0.25, 4_096  # of batches that are made columns together


class LoggedModel(Protocol):
    """What predicted a batch."""

    schema: FeatureSchema
    version: str

    def read(self, requests: Sequence[Rows]) -> pl.DataFrame:
        """The rows of some requests, one after another, as typed columns."""


@dataclass(frozen=True)
class _Entry:
    report: BatchReport
    model: LoggedModel
    time_us: int


class RequestLog:
    """Writes batches to Parquet files in a thread of its own.

    Args:
        folder: is made.
        dropped: is told how many rows were dropped.
        file_rows, file_s: a file is written when it has that many rows, or its first row is that old.

    Raises:
        ConfigError: the folder cannot be written to.
    """

    def __init__(
        self,
        folder: Path,
        dropped: Callable[[int], None],
        *,
        file_rows: int = FILE_ROWS,
        file_s: float = FILE_SECONDS,
    ) -> None:
        self._folder, self._dropped = folder, dropped
        self._file_rows, self._file_s = file_rows, file_s
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            msg = f"--log-predictions {folder}: cannot be written to: {error.strerror or error}"
            raise ConfigError(msg) from error
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._waiting_rows = 0
        self._lock = threading.Lock()
        self._num_files = 0
        self._is_closing = threading.Event()
        self._next: _Entry | None = None  # taken from the queue already
        self._thread = threading.Thread(target=self._work, name="request log", daemon=True)
        self._thread.start()

    def add(self, report: BatchReport, model: LoggedModel) -> None:
        """Keep a batch; never waits."""
        num_rows = report.total_rows
        with self._lock:
            if self._waiting_rows + num_rows > MAX_WAITING_ROWS:
                self._dropped(num_rows)
                return
            self._waiting_rows += num_rows
        self._entries.put(_Entry(report, model, time.time_ns() // 1000))

    def close(self) -> None:
        """Write what is waiting."""
        self._is_closing.set()
        self._entries.put(None)
        self._thread.join()

    def _work(self) -> None:
        kept: list[pl.DataFrame] = []
        kept_rows = 0
        schema: FeatureSchema | None = None
        oldest_s = 0.0
        while True:
            group, is_end = self._next_group(oldest_s + self._file_s - time.monotonic() if kept else None)
            is_old = bool(kept) and time.monotonic() >= oldest_s + self._file_s
            if kept and (is_old or is_end or (group and group[0].model.schema is not schema)):
                self._write(kept)
                kept, kept_rows = [], 0
            if group:
                if not kept:
                    oldest_s = time.monotonic()
                schema = group[0].model.schema
                kept.append(_log_frame(group))
                kept_rows += kept[-1].height
                del group  # while the thread waits, nothing keeps a bundle that was swapped away
            if kept and (is_end or kept_rows >= self._file_rows):
                self._write(kept)
                kept, kept_rows = [], 0
            if is_end:
                return

    def _next_group(self, timeout_s: float | None) -> tuple[list[_Entry], bool]:
        """Batches of one model, none if none come in that time; and whether they are the last."""
        group: list[_Entry] = []
        num_rows = 0
        try:
            if self._next is None:
                self._next = self._entries.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
                if self._next is not None:
                    self._is_closing.wait(_GATHER_S)
            while self._next is not None:
                if group and (self._next.model is not group[0].model or num_rows >= _GATHER_ROWS):
                    return group, False
                group.append(self._next)
                num_rows += self._next.report.total_rows
                self._next = None
                self._next = self._entries.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _write(self, frames: list[pl.DataFrame]) -> None:
        frame = pl.concat(frames)
        stamp = frame["requested_at"][0].strftime("%Y%m%dT%H%M%S")
        path = self._folder / f"{stamp}-{os.getpid()}-{self._num_files:06d}.parquet"
        self._num_files += 1
        try:
            with replacing(path) as beside:
                frame.write_parquet(beside)
        except OSError:
            self._dropped(frame.height)  # a full disk must not stop the predictions
        with self._lock:
            self._waiting_rows -= frame.height


def check_loggable(schema: FeatureSchema) -> None:
    """See that the log's own columns have names of their own.

    Raises:
        ConfigError: a column of the schema is called as one of them.
    """
    taken = sorted({column.log_name for column in schema.columns} & set(OWN_COLUMNS))
    if taken:
        msg = f"--log-predictions: the log has a column {taken[0]!r} of its own; give the schema's another header_name"
        raise ConfigError(msg)


def _log_frame(entries: Sequence[_Entry]) -> pl.DataFrame:
    """The rows of some batches of one model."""
    model, reports = entries[0].model, [entry.report for entry in entries]
    schema = model.schema
    frame = model.read([request for report in reports for request in report.requests])
    columns = []
    for column in (*schema.dense, *schema.sparse):
        values = frame[column.name]
        columns.append(
            (digits_of(values, column) if isinstance(column, SparseColumn) else values).alias(column.log_name)
        )
    times_us = pl.Series(np.repeat([entry.time_us for entry in entries], [report.total_rows for report in reports]))
    if schema.time is not None:
        columns.append(_as_time(times_us, schema.time))
    counts = np.concatenate([report.num_rows for report in reports])
    starts = np.cumsum(counts) - counts
    request_ids = np.concatenate([np.asarray(report.request_ids, object) for report in reports])
    probabilities = [part.probabilities for report in reports for part in report.predictions]
    columns += [
        pl.Series("request_id", np.repeat(request_ids, counts).tolist(), pl.String),
        pl.Series("request_row", np.arange(frame.height) - np.repeat(starts, counts)),
        times_us.cast(pl.Datetime("us", "UTC")).alias("requested_at"),
        pl.Series("prediction", np.concatenate(probabilities)),
        pl.Series("model_version", [model.version]).new_from_index(0, frame.height),
    ]
    return pl.DataFrame(columns)


def digits_of(values: pl.Series, column: SparseColumn) -> pl.Series:
    """Hex values as a log writes them; other values as they are."""
    if column.kind != "hex":
        return values
    if not column.is_multi_valued:
        return hex_digits(values)
    rows = pl.DataFrame({"row": np.arange(len(values)), "value": values}).explode("value")
    digits = rows.with_columns(hex_digits(rows["value"])).group_by("row", maintain_order=True).agg("value")["value"]
    return pl.select(pl.when(values.is_not_null()).then(digits)).to_series()


def _as_time(times_us: pl.Series, column: TimeColumn) -> pl.Series:
    times_us = times_us.alias(column.log_name)
    if column.kind == "datetime":
        return times_us.cast(pl.Datetime("us"))
    seconds = times_us / 1e6
    return seconds.cast(pl.Int64) if column.kind == "int" else seconds
