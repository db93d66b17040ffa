"""Writes a log of rows and predictions, in Parquet that `dlrm preprocess` reads like any log.

In: batches, as the model was given them.  Out: files in a folder, each complete from the moment it has its name:

    features as the schema calls them in a log    hex values as 8 digits, lists as lists
    the column of time, if the schema has one      when the rows were predicted
    request_id, request_row                        which row of which request: what a label is joined by
    requested_at, prediction, model_version        of several labels: prediction_LABEL of each but the first, too

The label is not there: it is not known yet.  docs/serving.md says how it is joined.  Rows wait in memory until there
are enough for a file, and take no more of it than a fixed size: beyond, they are dropped, counted and logged.  A file
that the disk does not take is tried again and again.  Rows are made columns in the log's own thread, because the model
may not need them as such, and those of many batches together, because the cost is that of the columns.
"""

import io
import logging
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from torchdlrm.errors import ConfigError
from torchdlrm.features.cells import written_cells
from torchdlrm.features.columns import TimeColumn
from torchdlrm.features.schema import FeatureSchema
from torchdlrm.files import replacing
from torchdlrm.serving.event_log import log_event, note_event
from torchdlrm.serving.service.batcher import BatchReport
from torchdlrm.units import show_bytes

OWN_COLUMNS = ("request_id", "request_row", "requested_at", "prediction", "model_version")
MAX_WAITING_BYTES = 256 << 20
# As objects of Python, rows of JSON take less than this many times the bytes that they came as, and this many for each.
_OBJECT_FACTOR, _OBJECT_BYTES = 5, 512
FILE_ROWS = 1 << 16
FILE_SECONDS = 60.0
_FILE_BYTES = MAX_WAITING_BYTES // 4  # of rows in memory: wide ones do not wait until a file has all of its rows
_GATHER_S, _GATHER_ROWS = 0.25, 4_096  # of batches that are made columns together
_FIRST_RETRY_S, _MAX_RETRY_S = 1.0, 30.0
_SECONDS_BETWEEN_LINES = 60.0
# What building columns and Parquet may raise: Polars' panics are no `Exception`.
_ANY_FAILURE = (Exception, pl.exceptions.PanicException)


class RequestLog:
    """Writes batches to Parquet files in a thread of its own.

    Args:
        folder: is made, also again when it has been removed.
        dropped: is called with the number of rows that were dropped.
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
        self._name = f"{os.getpid()}-{secrets.token_hex(3)}"  # process ids alone are the same in many containers
        self._file_rows, self._file_s = file_rows, file_s
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".probe-{self._name}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(f"`log_predictions` {folder}: cannot be written to: {error.strerror or error}") from error
        self._reports: queue.SimpleQueue[BatchReport | None] = queue.SimpleQueue()
        self._waiting_rows = self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._unreported_rows = 0
        self._next_line_s: dict[str, float] = {}
        self._num_files = 0
        self._is_closing = threading.Event()
        self._next: BatchReport | None = None  # taken from the queue already
        self._thread = threading.Thread(target=self._work, name="request log", daemon=True)
        self._thread.start()

    def add(self, report: BatchReport) -> None:
        """Keep a batch; never wait."""
        num_rows, num_bytes = report.total_rows, _size_bytes(report)
        with self._lock:
            has_room = self._waiting_bytes + num_bytes <= MAX_WAITING_BYTES
        if has_room:
            self._count_waiting(num_rows, num_bytes)
            self._reports.put(report)
        else:
            limit = show_bytes(MAX_WAITING_BYTES)
            self._drop(num_rows, "memory", f"rows that wait to be written have all of {limit}, and no more are kept")

    def close(self) -> None:
        """Write what is waiting."""
        self._is_closing.set()
        self._reports.put(None)
        self._thread.join()
        if self._unreported_rows:
            self._log_dropped("end", "the server stops")

    def _work(self) -> None:
        kept: list[pl.DataFrame] = []
        schema: FeatureSchema | None = None
        oldest_s = 0.0
        while True:
            group, is_end = self._next_group(oldest_s + self._file_s - time.monotonic() if kept else None)
            is_old = bool(kept) and time.monotonic() >= oldest_s + self._file_s
            if kept and (is_old or is_end or (group and group[0].model.schema is not schema)):
                self._write(kept)
                kept = []
            if group:
                if not kept:
                    oldest_s = time.monotonic()
                schema = group[0].model.schema
                self._count_waiting(0, -sum(map(_size_bytes, group)))
                try:
                    kept.append(_log_frame(group))
                    self._count_waiting(0, int(kept[-1].estimated_size()))
                except _ANY_FAILURE as error:
                    self._drop_waiting(sum(report.total_rows for report in group), 0, "rows", repr(error))
                del group  # while the thread waits, nothing keeps a bundle that was swapped away
            is_full = sum(frame.height for frame in kept) >= self._file_rows or _frame_bytes(kept) >= _FILE_BYTES
            if kept and (is_end or is_full):
                self._write(kept)
                kept = []
            if is_end:
                return

    def _next_group(self, timeout_s: float | None) -> tuple[list[BatchReport], bool]:
        """Return batches of one model, none if none come in that time; and whether they are the last."""
        group: list[BatchReport] = []
        num_rows = 0
        try:
            if self._next is None:
                self._next = self._reports.get(timeout=None if timeout_s is None else max(0.0, timeout_s))
                if self._next is not None:
                    self._is_closing.wait(_GATHER_S)
            while self._next is not None:
                if group and (self._next.model is not group[0].model or num_rows >= _GATHER_ROWS):
                    return group, False
                group.append(self._next)
                num_rows += self._next.total_rows
                self._next = None
                self._next = self._reports.get_nowait()
        except queue.Empty:
            return group, False
        return group, True

    def _write(self, frames: list[pl.DataFrame]) -> None:
        """Write a file: again and again until the disk takes it, but only once more when the log is closed."""
        num_rows, num_bytes = sum(frame.height for frame in frames), _frame_bytes(frames)
        parquet = io.BytesIO()  # so that what fails from here on is the disk
        try:
            frame = pl.concat(frames)
            frame.write_parquet(parquet)
        except _ANY_FAILURE as error:
            self._drop_waiting(num_rows, num_bytes, "rows", repr(error))
            return
        stamp = frame["requested_at"][0].strftime("%Y%m%dT%H%M%S")
        path = self._folder / f"{stamp}-{self._name}-{self._num_files:06d}.parquet"
        self._num_files += 1
        retry_s, is_late = _FIRST_RETRY_S, False
        while (failure := _try_to_write(path, parquet)) is not None:
            if self._is_closing.is_set():
                self._drop_waiting(num_rows, num_bytes, "disk", failure)
                return
            self._log_dropped("disk", failure)
            is_late = True
            self._is_closing.wait(retry_s)
            retry_s = min(2 * retry_s, _MAX_RETRY_S)
        self._count_waiting(-num_rows, -num_bytes)
        if is_late:
            note_event("predictions logged again", **self._counts())

    def _count_waiting(self, num_rows: int, num_bytes: int) -> None:
        with self._lock:
            self._waiting_rows += num_rows
            self._waiting_bytes += num_bytes

    def _drop_waiting(self, num_rows: int, num_bytes: int, cause: str, message: str) -> None:
        self._count_waiting(-num_rows, -num_bytes)
        self._drop(num_rows, cause, message)

    def _drop(self, num_rows: int, cause: str, message: str) -> None:
        self._dropped(num_rows)
        with self._lock:
            self._unreported_rows += num_rows
        self._log_dropped(cause, message)

    def _log_dropped(self, cause: str, message: str) -> None:
        """Log the rows that were dropped, unless this cause was logged just now: then the next line has them."""
        with self._lock:
            now_s = time.monotonic()
            if now_s < self._next_line_s.get(cause, 0.0):
                return
            self._next_line_s[cause] = now_s + _SECONDS_BETWEEN_LINES
        log_event(logging.ERROR, "predictions not logged", message=message, **self._counts())

    def _counts(self) -> dict[str, object]:
        with self._lock:
            dropped_rows, self._unreported_rows = self._unreported_rows, 0
            return {"dropped_rows": dropped_rows, "waiting_rows": self._waiting_rows, "folder": str(self._folder)}


def _try_to_write(path: Path, parquet: io.BytesIO) -> str | None:
    """Write a file; return why it could not be written, or None."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(parquet.getbuffer())
    except OSError as error:
        return error.strerror or repr(error)
    return None


def _size_bytes(report: BatchReport) -> int:
    """The most that the rows of a batch take of memory."""
    num_bytes = sum(request.num_bytes for request in report.requests)
    return _OBJECT_FACTOR * num_bytes + _OBJECT_BYTES * report.total_rows


def _frame_bytes(frames: Sequence[pl.DataFrame]) -> int:
    return sum(int(frame.estimated_size()) for frame in frames)


def check_loggable(schema: FeatureSchema) -> None:
    """Check that no column of the schema has the name of one of the log's own.

    Raises:
        ConfigError: a column of the schema is called as one of them.
    """
    own = {*OWN_COLUMNS, *schema.label_columns("prediction")}
    taken = sorted({column.log_name for column in schema.columns} & own)
    if taken:
        msg = f"`log_predictions`: the log has a column {taken[0]!r} of its own; give the schema's another header_name"
        raise ConfigError(msg)


def _log_frame(reports: Sequence[BatchReport]) -> pl.DataFrame:
    """Make the rows of some batches of one model."""
    model, requests = reports[0].model, [request for report in reports for request in report.requests]
    schema = model.schema
    frame = model.parse_requests([request.rows for request in requests])
    columns = [written_cells(frame[column.name], column).alias(column.log_name) for column in schema.features]
    times_us = pl.Series(np.repeat([report.time_us for report in reports], [report.total_rows for report in reports]))
    if schema.time is not None:
        columns.append(_as_time(times_us, schema.time))
    counts = [len(request.rows) for request in requests]
    request_ids = np.array([request.request_id for request in requests], object)
    probabilities = np.concatenate([part.probabilities for report in reports for part in report.predictions])
    columns += [
        pl.Series("request_id", np.repeat(request_ids, counts).tolist(), pl.String),
        pl.Series("request_row", np.concatenate([np.arange(count) for count in counts])),
        times_us.cast(pl.Datetime("us", "UTC")).alias("requested_at"),
        *(pl.Series(name, of) for name, of in schema.by_label(probabilities, "prediction").items()),
        pl.Series("model_version", [model.version]).new_from_index(0, frame.height),
    ]
    return pl.DataFrame(columns)


def _as_time(times_us: pl.Series, column: TimeColumn) -> pl.Series:
    times_us = times_us.alias(column.log_name)
    if column.kind == "datetime":
        return times_us.cast(pl.Datetime("us"))
    seconds = times_us / 1e6
    return seconds.cast(pl.Int64) if column.kind == "int" else seconds
